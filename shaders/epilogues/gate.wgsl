// gate = gated(x G^T, x U^T) (functions/), also as bytes: the rows of W are those of G and, behind them, those
// of U. A workgroup has 32 rows of each.

@group(0) @binding(4) var<storage, read_write> gate: array<vec4<f32>>;

fn source_row(tile: u32, v: u32) -> u32 {
    return tile * 32u + select(v, params.second + v - 32u, v >= 32u);
}

fn end_of_product(tile: u32, first_batch_row: u32, index: u32) {
    let my = my_four(tile, first_batch_row, index);
    var values = vec4<f32>();
    if my.inside {
        values = gated(four(tile, my.v, my.n), four(tile, 32u + my.v, my.n));
        gate[my.batch_row * my.groups + my.i] = values;
    }
    round_block(my.batch_row, my.groups, my.i, my.inside, values, index);
}
