// The 6-bit scale and minimum of sub-block j (of 8) of a Q4_K or Q5_K block whose twelve packed
// bytes begin at `at`, times d and -dmin.
fn six_bits(at: u32, j: u32, dm: vec2<f32>) -> vec2<f32> {
    var scale = byte(at + j);
    var minimum = byte(at + j + 4u);
    if j < 4u {
        scale &= 63u;
        minimum &= 63u;
    } else {
        // The byte with both low nibbles; the high bits are on top of the first eight bytes.
        let low = minimum;
        let top = byte(at + j - 4u) >> 6u;
        minimum = (low >> 4u) | ((scale >> 6u) << 4u);
        scale = (low & 15u) | (top << 4u);
    }
    return vec2<f32>(dm.x * f32(scale), -dm.y * f32(minimum));
}
