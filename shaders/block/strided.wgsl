// Two-bit planes: a byte of a plane of 32 holds bits of four weights, 32 columns apart. A thread takes 16 of
// the bytes and, of each, the first and third weight or the second and fourth.
fn position(c: u32, i: u32) -> u32 {
    let j = c & 7u;
    return (c >> 3u) * 64u + (j >> 2u) * 32u + (i >> 2u) * 16u + ((j >> 1u) & 1u) * 8u + (j & 1u) * 4u
        + (i & 3u);
}

fn strided_chunk(low: vec4<u32>, high: vec4<u32>, scale: vec2<f32>, minimum: vec2<f32>) -> Chunk {
    return Chunk(array(low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w), scale, minimum);
}
