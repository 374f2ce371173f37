// Q4_K: d, dmin f16, 12 bytes of 6-bit scales and minima, 128 bytes of paired nibbles.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 144u;
    let pair = (c >> 1u) & 3u;
    let dm = unpack2x16float(word(at));
    let bytes = at + 16u + pair * 32u + (c & 1u) * 16u;
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        let w = word(bytes + 4u * k);
        chunk.q[k] = w & 0x0F0F0F0Fu;
        chunk.q[k + 4u] = (w >> 4u) & 0x0F0F0F0Fu;
    }
    let low = six_bits(at + 4u, 2u * pair, dm);
    let high = six_bits(at + 4u, 2u * pair + 1u, dm);
    chunk.scale = vec4<f32>(low.x, low.x, high.x, high.x);
    chunk.minimum = vec4<f32>(low.y, low.y, high.y, high.y);
    return chunk;
}
