// F16. Rows are filled up with zeros to whole chunks.

struct Chunk { at: u32 }

fn load(base: u32, c: u32) -> Chunk {
    return Chunk(base + c * 64u);
}

fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    let at = chunk.at + 8u * i;
    return vec4<f32>(unpack2x16float(word(at)), unpack2x16float(word(at + 4u)));
}
