// Rows of x to blocks of 32 signed bytes with a scale, for products of bytes.

struct Params {
    // vec4s of a row of x, and blocks of 32.
    x_stride: u32,
    blocks: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> bytes: array<u32>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.blocks {
        return;
    }
    let source = id.y * params.x_stride + id.x * 8u;
    let to = id.y * params.blocks + id.x;
    var most = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        most = max(most, abs(x[source + i]));
    }
    let d = max(max(most.x, most.y), max(most.z, most.w)) / 127.0;
    var inverse = 0.0;
    if d > 0.0 {
        inverse = 1.0 / d;
    }
    for (var i = 0u; i < 8u; i++) {
        bytes[to * 8u + i] = pack4xI8(vec4<i32>(round(x[source + i] * inverse)));
    }
    scales[to] = d;
}
