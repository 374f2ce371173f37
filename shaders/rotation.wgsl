// Rotary positions (Su et al. 2021, eq. 34): a pair is turned by its row's angle.

// The cosine and sine of a pair of a row.
fn rotation(row: u32, pair: u32) -> vec2<f32> {
    let at = params.rotations_at + (row * params.pairs + pair) * 2u;
    return vec2<f32>(bitcast<f32>(data[at]), bitcast<f32>(data[at + 1u]));
}

// (Written out, so that no compiler chooses what is rounded.)
fn rotate(x: vec2<f32>, r: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(fma(x.x, r.x, -(x.y * r.y)), fma(x.x, r.y, x.y * r.x));
}
