//! Plain floating-point weights.

use half::{bf16, f16};

pub(super) fn f32s(bytes: &[u8], out: &mut [f32]) {
    for (b, x) in bytes.chunks_exact(4).zip(out) {
        *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
}

pub(super) fn f16s(bytes: &[u8], out: &mut [f32]) {
    for (b, x) in bytes.chunks_exact(2).zip(out) {
        *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
    }
}

pub(super) fn bf16s(bytes: &[u8], out: &mut [f32]) {
    for (b, x) in bytes.chunks_exact(2).zip(out) {
        *x = bf16::from_le_bytes([b[0], b[1]]).to_f32();
    }
}
