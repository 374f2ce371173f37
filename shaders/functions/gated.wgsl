// f(g) u.
fn gated(g: vec4<f32>, u: vec4<f32>) -> vec4<f32> {
    return activated(g) * u;
}
