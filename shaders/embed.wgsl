// out[row] = scale * table[entry of row], or out[row] += that; a chunk of 32 elements to a thread. An
// entry is a row's token or position.

struct Params {
    // Elements of a row, and chunks of 32 of them.
    cols: u32,
    chunks: u32,
    row_bytes: u32,
    // The entries that this part of the table holds: first <= entry < first + rows.
    first: u32,
    rows: u32,
    // vec4s of a row of out.
    out_stride: u32,
    // Where the rows' entries are.
    entries_at: u32,
    // Whether out is added to.
    add: u32,
    scale: f32,
}

@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let entry = data[params.entries_at + id.y];
    if id.x >= params.chunks || entry < params.first || entry - params.first >= params.rows {
        return;
    }
    let chunk = load((entry - params.first) * params.row_bytes, id.x);
    for (var i = 0u; i < 8u; i++) {
        let at = id.y * params.out_stride + position(id.x, i);
        if params.add != 0u {
            out[at] += weights4(chunk, i) * params.scale;
        } else {
            out[at] = weights4(chunk, i) * params.scale;
        }
    }
}
