// Q4_K, as it lies in its file: d, dmin f16, 12 bytes of 6-bit scales and minima, 128 bytes of paired
// nibbles.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 144u;
    let words = words4(at + 16u + (c & 7u) * 16u);
    return paired_chunk(words4(at), (c >> 1u) & 3u, low_nibbles(words), high_nibbles(words));
}
