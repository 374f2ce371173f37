// A cache in single precision, of which 2 pairs of elements are read at once.

alias Cached = vec4<f32>;

fn pair_of(floats: Cached, p: u32) -> vec2<f32> {
    return select(floats.xy, floats.zw, p == 1u);
}
