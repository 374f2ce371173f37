// IQ4_XS: 128 bytes of nibbles that are looked up | d f16, 2 bytes of high scale bits, 4 of low scale
// nibbles (scales stored + 32). A chunk is an eighth of a block.
fn load(base: u32, c: u32) -> Chunk {
    let words = words4(base + c * 16u);
    let at = base + params.chunks * 16u + (c >> 3u) * 8u;
    let j = c & 7u;
    let head = word(at);
    let low = (word(at + 4u) >> (4u * j)) & 15u;
    let high = (head >> (16u + 2u * j)) & 3u;
    let scale = unpack2x16float(head).x * f32(i32(low | (high << 4u)) - 32);
    return even_chunk(nonlinear4(words), nonlinear4(words >> vec4<u32>(4u)), scale, 0.0);
}
