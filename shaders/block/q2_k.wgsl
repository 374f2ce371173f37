// Q2_K: 16 bytes of (scale, minimum) nibbles, 64 bytes of 2-bit values, d, dmin f16.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 84u;
    let plane = (c >> 2u) & 1u;
    let t = c & 3u;
    let dm = unpack2x16float(word(at + 80u));
    let bytes = at + 16u + plane * 32u + t * 8u;
    let w = vec2<u32>(word(bytes), word(bytes + 4u));
    var chunk: Chunk;
    for (var a = 0u; a < 4u; a++) {
        chunk.q[2u * a] = (w.x >> (2u * a)) & 0x03030303u;
        chunk.q[2u * a + 1u] = (w.y >> (2u * a)) & 0x03030303u;
        let s = byte(at + plane * 8u + a * 2u + (t >> 1u));
        chunk.scale[a] = dm.x * f32(s & 15u);
        chunk.minimum[a] = -dm.y * f32(s >> 4u);
    }
    return chunk;
}
