// Paired nibbles: a thread takes 16 of the bytes of two sub-blocks of 32; low nibbles are in the
// first, high nibbles in the second.
fn position(c: u32, i: u32) -> u32 {
    let j = c & 7u;
    return (c >> 3u) * 64u + (j >> 1u) * 16u + (i >> 2u) * 8u + (j & 1u) * 4u + (i & 3u);
}
