// IQ4_NL: d f16, 16 bytes of nibbles that are looked up. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + c * 18u;
    let w = words2(at + 2u);
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        chunk.q[k] = nonlinear(w[k]);
        chunk.q[k + 4u] = nonlinear(w[k] >> 4u);
    }
    chunk.scale = vec4<f32>(half(at));
    chunk.minimum = vec4<f32>();
    return chunk;
}
