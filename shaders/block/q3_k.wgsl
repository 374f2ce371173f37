// Q3_K: 64 bytes of 2-bit values | 32 bytes of high bits | 12 bytes of 6-bit scales (stored + 32) | d f16;
// weight = d scale (q - 4).
fn load(base: u32, c: u32) -> Chunk {
    let blocks = params.chunks >> 3u;
    let block = c >> 3u;
    let plane = (c >> 2u) & 1u;
    let a = (c >> 1u) & 1u;
    let t = c & 1u;
    let words = words4(base + block * 64u + plane * 32u + t * 16u) >> vec4<u32>(2u * a);
    let tops = words4(base + blocks * 64u + block * 32u + t * 16u) >> vec4<u32>(4u * plane + a);
    let two = vec4<u32>(0x03030303u);
    let one = vec4<u32>(0x01010101u);
    let low = (words & two) | ((tops & one) << vec4<u32>(2u));
    let high = ((words >> vec4<u32>(4u)) & two) | (((tops >> vec4<u32>(2u)) & one) << vec4<u32>(2u));
    let at = base + blocks * 96u + block * 12u;
    let shift = 16u * a + 8u * t + 4u * plane;
    let top = word(at + 8u) >> shift;
    let scales = vec2<u32>(((word(at) >> shift) & 15u) | ((top & 3u) << 4u),
                           ((word(at + 4u) >> shift) & 15u) | ((top & 12u) << 2u));
    let scale = half(base + blocks * 108u + block * 2u) * vec2<f32>(vec2<i32>(scales) - 32);
    return strided_chunk(low, high, scale, -4.0 * scale);
}
