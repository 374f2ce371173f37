// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
fn activated(x: vec4<f32>) -> vec4<f32> {
    let inner = 0.7978845608 * (x + 0.044715 * x * x * x);
    // (The argument is bounded: tanh of large numbers is not a number on some devices.)
    return 0.5 * x * (1.0 + tanh(clamp(inner, vec4<f32>(-16.0), vec4<f32>(16.0))));
}
