// What a nibble of the IQ4 types stands for: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113,
// four to a word.
fn nonlinear(nibbles: u32) -> u32 {
    let table = vec4<u32>(0xBFAD9881u, 0xF6EADDCFu, 0x26190D01u, 0x71594535u);
    var out = 0u;
    for (var k = 0u; k < 32u; k += 8u) {
        let n = (nibbles >> k) & 15u;
        out |= ((table[n >> 2u] >> ((n & 3u) << 3u)) & 255u) << k;
    }
    return out;
}

fn nonlinear4(nibbles: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(nonlinear(nibbles.x), nonlinear(nibbles.y), nonlinear(nibbles.z),
                     nonlinear(nibbles.w));
}
