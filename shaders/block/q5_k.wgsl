// Q5_K, as it lies in its file: as Q4_K, with 32 bytes of fifth bits before the nibbles.
fn load(base: u32, c: u32) -> Chunk {
    let at = base + (c >> 3u) * 176u;
    let pair = (c >> 1u) & 3u;
    let words = words4(at + 48u + (c & 7u) * 16u);
    let fifth = words4(at + 16u + (c & 1u) * 16u) >> vec4<u32>(2u * pair);
    let low = (fifth & vec4<u32>(0x01010101u)) << vec4<u32>(4u);
    let high = (fifth & vec4<u32>(0x02020202u)) << vec4<u32>(3u);
    return paired_chunk(words4(at), pair, low_nibbles(words) | low, high_nibbles(words) | high);
}
