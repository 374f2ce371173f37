// Q6_K: 128 bytes of nibbles, 64 bytes of 2-bit tops, 16 signed scales, d f16;
// weight = d scale (q - 32).
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 210u;
    let plane = (c >> 2u) & 1u;
    let t = c & 3u;
    let d = half(at + 208u);
    let nibbles = at + plane * 64u + t * 8u;
    let tops = at + 128u + plane * 32u + t * 8u;
    let top = vec2<u32>(word2(tops), word2(tops + 4u));
    let even = vec2<u32>(word2(nibbles), word2(nibbles + 4u));
    let odd = vec2<u32>(word2(nibbles + 32u), word2(nibbles + 36u));
    var chunk: Chunk;
    for (var a = 0u; a < 4u; a++) {
        let low = select(even, odd, (a & 1u) != 0u) >> vec2<u32>((a >> 1u) * 4u);
        let q = (low & vec2<u32>(0x0F0F0F0Fu))
            | (((top >> vec2<u32>(2u * a)) & vec2<u32>(0x03030303u)) << vec2<u32>(4u));
        chunk.q[2u * a] = q.x;
        chunk.q[2u * a + 1u] = q.y;
        // Sign-extended from eight bits.
        let s = bitcast<i32>(byte(at + 192u + plane * 8u + a * 2u + (t >> 1u)) << 24u) >> 24u;
        let scale = d * f32(s);
        chunk.scale[a] = scale;
        chunk.minimum[a] = -32.0 * scale;
    }
    return chunk;
}
