// x = max(x, 0), element by element.

struct Params {
    // vec4s of a row.
    stride: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < params.stride {
        let i = id.y * params.stride + id.x;
        // (What is not a number stays so, which `max` does not promise.)
        x[i] = select(x[i], vec4<f32>(), x[i] < vec4<f32>());
    }
}
