// A cache in single precision, of which 1 pair of elements is read at once.

alias Cached = vec2<f32>;

fn pair_of(floats: Cached, p: u32) -> vec2<f32> {
    return floats;
}
