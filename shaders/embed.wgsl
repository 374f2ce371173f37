// out[row] = table[token of row], or out[row] += table[position of row]; a chunk of 32 elements to a
// thread.

struct Params {
    // Elements of a row, and chunks of 32 of them.
    cols: u32,
    chunks: u32,
    row_bytes: u32,
    // The tokens, or positions, that this part of the table holds: first <= token < first + rows.
    first: u32,
    rows: u32,
    // vec4s of a row of out.
    out_stride: u32,
    // 0: by token. 1: by position, added; then committed rows, and where each row's path is.
    by_position: u32,
    line: u32,
    paths_at: u32,
}

@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var entry = data[id.y];
    if params.by_position != 0u {
        entry = params.line + data[params.paths_at + id.y * PATH_WORDS] - 1u;
    }
    if id.x >= params.chunks || entry < params.first || entry - params.first >= params.rows {
        return;
    }
    let chunk = load((entry - params.first) * params.row_bytes, id.x);
    for (var i = 0u; i < 8u; i++) {
        let at = id.y * params.out_stride + position(id.x, i);
        if params.by_position != 0u {
            out[at] += weights4(chunk, i);
        } else {
            out[at] = weights4(chunk, i);
        }
    }
}
