// Bytes of a matrix as it lies in its file. Blocks are a multiple of two bytes long, so some begin
// in the middle of a word. A buffer is longer than its bytes, so that the word behind the last can
// be read.

@group(0) @binding(0) var<storage, read> weights: array<u32>;

// A word that begins at a multiple of four.
fn word(at: u32) -> u32 {
    return weights[at >> 2u];
}

// A word that begins at a multiple of two.
fn word2(at: u32) -> u32 {
    let i = at >> 2u;
    let low = weights[i];
    return select(low, (low >> 16u) | (weights[i + 1u] << 16u), (at & 2u) != 0u);
}

// Four words that begin at a multiple of two.
fn words2(at: u32) -> vec4<u32> {
    let i = at >> 2u;
    let low = vec4<u32>(weights[i], weights[i + 1u], weights[i + 2u], weights[i + 3u]);
    if (at & 2u) == 0u {
        return low;
    }
    let high = vec4<u32>(low.yzw, weights[i + 4u]);
    return (low >> vec4<u32>(16u)) | (high << vec4<u32>(16u));
}

fn byte(at: u32) -> u32 {
    return (weights[at >> 2u] >> ((at & 3u) << 3u)) & 255u;
}

// The f16 at a multiple of two.
fn half(at: u32) -> f32 {
    return unpack2x16float(weights[at >> 2u] >> ((at & 2u) << 3u)).x;
}
