// Q5_1: 16 bytes of nibbles | d, m f16, 4 bytes of fifth bits; weight = d q + m. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let words = words4(base + c * 16u);
    let head = base + params.chunks * 16u + c * 8u;
    let dm = unpack2x16float(word(head));
    let fifth = word(head + 4u);
    return even_chunk(low_nibbles(words) | fifth_bits(fifth, 0u),
                      high_nibbles(words) | fifth_bits(fifth, 16u), dm.x, dm.y);
}
