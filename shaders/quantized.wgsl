// What the block files of quantized types share: a *chunk* is the 32 weights that one thread takes at
// a time, as eight groups of four.

struct Chunk {
    // Four signed bytes each.
    q: array<u32, 8>,
    // weight = q scale + minimum, for two groups each.
    scale: vec4<f32>,
    minimum: vec4<f32>,
}

// The four weights of group i.
fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    let q = vec4<f32>(unpack4xI8(chunk.q[i]));
    return fma(q, vec4<f32>(chunk.scale[i >> 1u]), vec4<f32>(chunk.minimum[i >> 1u]));
}
