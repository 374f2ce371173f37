// Eight threads have a block of 32 of a row of results, four each.
struct Four {
    // The batch_row of the workgroup, and the row of results.
    n: u32,
    batch_row: u32,
    // Whether it is there.
    inside: bool,
    // Its first row of the workgroup, its place in the row, and the places of a row.
    v: u32,
    i: u32,
    groups: u32,
}

fn my_four(tile: u32, first_batch_row: u32, index: u32) -> Four {
    let n = index / 8u;
    let batch_row = first_batch_row + n;
    let inside = n < BATCH_ROWS && batch_row < params.batch_rows;
    return Four(n, batch_row, inside, 4u * (index % 8u), tile * 8u + index % 8u, params.out_stride / 4u);
}
