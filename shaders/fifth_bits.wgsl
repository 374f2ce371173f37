// Bits 4i to 4i + 3 of a word, each as bit 4 of a byte.
fn fifth_bits(word: u32, i: u32) -> u32 {
    let b = word >> (4u * i);
    return ((b & 1u) << 4u) | ((b & 2u) << 11u) | ((b & 4u) << 18u) | ((b & 8u) << 25u);
}
