// BF16: the upper half of an f32. Rows may end within a group, and begin within a word.

struct Chunk { base: u32, column: u32 }

fn load(base: u32, c: u32) -> Chunk {
    return Chunk(base, c * 32u);
}

fn weight(chunk: Chunk, column: u32) -> f32 {
    if column >= params.cols {
        return 0.0;
    }
    let at = chunk.base + column * 2u;
    return bitcast<f32>((word(at) >> ((at & 2u) << 3u)) << 16u);
}

fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    let column = chunk.column + 4u * i;
    return vec4<f32>(weight(chunk, column), weight(chunk, column + 1u),
                     weight(chunk, column + 2u), weight(chunk, column + 3u));
}
