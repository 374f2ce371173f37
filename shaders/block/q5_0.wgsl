// Q5_0: d f16, 4 bytes of fifth bits, 16 bytes of nibbles; weight = d (q - 16). A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + c * 22u;
    let d = half(at);
    let fifth = word2(at + 2u);
    let w = words2(at + 6u);
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        chunk.q[k] = (w[k] & 0x0F0F0F0Fu) | fifth_bits(fifth, k);
        chunk.q[k + 4u] = ((w[k] >> 4u) & 0x0F0F0F0Fu) | fifth_bits(fifth, k + 4u);
    }
    chunk.scale = vec4<f32>(d);
    chunk.minimum = vec4<f32>(-16.0 * d);
    return chunk;
}
