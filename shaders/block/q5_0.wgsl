// Q5_0: 16 bytes of nibbles | 4 bytes of fifth bits | d f16; weight = d (q - 16). A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let words = words4(base + c * 16u);
    let fifth = word(base + params.chunks * 16u + c * 4u);
    let d = half(base + params.chunks * 20u + c * 2u);
    return even_chunk(low_nibbles(words) | fifth_bits(fifth, 0u),
                      high_nibbles(words) | fifth_bits(fifth, 16u), d, -16.0 * d);
}
