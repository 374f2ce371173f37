// Activations are left as they are.
fn round_block(row: u32, groups: u32, i: u32, inside: bool, values: vec4<f32>, index: u32) {}
