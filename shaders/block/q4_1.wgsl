// Q4_1: 16 bytes of nibbles | d, m f16; weight = d q + m. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let words = words4(base + c * 16u);
    let dm = unpack2x16float(word(base + params.chunks * 16u + c * 4u));
    return even_chunk(low_nibbles(words), high_nibbles(words), dm.x, dm.y);
}
