// silu(g) u.
fn swiglu(g: vec4<f32>, u: vec4<f32>) -> vec4<f32> {
    // Far below zero exp(-g) would overflow; what is left of g is nothing there.
    return g / (1.0 + exp(min(-g, vec4<f32>(80.0)))) * u;
}
