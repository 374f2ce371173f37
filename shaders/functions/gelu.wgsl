// x/2 erfc(-x / sqrt 2), with erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z) for z >= 0
// (Abramowitz and Stegun 1964, 7.1.26; it errs by 1.5e-7 at most).
fn activated(x: vec4<f32>) -> vec4<f32> {
    let z = abs(x) * 0.7071067812;
    let t = 1.0 / (1.0 + 0.3275911 * z);
    let sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    let upper = sum * exp(-z * z);
    return 0.5 * x * select(upper, 2.0 - upper, x >= vec4<f32>());
}
