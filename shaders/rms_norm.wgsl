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
    for (var i = index; i < params.stride; i += THREADS) {
        squares = fma(x[base + i], x[base + i], squares);
    }
    let mean = total(index, squares) / f32(params.cols);
    let scale = 1.0 / sqrt(mean + params.epsilon);
    for (var first = 0u; first < params.stride; first += THREADS) {
        let i = first + index;
        var values = vec4<f32>();
        if i < params.stride {
            values = x[base + i] * scale * weight[i];
            out[base + i] = values;
        }
        round_block(row.x, params.stride, i, i < params.stride, values, index);
    }
}
