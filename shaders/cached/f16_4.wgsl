// A cache in half precision, of which 4 pairs of elements are read at once.

alias Cached = vec4<u32>;

fn pair_of(words: Cached, p: u32) -> vec2<f32> {
    return unpack2x16float(words[p]);
}
