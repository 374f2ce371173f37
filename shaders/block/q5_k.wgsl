// Q5_K: as Q4_K, with 32 bytes of fifth bits before the nibbles.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 176u;
    let pair = (c >> 1u) & 3u;
    let dm = unpack2x16float(word(at));
    let fifth = at + 16u + (c & 1u) * 16u;
    let bytes = at + 48u + pair * 32u + (c & 1u) * 16u;
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        let w = word(bytes + 4u * k);
        let bits = word(fifth + 4u * k) >> (2u * pair);
        chunk.q[k] = (w & 0x0F0F0F0Fu) | ((bits & 0x01010101u) << 4u);
        chunk.q[k + 4u] = ((w >> 4u) & 0x0F0F0F0Fu) | (((bits >> 1u) & 0x01010101u) << 4u);
    }
    let low = six_bits(at + 4u, 2u * pair, dm);
    let high = six_bits(at + 4u, 2u * pair + 1u, dm);
    chunk.scale = vec4<f32>(low.x, low.x, high.x, high.x);
    chunk.minimum = vec4<f32>(low.y, low.y, high.y, high.y);
    return chunk;
}
