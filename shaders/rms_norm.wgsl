// out = x / sqrt(mean(x^2) + epsilon) * weight, a workgroup to a row.

struct Params {
    cols: u32,
    stride: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const THREADS = 128u;
const PIECES = THREADS / SUBGROUP;

var<workgroup> partial: array<f32, PIECES>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) row: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let base = row.x * params.stride;
    var sum = 0.0;
    for (var i = index; i < params.cols; i += THREADS) {
        sum = fma(x[base + i], x[base + i], sum);
    }
    sum = subgroup_sum(sum);
    if index % SUBGROUP == 0u {
        partial[index / SUBGROUP] = sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var p = 0u; p < PIECES; p++) {
        total += partial[p];
    }
    let scale = 1.0 / sqrt(total / f32(params.cols) + params.epsilon);
    for (var i = index; i < params.cols; i += THREADS) {
        out[base + i] = x[base + i] * scale * weight[i];
    }
}
