//! Blocks of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! Nibbles: byte `j` of sixteen holds weight `j` in its low half and weight `j + 16` in its high
//! half. The fifth bits of Q5 are bit `j` of a 32-bit word.

use super::f16_at;

/// The values of a nibble plane of 16 bytes: 32 of 4 bits.
pub(super) fn nibbles(bytes: &[u8], values: &mut [u8]) {
    for (j, &q) in bytes[..16].iter().enumerate() {
        values[j] = q & 15;
        values[j + 16] = q >> 4;
    }
}

/// The values of Q5's two planes: 32 of 5 bits.
fn five_bits(high: &[u8], low: &[u8], values: &mut [u8]) {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    nibbles(low, values);
    for (j, q) in values.iter_mut().enumerate() {
        *q |= ((high >> j & 1) as u8) << 4;
    }
}

/// `d` f16, 16 bytes of nibbles; weight = d (q - 8).
pub(super) fn q4_0(block: &[u8], values: &mut [u8]) {
    nibbles(&block[2..], values);
}

/// `d`, `m` f16, 16 bytes of nibbles; weight = d q + m.
pub(super) fn q4_1(block: &[u8], values: &mut [u8]) {
    nibbles(&block[4..], values);
}

/// `d` f16, 4 bytes of high bits, 16 bytes of nibbles; weight = d (q - 16).
pub(super) fn q5_0(block: &[u8], values: &mut [u8]) {
    five_bits(&block[2..6], &block[6..], values);
}

/// `d`, `m` f16, 4 bytes of high bits, 16 bytes of nibbles; weight = d q + m.
pub(super) fn q5_1(block: &[u8], values: &mut [u8]) {
    five_bits(&block[4..8], &block[8..], values);
}

/// `d` f16, 32 signed bytes; weight = d (q - 128), with the sign bit flipped.
pub(super) fn q8_0(block: &[u8], values: &mut [u8]) {
    for (q, &byte) in values.iter_mut().zip(&block[2..]) {
        *q = byte ^ 0x80;
    }
}

/// The scale and minimum of a block: weight = scale (q - offset) + minimum.
pub(super) fn scales(block: &[u8], has_minimum: bool) -> (f32, f32) {
    (f16_at(block), if has_minimum { f16_at(&block[2..]) } else { 0.0 })
}
