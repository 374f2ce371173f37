// out += x W^T + bias, and what products make the norm of out from: its elements times the norm's weights,
// as bytes, and the sums of its squares (rounded/squares.wgsl). A workgroup has a block of 32 rows of W.

@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> norm: array<vec4<f32>>;

fn source_row(tile: u32, v: u32) -> u32 {
    return tile * GROUP_ROWS + v;
}

fn end_of_product(tile: u32, first_batch_row: u32, index: u32) {
    let my = my_four(tile, first_batch_row, index);
    let at = my.batch_row * my.groups + my.i;
    var values = vec4<f32>();
    if my.inside {
        values = four(tile, my.v, my.n) + out[at];
        out[at] = values;
    }
    square_block(my.batch_row, my.groups, my.i, my.inside, values, index);
    if my.inside {
        values *= norm[my.i];
    }
    round_block(my.batch_row, my.groups, my.i, my.inside, values, index);
}
