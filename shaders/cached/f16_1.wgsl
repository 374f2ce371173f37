// A cache in half precision, of which 1 pair of elements is read at once.

alias Cached = u32;

fn pair_of(words: Cached, p: u32) -> vec2<f32> {
    return unpack2x16float(words);
}
