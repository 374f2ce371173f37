// F32. Rows are filled up with zeros to whole chunks.

struct Chunk { at: u32 }

fn load(base: u32, c: u32) -> Chunk {
    return Chunk(base + c * 128u);
}

fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(words4(chunk.at + 16u * i));
}
