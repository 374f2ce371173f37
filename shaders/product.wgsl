// What all products share: out = x W^T + bias, or added to out. Several matrices that lie behind one
// another are one W here, whose results go to up to three buffers (outputs/).
//
// A row of W is cut into RANGES ranges of chunks, each of which LANES lanes share: lane l adds up the
// chunks l, l + LANES, ... of a range, in that order and each chunk's weights in one order; the lanes
// are added by a fixed tree (distances 4, 2, 1), then the ranges in their order. So an element of out
// is the same bits for any number of rows of x, in whichever frame.

struct Params {
    // Chunks of 32 of a row of W, its bytes, and the rows of W.
    chunks: u32,
    row_bytes: u32,
    rows: u32,
    // Where W begins, in bytes.
    begins: u32,
    // Rows of x.
    columns: u32,
    // Groups of four (in bytes: blocks of 32) of a row of x.
    x_stride: u32,
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
}

@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
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
fn x_row(column: u32) -> u32 {
    return min(column, params.columns - 1u) * params.x_stride;
}

fn w_row(row: u32) -> u32 {
    return params.begins + min(row, params.rows - 1u) * params.row_bytes;
}

fn store(row: u32, column: u32, product: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    var sum = product;
    if params.bias_at != NO_BIAS {
        sum += bias[params.bias_at + row];
    }
    if store_elsewhere(row, column, sum) {
        return;
    }
    let at = column * params.out_stride + params.first + row;
    if params.add != 0u {
        sum += out[at];
    }
    out[at] = sum;
}
