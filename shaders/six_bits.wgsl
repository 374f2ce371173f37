// A chunk of Q4_K or Q5_K: `head` is the first 16 bytes of its block: d and dmin, then the 6-bit scales and
// minima of eight sub-blocks; `low` and `high` are weights of sub-blocks 2 pair and 2 pair + 1.
fn paired_chunk(head: vec4<u32>, pair: u32, low: vec4<u32>, high: vec4<u32>) -> Chunk {
    let dm = unpack2x16float(head.x);
    // Two sub-blocks in two bytes each: scales, minima, and what the last four have of both.
    let parts = head.yzw >> vec3<u32>((pair & 1u) * 16u);
    var scales = parts.x & 0x3F3Fu;
    var minima = parts.y & 0x3F3Fu;
    if pair >= 2u {
        scales = (parts.z & 0x0F0Fu) | ((parts.x >> 2u) & 0x3030u);
        minima = ((parts.z >> 4u) & 0x0F0Fu) | ((parts.y >> 2u) & 0x3030u);
    }
    return Chunk(array(low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w),
                 dm.x * vec2<f32>(f32(scales & 255u), f32(scales >> 8u)),
                 -dm.y * vec2<f32>(f32(minima & 255u), f32(minima >> 8u)));
}
