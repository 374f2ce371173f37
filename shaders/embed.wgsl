// out[row] = table[token of row], a chunk of 32 elements to a thread.

struct Params {
    // Elements of a row, and chunks of 32 of them.
    cols: u32,
    chunks: u32,
    row_bytes: u32,
    // The tokens that this part of the table holds: first <= token < first + rows.
    first: u32,
    rows: u32,
    // vec4s of a row of out.
    out_stride: u32,
}

@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let token = data[id.y];
    if id.x >= params.chunks || token < params.first || token - params.first >= params.rows {
        return;
    }
    let chunk = load((token - params.first) * params.row_bytes, id.x);
    for (var i = 0u; i < 8u; i++) {
        out[id.y * params.out_stride + position(id.x, i)] = weights4(chunk, i);
    }
}
