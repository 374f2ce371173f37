// IQ4_NL: 16 bytes of nibbles that are looked up | d f16. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let words = words4(base + c * 16u);
    return even_chunk(nonlinear4(words), nonlinear4(words >> vec4<u32>(4u)),
                      half(base + params.chunks * 16u + c * 2u), 0.0);
}
