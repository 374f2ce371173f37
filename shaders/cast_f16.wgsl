// Rows of x to f16 with a scale, for products of halves: a workgroup to a row.
//
// The scale is a power of two, so that rounding is all that is lost, and such that the largest is from
// 1/8 to 1/4: a chunk's sum with weights up to 32 fits an f16. Weights are taken 256 times as large
// (quantized_f16.wgsl), so that small ones keep their bits.

struct Params {
    // vec4s of a row of x.
    x_stride: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> halves: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const THREADS = 128u;

var<workgroup> largest: array<f32, THREADS>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) row: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let base = row.x * params.x_stride;
    var most = vec4<f32>();
    for (var i = index; i < params.x_stride; i += THREADS) {
        most = max(most, abs(x[base + i]));
    }
    largest[index] = max(max(most.x, most.y), max(most.z, most.w));
    workgroupBarrier();
    var all = 0.0;
    for (var t = 0u; t < THREADS; t++) {
        all = max(all, largest[t]);
    }
    // Its exponent alone, within what has an inverse: 2^-100 to 2^100.
    let exponent = clamp(bitcast<u32>(all) >> 23u, 27u, 227u);
    let inverse = bitcast<f32>((254u - exponent) << 23u) / 8.0;
    for (var i = index; i < params.x_stride; i += THREADS) {
        halves[base + i] = vec4<f16>(x[base + i] * inverse);
    }
    if index == 0u {
        scales[row.x] = bitcast<f32>(exponent << 23u) / 32.0;
    }
}
