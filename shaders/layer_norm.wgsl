// out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, a workgroup to a row.

struct Params {
    // Elements of a row.
    cols: u32,
    // vec4s of a row, which zeros fill up.
    stride: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

// How far the elements of a group of four are from the mean; what fills up the row is not part of it.
fn distance_from(mean: f32, at: u32, i: u32) -> vec4<f32> {
    let inside = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.cols);
    return select(vec4<f32>(), x[at] - mean, inside);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) row: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let base = row.x * params.stride;
    var sum = vec4<f32>();
    for (var i = index; i < params.stride; i += THREADS) {
        sum += x[base + i];
    }
    let mean = total(index, sum) / f32(params.cols);
    var squares = vec4<f32>();
    for (var i = index; i < params.stride; i += THREADS) {
        let d = distance_from(mean, base + i, i);
        squares = fma(d, d, squares);
    }
    let variance = total(index, squares) / f32(params.cols);
    let scale = 1.0 / sqrt(variance + params.epsilon);
    for (var first = 0u; first < params.stride; first += THREADS) {
        let i = first + index;
        var values = vec4<f32>();
        if i < params.stride {
            values = fma(distance_from(mean, base + i, i) * scale, weight[i], bias[i]);
            out[base + i] = values;
        }
        round_block(row.x, params.stride, i, i < params.stride, values, index);
    }
}
