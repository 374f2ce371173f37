//! Blocks whose nibbles index a table of unevenly spaced values: IQ4_NL, IQ4_XS.

use super::f16_at;

/// What a nibble of the IQ4 types stands for.
pub const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn value(nibble: u8) -> f32 {
    f32::from(IQ4_VALUES[nibble as usize])
}

/// `d` f16, 16 bytes of nibbles as in Q4_0; weight = d table\[q\].
pub(super) fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block);
    for (j, &q) in block[2..].iter().enumerate() {
        out[j] = d * value(q & 15);
        out[j + 16] = d * value(q >> 4);
    }
}

/// `d` f16, 2 bytes of high scale bits, 4 of low scale nibbles, 128 bytes of nibbles;
/// weight = d (scale - 32) table\[q\], for 8 sub-blocks of 32.
pub(super) fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
        let scale = i32::from(low) | i32::from(high >> (2 * j) & 3) << 4;
        let scale = d * (scale - 32) as f32;
        for (i, &q) in block[8 + 16 * j..][..16].iter().enumerate() {
            out[i] = scale * value(q & 15);
            out[i + 16] = scale * value(q >> 4);
        }
    }
}
