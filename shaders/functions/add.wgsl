// x + alpha y.
fn result(at: u32) -> vec4<f32> {
    return fma(vec4<f32>(params.alpha), y[at], x[at]);
}
