// What the block files of quantized types share: a *chunk* is the 32 weights that one thread takes at
// a time, as eight groups of four.

struct Chunk {
    // Four signed bytes each.
    q: array<u32, 8>,
    // weight = q scale + minimum, for four groups each.
    scale: vec2<f32>,
    minimum: vec2<f32>,
}

// A chunk whose weights have one scale and one minimum.
fn even_chunk(low: vec4<u32>, high: vec4<u32>, scale: f32, minimum: f32) -> Chunk {
    return Chunk(array(low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w),
                 vec2<f32>(scale), vec2<f32>(minimum));
}

// The low nibbles of four words, and the high ones.
fn low_nibbles(words: vec4<u32>) -> vec4<u32> {
    return words & vec4<u32>(0x0F0F0F0Fu);
}

fn high_nibbles(words: vec4<u32>) -> vec4<u32> {
    return (words >> vec4<u32>(4u)) & vec4<u32>(0x0F0F0F0Fu);
}

// The four weights of group i.
fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    let q = vec4<f32>(unpack4xI8(chunk.q[i]));
    return fma(q, vec4<f32>(chunk.scale[i >> 2u]), vec4<f32>(chunk.minimum[i >> 2u]));
}
