// IQ4_XS: d f16, 2 bytes of high scale bits, 4 of low scale nibbles (scales stored + 32), 128 bytes
// of nibbles that are looked up.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 136u;
    let j = c & 7u;
    let head = word(at);
    let low = (word(at + 4u) >> (4u * j)) & 15u;
    let high = (head >> (16u + 2u * j)) & 3u;
    let d = unpack2x16float(head).x;
    var chunk: Chunk;
    for (var k = 0u; k < 4u; k++) {
        let w = word(at + 8u + j * 16u + 4u * k);
        chunk.q[k] = nonlinear(w);
        chunk.q[k + 4u] = nonlinear(w >> 4u);
    }
    chunk.scale = vec4<f32>(d * f32(i32(low | (high << 4u)) - 32));
    chunk.minimum = vec4<f32>();
    return chunk;
}
