// A gate applied to what it gates.
fn result(at: u32) -> vec4<f32> {
    return gated(x[at], y[at]);
}
