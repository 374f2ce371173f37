// alpha x.
fn result(at: u32) -> vec4<f32> {
    return params.alpha * x[at];
}
