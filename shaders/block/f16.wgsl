// F16: a chunk is read where it is used. Rows may end within a group, and begin within a word.

struct Chunk { base: u32, column: u32 }

fn load(base: u32, c: u32) -> Chunk {
    return Chunk(base, c * 32u);
}

fn weights4(chunk: Chunk, i: u32) -> vec4<f32> {
    let column = chunk.column + 4u * i;
    var w = vec4<f32>();
    // (Two at a time: a row's last weight may be the buffer's, and `word2` allows for that.)
    if column < params.cols {
        w = vec4<f32>(unpack2x16float(word2(chunk.base + column * 2u)), 0.0, 0.0);
    }
    if column + 2u < params.cols {
        let more = unpack2x16float(word2(chunk.base + column * 2u + 4u));
        w = vec4<f32>(w.xy, more);
    }
    // What is past the end belongs to the next row, and may be anything.
    if column + 1u >= params.cols { w.y = 0.0; }
    if column + 3u >= params.cols { w.w = 0.0; }
    return w;
}
