// max(x, 0).
fn activated(x: vec4<f32>) -> vec4<f32> {
    // (What is not a number stays so, which `max` does not promise.)
    return select(x, vec4<f32>(), x < vec4<f32>());
}
