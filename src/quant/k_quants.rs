//! Super-blocks of 256 weights whose sub-blocks have quantized scales: Q2_K to Q6_K.

use std::array::from_fn;

/// The 6-bit scale and minimum of sub-block `j` (of 8) of a Q4_K or Q5_K block, from the twelve
/// bytes in which they are packed: the first four pairs lie in the low six bits of bytes 0..4
/// (scales) and 4..8 (minima); the last four have their low nibbles in bytes 8..12 and their two
/// high bits on top of the first eight bytes.
fn k4_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

/// What a K block says beside its values: weight = d scale (q - offset) - dmin minimum.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SuperScales {
    /// The scale of the scales.
    pub d: half::f16,
    /// The scale of the minima; 0 for types without.
    pub dmin: half::f16,
    /// One scale for each sub-block: 16 of 16 weights, or 8 of 32 in the first half of the array.
    pub scales: [i8; 16],
    /// One minimum for each sub-block, likewise.
    pub minima: [u8; 16],
}

fn half_at(bytes: &[u8]) -> half::f16 {
    half::f16::from_le_bytes([bytes[0], bytes[1]])
}

/// 16 bytes of (scale, minimum) nibbles, 64 bytes of 2-bit values, `d`, `dmin` f16;
/// 16 sub-blocks, offset 0.
pub(super) fn q2_k(block: &[u8], values: &mut [u8]) {
    two_bits(&block[16..80], values);
}

pub(super) fn q2_k_scales(block: &[u8]) -> SuperScales {
    SuperScales {
        d: half_at(&block[80..]),
        dmin: half_at(&block[82..]),
        scales: from_fn(|j| (block[j] & 15) as i8),
        minima: from_fn(|j| block[j] >> 4),
    }
}

/// Each half of 128 values has 32 bytes; a byte holds four values, 32 apart.
fn two_bits(plane: &[u8], values: &mut [u8]) {
    for (half, bytes) in values.chunks_exact_mut(128).zip(plane.chunks_exact(32)) {
        for (shift, quarter) in half.chunks_exact_mut(32).enumerate() {
            for (q, &byte) in quarter.iter_mut().zip(bytes) {
                *q = byte >> (2 * shift) & 3;
            }
        }
    }
}

/// 32 bytes of high bits, 64 bytes of 2-bit values, 12 bytes of scales, `d` f16;
/// 16 sub-blocks, offset 4. A byte of high bits serves eight values, 32 apart.
pub(super) fn q3_k(block: &[u8], values: &mut [u8]) {
    two_bits(&block[32..96], values);
    high_bits(&block[..32], values, 2);
}

/// Scales are 6 bits, stored + 32: nibbles of 0..8 low and of 8..16 high in bytes 0..8, two more
/// bits in bytes 8..12.
pub(super) fn q3_k_scales(block: &[u8]) -> SuperScales {
    let packed = &block[96..108];
    let scale = |j: usize| {
        let nibble = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
        let high = packed[8 + j % 4] >> (2 * (j / 4)) & 3;
        (nibble | high << 4) as i8 - 32
    };
    SuperScales {
        d: half_at(&block[108..]),
        dmin: half::f16::ZERO,
        scales: from_fn(scale),
        minima: [0; 16],
    }
}

/// Adds bit `i / 32` of byte `i % 32` to value `i`, at bit `at`.
fn high_bits(plane: &[u8], values: &mut [u8], at: u32) {
    for (bit, group) in values.chunks_exact_mut(32).enumerate() {
        for (q, &byte) in group.iter_mut().zip(plane) {
            *q |= (byte >> bit & 1) << at;
        }
    }
}

/// 32 bytes hold 64 nibbles: a byte's low half is in one sub-block, its high half in the next.
fn paired_nibbles(plane: &[u8], values: &mut [u8]) {
    for (pair, bytes) in values.chunks_exact_mut(64).zip(plane.chunks_exact(32)) {
        let (low, high) = pair.split_at_mut(32);
        for ((l, h), &byte) in low.iter_mut().zip(high).zip(bytes) {
            *l = byte & 15;
            *h = byte >> 4;
        }
    }
}

/// `d`, `dmin` f16, 12 bytes of scales and minima, 128 bytes of nibbles; 8 sub-blocks, offset 0.
pub(super) fn q4_k(block: &[u8], values: &mut [u8]) {
    paired_nibbles(&block[16..144], values);
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles.
pub(super) fn q5_k(block: &[u8], values: &mut [u8]) {
    paired_nibbles(&block[48..176], values);
    high_bits(&block[16..48], values, 4);
}

pub(super) fn q45_k_scales(block: &[u8]) -> SuperScales {
    let pair = |j: usize| if j < 8 { k4_scale_min(&block[4..16], j) } else { (0, 0) };
    SuperScales {
        d: half_at(block),
        dmin: half_at(&block[2..]),
        scales: from_fn(|j| pair(j).0 as i8),
        minima: from_fn(|j| pair(j).1),
    }
}

/// 128 bytes of nibbles, 64 bytes of 2-bit tops, 16 signed scales, `d` f16;
/// 16 sub-blocks, offset 32.
pub(super) fn q6_k(block: &[u8], values: &mut [u8]) {
    let (low, high) = (&block[..128], &block[128..192]);
    for (i, q) in values.iter_mut().enumerate() {
        let (half, at) = (i / 128, i % 128);
        let nibble = low[half * 64 + at % 64] >> (at / 64 * 4) & 15;
        let top = high[half * 32 + at % 32] >> (at / 32 * 2) & 3;
        *q = nibble | top << 4;
    }
}

pub(super) fn q6_k_scales(block: &[u8]) -> SuperScales {
    SuperScales {
        d: half_at(&block[208..]),
        dmin: half::f16::ZERO,
        scales: from_fn(|j| block[192 + j] as i8),
        minima: [0; 16],
    }
}

/// `d` f16, 2 bytes of high scale bits, 4 of low scale nibbles, 128 bytes of nibbles as in Q4_0;
/// 8 sub-blocks, scales stored + 32.
pub(super) fn iq4_xs_scales(block: &[u8]) -> SuperScales {
    let high = u16::from_le_bytes([block[2], block[3]]);
    let scale = |j: usize| {
        if j >= 8 {
            return 0;
        }
        let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
        (low | ((high >> (2 * j) & 3) as u8) << 4) as i8 - 32
    };
    SuperScales {
        d: half_at(block),
        dmin: half::f16::ZERO,
        scales: from_fn(scale),
        minima: [0; 16],
    }
}

/// Applies scales and minima to values: `sub` weights share a scale.
pub(super) fn dequantize(
    s: &SuperScales,
    values: impl Iterator<Item = f32>,
    out: &mut [f32],
    sub: usize,
) {
    let (d, dmin) = (s.d.to_f32(), s.dmin.to_f32());
    for (i, (x, q)) in out.iter_mut().zip(values).enumerate() {
        *x = d * f32::from(s.scales[i / sub]) * q - dmin * f32::from(s.minima[i / sub]);
    }
}
