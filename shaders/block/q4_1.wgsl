// Q4_1: d, m f16, 16 bytes of nibbles; weight = d q + m. A chunk is a block.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + c * 20u;
    let dm = unpack2x16float(word(at));
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        let w = word(at + 4u + 4u * k);
        chunk.q[k] = w & 0x0F0F0F0Fu;
        chunk.q[k + 4u] = (w >> 4u) & 0x0F0F0F0Fu;
    }
    chunk.scale = vec4<f32>(dm.x);
    chunk.minimum = vec4<f32>(dm.y);
    return chunk;
}
