// out = x / sqrt(mean(x^2) + epsilon) * weight, a workgroup to a row.

struct Params {
    // Elements of a row.
    cols: u32,
    // vec4s of a row, which zeros fill up.
    stride: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) row: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let base = row.x * params.stride;
    var squares = vec4<f32>();
    for (var first = index; first < params.stride; first += AT_ONCE) {
        var read: array<vec4<f32>, NORMED>;
        for (var k = 0u; k < NORMED; k++) {
            if first + k * THREADS < params.stride {
                read[k] = x[base + first + k * THREADS];
            }
        }
        for (var k = 0u; k < NORMED; k++) {
            squares = fma(read[k], read[k], squares);
        }
    }
    let mean = total(index, squares) / f32(params.cols);
    let scale = 1.0 / sqrt(mean + params.epsilon);
    for (var first = 0u; first < params.stride; first += AT_ONCE) {
        var values: array<vec4<f32>, NORMED>;
        for (var k = 0u; k < NORMED; k++) {
            let i = first + k * THREADS + index;
            if i < params.stride {
                values[k] = x[base + i] * scale * weight[i];
            }
        }
        for (var k = 0u; k < NORMED; k++) {
            let i = first + k * THREADS + index;
            if i < params.stride {
                out[base + i] = values[k];
            }
        }
    }
}
