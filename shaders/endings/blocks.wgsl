// Eight threads have a block of 32 of a row of results, four each.
struct Four {
    // The column of the workgroup, and the row of results.
    n: u32,
    column: u32,
    // Whether it is there.
    inside: bool,
    // Its first row of the workgroup, its place in the row, and the places of a row.
    v: u32,
    i: u32,
    groups: u32,
}

fn my_four(tile: u32, first_column: u32, index: u32) -> Four {
    let n = index / 8u;
    let column = first_column + n;
    let inside = n < COLUMNS && column < params.columns;
    return Four(n, column, inside, 4u * (index % 8u), tile * 8u + index % 8u, params.out_stride / 4u);
}
