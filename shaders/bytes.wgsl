// Bytes of a matrix as they lie on the device (layout.rs): of each row of blocks first one part of all of
// them, then the next, in an order in which 16 bytes can be read at once. Rows begin at multiples of 16.

@group(0) @binding(0) var<storage, read> weights: array<vec4<u32>>;

// Four words that begin at a multiple of 16.
fn words4(at: u32) -> vec4<u32> {
    return weights[at >> 4u];
}

// A word that begins at a multiple of four.
fn word(at: u32) -> u32 {
    return weights[at >> 4u][(at >> 2u) & 3u];
}

// The f16 at a multiple of two.
fn half(at: u32) -> f32 {
    return unpack2x16float(word(at) >> ((at & 2u) << 3u)).x;
}
