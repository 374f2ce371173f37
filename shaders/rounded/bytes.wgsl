// Activations are also written as blocks of 32 signed bytes (int8.wgsl), as quantize.wgsl does it, for
// the products that follow: eight threads have a block. `i` is a group of four of a row of so many.
// All threads of a workgroup come here together.
fn round_block(row: u32, groups: u32, i: u32, inside: bool, values: vec4<f32>, index: u32) {
    let most = max(max(abs(values.x), abs(values.y)), max(abs(values.z), abs(values.w)));
    let d = max8(most, index) / 127.0;
    var inverse = 0.0;
    if d > 0.0 {
        inverse = 1.0 / d;
    }
    let packed = pack4xI8(vec4<i32>(round(values * inverse)));
    let sums = sum8(f32(dot4I8Packed(0x01010101u, packed)) * select(1.0, HALF, (i & 4u) != 0u), index);
    if inside {
        rounded_bytes[row * groups + byte_group(groups / 8u, i)] = packed;
        if i % 8u == 0u {
            let at = (row * groups + i) / 4u;
            rounded_scales[at] = d;
            rounded_scales[at + 1u] = sums;
        }
    }
}
