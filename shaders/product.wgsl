// What all products share: out = x W^T + bias, or added to out.
//
// A row of W is cut into RANGES ranges of chunks, each of which LANES lanes share: lane l adds up the
// chunks l, l + LANES, ... of a range, in that order and each chunk's weights in one order; the lanes
// are added by a fixed tree (distances 4, 2, 1), then the ranges in their order. So an element of out
// is the same bits for any number of rows of x, in whichever frame.

struct Params {
    // Elements of a row of W, and chunks of 32 of them.
    cols: u32,
    chunks: u32,
    // Bytes of a row of W, and its rows.
    row_bytes: u32,
    rows: u32,
    // Rows of x.
    columns: u32,
    // Groups of four (in bytes: blocks of 32) of a row of x; f32s of a row of out.
    x_stride: u32,
    out_stride: u32,
    // The element of out that row 0 of W is.
    first: u32,
    // Whether there is a bias, and whether out is added to.
    has_bias: u32,
    add: u32,
}

@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const LANES = 8u;

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
    return min(row, params.rows - 1u) * params.row_bytes;
}

fn store(row: u32, column: u32, product: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    var sum = product;
    if params.has_bias != 0u {
        sum += bias[params.first + row];
    }
    let at = column * params.out_stride + params.first + row;
    if params.add != 0u {
        sum += out[at];
    }
    out[at] = sum;
}
