// out = the given rows of x.

struct Params {
    // vec4s of a row.
    stride: u32,
    // Where the rows' numbers are.
    rows_at: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < params.stride {
        let row = data[params.rows_at + id.y];
        out[id.y * params.stride + id.x] = x[row * params.stride + id.x];
    }
}
