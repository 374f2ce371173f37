// Q8_0: d f16, 32 signed bytes; weight = d q. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + c * 34u;
    let low = words2(at + 2u);
    let high = words2(at + 18u);
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        chunk.q[k] = low[k];
        chunk.q[k + 4u] = high[k];
    }
    chunk.scale = vec4<f32>(half(at));
    chunk.minimum = vec4<f32>();
    return chunk;
}
