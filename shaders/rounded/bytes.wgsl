// Activations are also written as blocks of 32 signed bytes with a scale, as quantize.wgsl does it, for
// the products that follow: eight threads have a block. `at` is a group of four of the whole buffer.
// All threads of a workgroup come here together.
fn round_block(at: u32, inside: bool, values: vec4<f32>, index: u32) {
    let most = max(max(abs(values.x), abs(values.y)), max(abs(values.z), abs(values.w)));
    let d = max8(most, index) / 127.0;
    var inverse = 0.0;
    if d > 0.0 {
        inverse = 1.0 / d;
    }
    if inside {
        bytes[at] = pack4xI8(vec4<i32>(round(values * inverse)));
        if at % 8u == 0u {
            scales[at / 8u] = d;
        }
    }
}
