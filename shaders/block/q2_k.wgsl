// Q2_K: 64 bytes of 2-bit values | 16 bytes of (scale, minimum) nibbles | d, dmin f16.
fn load(base: u32, c: u32) -> Chunk {
    let blocks = params.chunks >> 3u;
    let block = c >> 3u;
    let plane = (c >> 2u) & 1u;
    let a = (c >> 1u) & 1u;
    let t = c & 1u;
    let words = words4(base + block * 64u + plane * 32u + t * 16u) >> vec4<u32>(2u * a);
    let two = vec4<u32>(0x03030303u);
    let at = base + blocks * 64u + block * 16u + plane * 8u;
    let s = vec2<u32>(word(at), word(at + 4u)) >> vec2<u32>(16u * a + 8u * t);
    let dm = unpack2x16float(word(base + blocks * 80u + block * 4u));
    let scale = dm.x * vec2<f32>(s & vec2<u32>(15u));
    let minimum = -dm.y * vec2<f32>((s >> vec2<u32>(4u)) & vec2<u32>(15u));
    return strided_chunk(words & two, (words >> vec4<u32>(4u)) & two, scale, minimum);
}
