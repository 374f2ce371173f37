// What all products share: out = x W^T + bias, or added to out. Several matrices that lie behind one
// another are one W here, whose results go to up to three buffers (epilogues/). Rows of x are called
// batch rows, to tell them from the rows of W.
//
// A row of W is cut into RANGES ranges of chunks, each of which LANES lanes share: lane l adds up the
// chunks l, l + LANES, ... of a range, in that order and each chunk's weights in one order; the lanes
// are added by a fixed tree (distances 4, 2, 1), then the ranges in their order. So an element of out
// is the same bits for any number of batch rows, in matmul_vec.wgsl and matmul_tiled.wgsl alike.

struct Params {
    // Chunks of 32 of a row of W, its bytes, and the rows of W.
    chunks: u32,
    row_bytes: u32,
    rows: u32,
    // Where W begins, in bytes.
    begins: u32,
    // Rows of x.
    batch_rows: u32,
    // Groups of four (in bytes: blocks of 32) of a row of x.
    x_stride: u32,
    // If not zero: x lacks the factors of its rows' norms, and the sums of its squares begin there.
    squares: u32,
    inverse_width: f32,
    epsilon: f32,
    // The element of out that row 0 of W is.
    first: u32,
    // The biases of out's elements begin there, or there are none.
    bias_at: u32,
    // Whether out is added to.
    add: u32,
    // f32s of a row of out, and of the other outputs; the rows of W where those begin.
    out_stride: u32,
    second_stride: u32,
    third_stride: u32,
    second: u32,
    third: u32,
    // Where the sums of squares of what is written as bytes begin.
    out_squares: u32,
    // Of a clamped gate (functions/clamped.wgsl).
    alpha: f32,
    limit: f32,
    // Of queries, keys and values (epilogues/rope_append_kv.wgsl): rows of them that come before those of W; heads, and
    // pairs of a head that are rotated; whether those are halves; pairs of a row of the cache.
    above: u32,
    head_dim: u32,
    pairs: u32,
    halves: u32,
    rotations_at: u32,
    first_slot: u32,
    kv_pairs: u32,
}

@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const LANES = 8u;
const NO_BIAS = 0xFFFFFFFFu;

fn range_begin(range: u32) -> u32 {
    let chunks = (params.chunks + LANES * RANGES - 1u) / (LANES * RANGES) * LANES;
    return min(range * chunks, params.chunks);
}

fn range_end(range: u32) -> u32 {
    return range_begin(range + 1u);
}

// Where a row of x is, or of W. (Past the end the last is taken again, and its sums are dropped.)
fn x_at(batch_row: u32) -> u32 {
    return min(batch_row, params.batch_rows - 1u) * params.x_stride;
}

fn w_row(row: u32) -> u32 {
    return params.begins + min(row, params.rows - 1u) * params.row_bytes;
}

// The bias of a row of W. (Added to sums by fma, so that no compiler chooses what is rounded.)
fn bias_of(row: u32) -> f32 {
    if params.bias_at == NO_BIAS || row >= params.rows {
        return 0.0;
    }
    return bias[params.bias_at + row];
}
