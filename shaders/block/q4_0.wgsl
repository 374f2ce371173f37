// Q4_0: 16 bytes of nibbles | d f16; weight = d (q - 8). A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let words = words4(base + c * 16u);
    let d = half(base + params.chunks * 16u + c * 2u);
    return even_chunk(low_nibbles(words), high_nibbles(words), d, -8.0 * d);
}
