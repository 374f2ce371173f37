// gate = silu(x G^T) * x U^T, also as bytes: the rows of W are those of G and, behind them, those of U. A workgroup
// has 32 rows of each, of which eight threads have four each.

@group(0) @binding(4) var<storage, read_write> gate: array<vec4<f32>>;

fn source_row(tile: u32, v: u32) -> u32 {
    return tile * 32u + select(v, params.second + v - 32u, v >= 32u);
}

fn end_of_product(tile: u32, first_column: u32, index: u32) {
    let n = index / 8u;
    let column = first_column + n;
    let inside = n < COLUMNS && column < params.columns;
    // Groups of four of a row of gate.
    let groups = params.out_stride >> 2u;
    let i = tile * 8u + index % 8u;
    var values = vec4<f32>();
    if inside {
        var up = vec4<f32>();
        for (var k = 0u; k < 4u; k++) {
            let v = 4u * (index % 8u) + k;
            values[k] = element(v, n, bias_of(4u * i + k));
            up[k] = element(32u + v, n, bias_of(params.second + 4u * i + k));
        }
        values = swiglu(values, up);
        gate[column * groups + i] = values;
    }
    round_block(column, groups, i, inside, values, index);
}
