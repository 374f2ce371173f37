// Every element of a product is stored by a thread of its own.

fn source_row(tile: u32, v: u32) -> u32 {
    return tile * GROUP_ROWS + v;
}

fn end_of_product(tile: u32, first_batch_row: u32, index: u32) {
    if index < OUTPUTS {
        let v = index % GROUP_ROWS;
        let n = index / GROUP_ROWS;
        store(source_row(tile, v), first_batch_row + n, element(tile, v, n));
    }
}
