// gate = silu(gate) * up, element by element.

struct Params {
    // vec4s of a row.
    stride: u32,
}

@group(0) @binding(0) var<storage, read_write> gate: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> up: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < params.stride {
        let i = id.y * params.stride + id.x;
        let g = gate[i];
        // Far below zero exp(-g) would overflow; what is left of g is nothing there.
        gate[i] = g / (1.0 + exp(min(-g, vec4<f32>(80.0)))) * up[i];
    }
}
