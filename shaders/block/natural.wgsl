// Groups in the order of their columns: group i of chunk c begins at column 4 position(c, i).
fn position(c: u32, i: u32) -> u32 {
    return c * 8u + i;
}
