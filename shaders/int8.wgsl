// Rows of activations as blocks of 32 signed bytes, for products: of a row first the first halves of its
// blocks, then the second ones, so that threads side by side read what lies side by side. With each
// block its scale, and the sums of its halves: the first plus HALF times the second, which no f32 rounds.

const HALF = 4096.0;

// Where group i of a row of `blocks` blocks is, in groups of four bytes.
fn byte_group(blocks: u32, i: u32) -> u32 {
    return ((i >> 2u) & 1u) * blocks * 4u + (i >> 3u) * 4u + (i & 3u);
}

// The sum of the words that share a scale, of which the first is group i: all eight of a block, or a half of them.
fn sum_of_words(sums: f32, i: u32) -> i32 {
    let both = i32(sums);
    let second = (both + 2048) >> 12u;
    let first = both - (second << 12u);
    if WORDS == 8u {
        return first + second;
    }
    return select(first, second, (i & 4u) != 0u);
}
