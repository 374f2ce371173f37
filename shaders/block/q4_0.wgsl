// Q4_0: d f16, 16 bytes of nibbles; weight = d (q - 8). A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + c * 18u;
    let d = half(at);
    let w = words2(at + 2u);
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        chunk.q[k] = w[k] & 0x0F0F0F0Fu;
        chunk.q[k + 4u] = (w[k] >> 4u) & 0x0F0F0F0Fu;
    }
    chunk.scale = vec4<f32>(d);
    chunk.minimum = vec4<f32>(-8.0 * d);
    return chunk;
}
