// A function of x alone.
fn result(at: u32) -> vec4<f32> {
    return activated(x[at]);
}
