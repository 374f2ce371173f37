// BF16: the upper half of an f32. Rows are filled up with zeros to whole chunks.

struct Chunk { at: u32 }

fn load(base: u32, c: u32) -> Chunk {
    return Chunk(base + c * 64u);
}

fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    let at = chunk.at + 8u * i;
    let pairs = vec2<u32>(word(at), word(at + 4u));
    return bitcast<vec4<f32>>(vec4<u32>(pairs.x << 16u, pairs.x & 0xFFFF0000u,
                                        pairs.y << 16u, pairs.y & 0xFFFF0000u));
}
