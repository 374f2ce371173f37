// Q8_0: 32 signed bytes | d f16; weight = d q. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + c * 32u;
    return even_chunk(words4(at), words4(at + 16u), half(base + params.chunks * 32u + c * 2u), 0.0);
}
