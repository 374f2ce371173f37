// Rows of x to blocks of 32 signed bytes (int8.wgsl), a block to a thread.

struct Params {
    // vec4s of a row of x, and blocks of 32.
    x_stride: u32,
    blocks: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> bytes: array<u32>;
@group(0) @binding(2) var<storage, read_write> scales: array<vec2<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.blocks {
        return;
    }
    let source = id.y * params.x_stride + id.x * 8u;
    var most = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        most = max(most, abs(x[source + i]));
    }
    let d = max(max(most.x, most.y), max(most.z, most.w)) / 127.0;
    var inverse = 0.0;
    if d > 0.0 {
        inverse = 1.0 / d;
    }
    var sums = 0.0;
    for (var i = 0u; i < 8u; i++) {
        let packed = pack4xI8(vec4<i32>(round(x[source + i] * inverse)));
        bytes[id.y * params.blocks * 8u + byte_group(params.blocks, id.x * 8u + i)] = packed;
        sums += f32(dot4I8Packed(0x01010101u, packed)) * select(1.0, HALF, i >= 4u);
    }
    scales[id.y * params.blocks + id.x] = vec2<f32>(d, sums);
}
