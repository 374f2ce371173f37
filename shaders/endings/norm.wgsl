// out += x W^T + bias, and what products make the norm of out from: its elements times the norm's weights,
// as bytes, and the sums of its squares (rounded/squares.wgsl). A workgroup has a block of 32 rows of
// W, of which eight threads have four each.

@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> norm: array<vec4<f32>>;

fn source_row(tile: u32, v: u32) -> u32 {
    return tile * GROUP_ROWS + v;
}

fn end_of_product(tile: u32, first_column: u32, index: u32) {
    let n = index / 8u;
    let column = first_column + n;
    let inside = n < COLUMNS && column < params.columns;
    // Groups of four of a row of out.
    let groups = params.out_stride >> 2u;
    let i = tile * 8u + index % 8u;
    var values = vec4<f32>();
    if inside {
        for (var k = 0u; k < 4u; k++) {
            let v = 4u * (index % 8u) + k;
            values[k] = element(v, n, bias_of(4u * i + k));
        }
        values += out[column * groups + i];
        out[column * groups + i] = values;
    }
    square_block(column, groups, i, inside, values, index);
    if inside {
        values *= norm[i];
    }
    round_block(column, groups, i, inside, values, index);
}
