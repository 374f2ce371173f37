//! Writing blocks: where each type keeps its values and scales. The inverse of
//! [`BlockType::values`](super::BlockType::values) and
//! [`BlockType::super_scales`](super::BlockType::super_scales).

use super::{BlockType, SuperScales};

/// Two values of 4 bits in each byte, 16 apart within 32.
fn nibbles(values: &[u8], plane: &mut [u8]) {
    for (v, bytes) in values.chunks_exact(32).zip(plane.chunks_exact_mut(16)) {
        for (j, byte) in bytes.iter_mut().enumerate() {
            *byte = v[j] & 15 | (v[j + 16] & 15) << 4;
        }
    }
}

/// Two values of 4 bits in each byte, 32 apart within 64.
fn paired_nibbles(values: &[u8], plane: &mut [u8]) {
    for (v, bytes) in values.chunks_exact(64).zip(plane.chunks_exact_mut(32)) {
        for (j, byte) in bytes.iter_mut().enumerate() {
            *byte = v[j] & 15 | (v[j + 32] & 15) << 4;
        }
    }
}

/// Four values of 2 bits in each byte, 32 apart within 128.
fn two_bits(values: &[u8], plane: &mut [u8]) {
    for (v, bytes) in values.chunks_exact(128).zip(plane.chunks_exact_mut(32)) {
        for (j, byte) in bytes.iter_mut().enumerate() {
            *byte = (0..4).fold(0, |byte, i| byte | (v[j + 32 * i] & 3) << (2 * i));
        }
    }
}

/// Bit `at` of eight values in each byte, 32 apart within 256.
fn high_bits(values: &[u8], at: u32, plane: &mut [u8]) {
    for (j, byte) in plane.iter_mut().enumerate() {
        *byte = (0..8).fold(0, |byte, i| byte | (values[j + 32 * i] >> at & 1) << i);
    }
}

/// A block of 32: the scales, as many as the type has, and 32 values as
/// [`BlockType::values`] gives them.
pub(super) fn small(t: BlockType, scales: [half::f16; 2], values: &[u8], block: &mut [u8]) {
    let (head, planes) = block.split_at_mut(2 * t.scale_offsets().len());
    for (scale, bytes) in scales.iter().zip(head.chunks_exact_mut(2)) {
        bytes.copy_from_slice(&scale.to_le_bytes());
    }
    match t {
        BlockType::Q5_0 | BlockType::Q5_1 => {
            let (high, low) = planes.split_at_mut(4);
            let fifth = values.iter().enumerate();
            let fifth = fifth.fold(0u32, |bits, (j, q)| bits | u32::from(q >> 4 & 1) << j);
            high.copy_from_slice(&fifth.to_le_bytes());
            nibbles(values, low);
        }
        BlockType::Q8_0 => {
            planes.iter_mut().zip(values).for_each(|(byte, q)| *byte = q ^ 0x80);
        }
        _ => nibbles(values, planes),
    }
}

/// A super-block of 256.
pub(super) fn large(t: BlockType, s: &SuperScales, values: &[u8], block: &mut [u8]) {
    for (&at, scale) in t.scale_offsets().iter().zip([s.d, s.dmin]) {
        block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
    }
    match t {
        BlockType::Q2_K => {
            for (j, byte) in block[..16].iter_mut().enumerate() {
                *byte = s.scales[j] as u8 & 15 | s.minima[j] << 4;
            }
            two_bits(values, &mut block[16..80]);
        }
        BlockType::Q3_K => {
            high_bits(values, 2, &mut block[..32]);
            two_bits(values, &mut block[32..96]);
            let six = s.scales.map(|scale| (scale + 32) as u8);
            for j in 0..8 {
                block[96 + j] = six[j] & 15 | (six[j + 8] & 15) << 4;
            }
            for j in 0..4 {
                block[104 + j] = (0..4).fold(0, |byte, i| byte | six[j + 4 * i] >> 4 << (2 * i));
            }
        }
        BlockType::Q4_K | BlockType::Q5_K => {
            for j in 0..4 {
                let (scale, later) = (s.scales[j] as u8, s.scales[j + 4] as u8);
                block[4 + j] = scale | later >> 4 << 6;
                block[8 + j] = s.minima[j] | s.minima[j + 4] >> 4 << 6;
                block[12 + j] = later & 15 | s.minima[j + 4] << 4;
            }
            let five = t == BlockType::Q5_K;
            if five {
                high_bits(values, 4, &mut block[16..48]);
            }
            paired_nibbles(values, &mut block[if five { 48 } else { 16 }..]);
        }
        BlockType::Q6_K => {
            for (i, &q) in values.iter().enumerate() {
                let (half, at) = (i / 128, i % 128);
                let (low, high) = (half * 64 + at % 64, 128 + half * 32 + at % 32);
                // The first to touch a byte clears what was there.
                if at < 64 {
                    block[low] = 0;
                }
                if at < 32 {
                    block[high] = 0;
                }
                block[low] |= (q & 15) << (at / 64 * 4);
                block[high] |= q >> 4 << (at / 32 * 2);
            }
            for (byte, scale) in block[192..208].iter_mut().zip(s.scales) {
                *byte = scale as u8;
            }
        }
        BlockType::IQ4_XS => {
            let six: [u8; 8] = std::array::from_fn(|j| (s.scales[j] + 32) as u8);
            let high = (0..8).fold(0u16, |bits, j| bits | u16::from(six[j] >> 4) << (2 * j));
            block[2..4].copy_from_slice(&high.to_le_bytes());
            for j in 0..4 {
                block[4 + j] = six[2 * j] & 15 | (six[2 * j + 1] & 15) << 4;
            }
            nibbles(values, &mut block[8..]);
        }
        _ => unreachable!("{t} has no super-blocks"),
    }
}
