//! Super-blocks of 256 weights whose sub-blocks have quantized scales: Q2_K to Q6_K.

use super::f16_at;

/// The 6-bit scale and minimum of sub-block `j` (of 8) of a Q4_K or Q5_K block, from the twelve
/// bytes in which they are packed: the first four pairs lie in the low six bits of bytes 0..4
/// (scales) and 4..8 (minima); the last four have their low nibbles in bytes 8..12 and their two
/// high bits on top of the first eight bytes.
pub fn k4_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

/// The sixteen scales of a Q3_K block, -32..31, from the twelve bytes in which they are packed:
/// nibbles of scales 0..8 low and 8..16 high in bytes 0..8, two more bits in bytes 8..12.
pub fn q3_k_scales(packed: &[u8]) -> [i8; 16] {
    std::array::from_fn(|j| {
        let nibble = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
        let high = packed[8 + j % 4] >> (2 * (j / 4)) & 3;
        (nibble | high << 4) as i8 - 32
    })
}

/// 16 bytes of (scale, minimum) nibbles, 64 bytes of 2-bit values, `d`, `dmin` f16;
/// weight = d scale q - dmin minimum, for 16 sub-blocks of 16.
pub(super) fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, q) = (&block[..16], &block[16..80]);
    let (d, dmin) = (f16_at(&block[80..]), f16_at(&block[82..]));
    for (i, x) in out.iter_mut().enumerate() {
        // Each half of 128 weights has 32 bytes; a byte holds four weights, 32 apart.
        let byte = q[i / 128 * 32 + i % 32];
        let value = byte >> (i % 128 / 32 * 2) & 3;
        let scale = scales[i / 16];
        *x = d * f32::from(scale & 15) * f32::from(value) - dmin * f32::from(scale >> 4);
    }
}

/// 32 bytes of high bits, 64 bytes of 2-bit values, 12 bytes of scales, `d` f16;
/// weight = d scale (q - 4), for 16 sub-blocks of 16.
pub(super) fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, q) = (&block[..32], &block[32..96]);
    let scales = q3_k_scales(&block[96..108]);
    let d = f16_at(&block[108..]);
    for (i, x) in out.iter_mut().enumerate() {
        let low = q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        let bit = high[i % 32] >> (i / 32) & 1;
        let value = (low | bit << 2) as i8 - 4;
        *x = d * f32::from(scales[i / 16]) * f32::from(value);
    }
}

/// `d`, `dmin` f16, 12 bytes of scales and minima, 128 bytes of nibbles;
/// weight = d scale q - dmin minimum, for 8 sub-blocks of 32.
pub(super) fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block), f16_at(&block[2..]));
    let (packed, q) = (&block[4..16], &block[16..144]);
    for (i, x) in out.iter_mut().enumerate() {
        let (scale, minimum) = k4_scale_min(packed, i / 32);
        // 32 bytes hold 64 weights: a byte's low half is in one sub-block, its high half in the next.
        let value = q[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15;
        *x = d * f32::from(scale) * f32::from(value) - dmin * f32::from(minimum);
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles.
pub(super) fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block), f16_at(&block[2..]));
    let (packed, high, q) = (&block[4..16], &block[16..48], &block[48..176]);
    for (i, x) in out.iter_mut().enumerate() {
        let (scale, minimum) = k4_scale_min(packed, i / 32);
        let low = q[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15;
        let value = low | (high[i % 32] >> (i / 32) & 1) << 4;
        *x = d * f32::from(scale) * f32::from(value) - dmin * f32::from(minimum);
    }
}

/// 128 bytes of nibbles, 64 bytes of 2-bit tops, 16 signed scales, `d` f16;
/// weight = d scale (q - 32), for 16 sub-blocks of 16.
pub(super) fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = f16_at(&block[208..]);
    for (i, x) in out.iter_mut().enumerate() {
        let (half, at) = (i / 128, i % 128);
        let nibble = low[half * 64 + at % 64] >> (at / 64 * 4) & 15;
        let top = high[half * 32 + at % 32] >> (at / 32 * 2) & 3;
        let value = (nibble | top << 4) as i8 - 32;
        *x = d * f32::from(scales[i / 16] as i8) * f32::from(value);
    }
}
