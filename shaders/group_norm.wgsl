// out = norm of groups of the elements of a row, such as its heads: a workgroup to a group. With or without a
// mean that is subtracted (LAYER), a weight and a bias; norms of whole rows with all that is usual have kernels
// of their own (rms_norm.wgsl, layer_norm.wgsl).

struct Params {
    // Elements of a group, and of a row, which zeros fill up.
    group: u32,
    stride: u32,
    epsilon: f32,
    // How far the weights and biases of two groups are apart: 0 if all have the same.
    weight_step: u32,
    bias_step: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const THREADS = 64u;

var<workgroup> partial: array<f32, THREADS>;

// The sum over all threads, in one order.
fn total(index: u32, mine: f32) -> f32 {
    // (Nobody reads what the last sum left any more.)
    workgroupBarrier();
    partial[index] = mine;
    for (var distance = THREADS / 2u; distance > 0u; distance >>= 1u) {
        workgroupBarrier();
        if index < distance {
            partial[index] += partial[index + distance];
        }
    }
    workgroupBarrier();
    return partial[0];
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) place: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let base = place.y * params.stride + place.x * params.group;
    var mean = 0.0;
    if LAYER {
        var sum = 0.0;
        for (var i = index; i < params.group; i += THREADS) {
            sum += x[base + i];
        }
        mean = total(index, sum) / f32(params.group);
    }
    var squares = 0.0;
    for (var i = index; i < params.group; i += THREADS) {
        let d = x[base + i] - mean;
        squares = fma(d, d, squares);
    }
    let scale = 1.0 / sqrt(total(index, squares) / f32(params.group) + params.epsilon);
    for (var i = index; i < params.group; i += THREADS) {
        var value = (x[base + i] - mean) * scale;
        if HAS_WEIGHT {
            value *= weight[place.x * params.weight_step + i];
        }
        if HAS_BIAS {
            value += bias[place.x * params.bias_step + i];
        }
        out[base + i] = value;
    }
}
