// Q3_K: 32 bytes of high bits, 64 bytes of 2-bit values, 12 bytes of 6-bit scales (stored + 32),
// d f16; weight = d scale (q - 4).
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 110u;
    let plane = (c >> 2u) & 1u;
    let t = c & 3u;
    let d = half(at + 108u);
    let bytes = at + 32u + plane * 32u + t * 8u;
    let w = vec2<u32>(word2(bytes), word2(bytes + 4u));
    let high = vec2<u32>(word2(at + t * 8u), word2(at + t * 8u + 4u));
    var chunk: Chunk;
    for (var a = 0u; a < 4u; a++) {
        let bit = plane * 4u + a;
        let q = ((w >> vec2<u32>(2u * a)) & vec2<u32>(0x03030303u))
            | (((high >> vec2<u32>(bit)) & vec2<u32>(0x01010101u)) << vec2<u32>(2u));
        chunk.q[2u * a] = q.x;
        chunk.q[2u * a + 1u] = q.y;
        let j = plane * 8u + a * 2u + (t >> 1u);
        let low = (byte(at + 96u + (j & 7u)) >> ((j >> 3u) * 4u)) & 15u;
        let top = (byte(at + 104u + (j & 3u)) >> ((j >> 2u) * 2u)) & 3u;
        let scale = d * f32(i32(low | (top << 4u)) - 32);
        chunk.scale[a] = scale;
        chunk.minimum[a] = -4.0 * scale;
    }
    return chunk;
}
