// With rows that are written as bytes go the sums of the squares of their blocks of 32, as f32s behind the
// scales, an even number for each row: what factors/int8.wgsl reads.
fn square_block(row: u32, groups: u32, i: u32, inside: bool, x: vec4<f32>, index: u32) {
    // (Written out, so that no compiler chooses what is rounded.)
    let sum = sum8(fma(x.w, x.w, fma(x.z, x.z, fma(x.y, x.y, x.x * x.x))), index);
    let blocks = groups / 8u;
    if inside && i % 8u == 0u {
        let at = params.out_squares + row * ((blocks + 1u) / 2u * 2u) + i / 8u;
        rounded_scales[at] = sum;
        // An odd number is filled up.
        if i / 8u == blocks - 1u && blocks % 2u == 1u {
            rounded_scales[at + 1u] = 0.0;
        }
    }
}
