// out = x W^T + bias, or added to out: COLUMNS rows of x at a time, so that a block of weights is read
// and unpacked once for all of them.
//
// 32 threads share a row of W: thread `lane` takes the chunks lane, lane + 32, ... in that order, and
// their sums are added by a fixed tree. What an element is does not depend on COLUMNS.

struct Params {
    // Elements of a row of W, and chunks of 32 of them.
    cols: u32,
    chunks: u32,
    // Bytes of a row of W, and its rows.
    row_bytes: u32,
    rows: u32,
    // Rows of x.
    columns: u32,
    // vec4s of a row of x; f32s of a row of out.
    x_stride: u32,
    out_stride: u32,
    // The element of out that row 0 of W is.
    first: u32,
    // Whether there is a bias, and whether out is added to.
    has_bias: u32,
    add: u32,
}

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) tile: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let lane = index % LANES;
    let group = index / LANES;
    let first_row = (tile.x * GROUPS + group) * ROWS;
    let first_column = tile.y * COLUMNS;

    var sums: array<array<f32, COLUMNS>, ROWS>;
    for (var c = lane; c < params.chunks; c += LANES) {
        var chunks: array<Chunk, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            // (Past the end the last row is taken again, and its sums are dropped.)
            chunks[r] = load(min(first_row + r, params.rows - 1u) * params.row_bytes, c);
        }
        for (var i = 0u; i < 8u; i++) {
            var w: array<vec4<f32>, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                w[r] = weights4(chunks[r], i);
            }
            let at = position(c, i);
            for (var n = 0u; n < COLUMNS; n++) {
                let v = x[min(first_column + n, params.columns - 1u) * params.x_stride + at];
                for (var r = 0u; r < ROWS; r++) {
                    // Written out, so that no compiler chooses an order of its own.
                    var sum = fma(w[r].x, v.x, sums[r][n]);
                    sum = fma(w[r].y, v.y, sum);
                    sum = fma(w[r].z, v.z, sum);
                    sums[r][n] = fma(w[r].w, v.w, sum);
                }
            }
        }
    }
    finish(sums, tile, index);
}
