// Two-bit planes: a thread takes 8 of the bytes of a plane of 32; a byte holds bits of four
// weights, 32 columns apart.
fn position(c: u32, i: u32) -> u32 {
    let j = c & 7u;
    return (c >> 3u) * 64u + (j >> 2u) * 32u + (i >> 1u) * 8u + (j & 3u) * 2u + (i & 1u);
}
