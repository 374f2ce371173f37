// out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, a workgroup to a row.

struct Params {
    cols: u32,
    stride: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const THREADS = 128u;
const PIECES = THREADS / SUBGROUP;

var<workgroup> partial: array<f32, PIECES>;

// The sum over all threads, in one order.
fn total(index: u32, mine: f32) -> f32 {
    let sum = subgroup_sum(mine);
    // (Nobody reads what the last sum left any more.)
    workgroupBarrier();
    if index % SUBGROUP == 0u {
        partial[index / SUBGROUP] = sum;
    }
    workgroupBarrier();
    var all = 0.0;
    for (var p = 0u; p < PIECES; p++) {
        all += partial[p];
    }
    return all;
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) row: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let base = row.x * params.stride;
    var sum = 0.0;
    for (var i = index; i < params.cols; i += THREADS) {
        sum += x[base + i];
    }
    let mean = total(index, sum) / f32(params.cols);
    var squares = 0.0;
    for (var i = index; i < params.cols; i += THREADS) {
        let d = x[base + i] - mean;
        squares = fma(d, d, squares);
    }
    let variance = total(index, squares) / f32(params.cols);
    let scale = 1.0 / sqrt(variance + params.epsilon);
    for (var i = index; i < params.cols; i += THREADS) {
        out[base + i] = fma((x[base + i] - mean) * scale, weight[i], bias[i]);
    }
}
