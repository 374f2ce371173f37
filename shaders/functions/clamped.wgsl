// g / (1 + exp(-alpha g)) (u + 1), with g at most limit and u within +-limit (gpt-oss).
fn gated(g: vec4<f32>, u: vec4<f32>) -> vec4<f32> {
    let limit = vec4<f32>(params.limit);
    let most = min(g, limit);
    return most / (1.0 + exp(min(-params.alpha * most, vec4<f32>(80.0)))) * (clamp(u, -limit, limit) + 1.0);
}
