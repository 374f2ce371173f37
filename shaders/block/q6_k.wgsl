// Q6_K: 128 bytes of nibbles | 64 bytes of 2-bit tops | 16 signed scales | d f16;
// weight = d scale (q - 32).
fn load(base: u32, c: u32) -> Chunk {
    let blocks = params.chunks >> 3u;
    let block = c >> 3u;
    let plane = (c >> 2u) & 1u;
    let a = (c >> 1u) & 1u;
    let t = c & 1u;
    let words = words4(base + c * 16u);
    let tops = words4(base + blocks * 128u + block * 64u + plane * 32u + t * 16u) >> vec4<u32>(2u * a);
    let low = (tops & vec4<u32>(0x03030303u)) << vec4<u32>(4u);
    let high = tops & vec4<u32>(0x30303030u);
    // A byte of either word, sign-extended.
    let at = base + blocks * 192u + block * 16u + plane * 8u;
    let scales = bitcast<vec2<i32>>(vec2<u32>(word(at), word(at + 4u)) << vec2<u32>(24u - 16u * a - 8u * t));
    let scale = half(base + blocks * 208u + block * 2u) * vec2<f32>(scales >> vec2<u32>(24u));
    return strided_chunk(low_nibbles(words) | low, high_nibbles(words) | high, scale, -32.0 * scale);
}
