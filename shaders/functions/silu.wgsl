// x / (1 + exp(-x)).
fn activated(x: vec4<f32>) -> vec4<f32> {
    // Far below zero exp(-x) would overflow; what is left of x is nothing there.
    return x / (1.0 + exp(min(-x, vec4<f32>(80.0))));
}
