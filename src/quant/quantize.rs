//! Rounding weights to blocks with the least squared error that a search finds.

use half::{bf16, f16};

use super::fit::{self, Grid, Iq4, Whole};
use super::{BlockType, SuperScales, pack};

impl BlockType {
    /// Rounds weights to whole blocks, so that reading them back leaves little squared error. The
    /// same weights give the same blocks.
    ///
    /// Numbers that are not finite, or too large for the type's f16 scales, come back as something
    /// else; a caller that cannot rule them out looks first.
    ///
    /// # Panics
    /// If the lengths do not fit each other, or the type is not [`BlockType::READABLE`].
    pub fn quantize(self, weights: &[f32], blocks: &mut [u8]) {
        let (len, bytes) = (self.block_len(), self.block_bytes());
        assert!(
            weights.len().is_multiple_of(len) && blocks.len() == weights.len() / len * bytes,
            "{self}: {} weights to {} bytes",
            weights.len(),
            blocks.len()
        );
        let one: fn(&[f32], &mut [u8]) = match self {
            BlockType::F32 => |x, b| b.copy_from_slice(&x[0].to_le_bytes()),
            BlockType::F16 => |x, b| b.copy_from_slice(&f16::from_f32(x[0]).to_le_bytes()),
            BlockType::BF16 => |x, b| b.copy_from_slice(&bf16::from_f32(x[0]).to_le_bytes()),
            BlockType::Q4_0 => |x, b| scaled::<Whole<-8, 7>>(BlockType::Q4_0, x, b),
            BlockType::Q5_0 => |x, b| scaled::<Whole<-16, 15>>(BlockType::Q5_0, x, b),
            BlockType::Q8_0 => q8_0,
            BlockType::IQ4_NL => |x, b| scaled::<Iq4>(BlockType::IQ4_NL, x, b),
            BlockType::Q4_1 => |x, b| shifted::<Whole<0, 15>>(BlockType::Q4_1, x, b),
            BlockType::Q5_1 => |x, b| shifted::<Whole<0, 31>>(BlockType::Q5_1, x, b),
            BlockType::Q3_K => |x, b| super_scaled::<Whole<-4, 3>>(BlockType::Q3_K, 32, x, b),
            BlockType::Q6_K => |x, b| super_scaled::<Whole<-32, 31>>(BlockType::Q6_K, 128, x, b),
            BlockType::IQ4_XS => |x, b| super_scaled::<Iq4>(BlockType::IQ4_XS, 32, x, b),
            BlockType::Q2_K => |x, b| super_shifted::<Whole<0, 3>>(BlockType::Q2_K, 15, x, b),
            BlockType::Q4_K => |x, b| super_shifted::<Whole<0, 15>>(BlockType::Q4_K, 63, x, b),
            BlockType::Q5_K => |x, b| super_shifted::<Whole<0, 31>>(BlockType::Q5_K, 63, x, b),
            _ => panic!("{self} cannot be written"),
        };
        for (weights, block) in weights.chunks_exact(len).zip(blocks.chunks_exact_mut(bytes)) {
            one(weights, block);
        }
    }
}

/// The nearest `f16` that is a number.
fn half(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// The largest magnitude becomes 127: with so many levels no search gains.
fn q8_0(x: &[f32], block: &mut [u8]) {
    let d = x.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
    let mut values = [0; 32];
    fit::codes::<Whole<-127, 127>>(x, d, 0.0, &mut values);
    // Stored values begin at -128.
    values.iter_mut().for_each(|q| *q += 1);
    pack::small(BlockType::Q8_0, [half(d), f16::ZERO], &values, block);
}

/// A block with one scale.
fn scaled<G: Grid>(t: BlockType, x: &[f32], block: &mut [u8]) {
    let d = half(fit::scale::<G>(x));
    let mut values = [0; 32];
    fit::codes::<G>(x, d.to_f32(), 0.0, &mut values);
    pack::small(t, [d, f16::ZERO], &values, block);
}

/// A block with a scale and a minimum.
fn shifted<G: Grid>(t: BlockType, x: &[f32], block: &mut [u8]) {
    let (d, m) = fit::scale_and_minimum::<G>(x, false);
    let (d, m) = (half(d), half(m));
    let mut values = [0; 32];
    fit::codes::<G>(x, d.to_f32(), m.to_f32(), &mut values);
    pack::small(t, [d, m], &values, block);
}

/// How often the scales of a super-block and the scale of those scales are fitted in turn.
const TURNS: usize = 3;

/// A super-block whose sub-blocks have a signed scale each, from `-most` to `most - 1`.
fn super_scaled<G: Grid>(t: BlockType, most: i32, x: &[f32], block: &mut [u8]) {
    let len = t.scale_len();
    let mut wanted = [0f32; 16];
    for (scale, x) in wanted.iter_mut().zip(x.chunks_exact(len)) {
        *scale = fit::scale::<G>(x);
    }
    let largest = wanted.iter().fold(0f32, |l, &s| if s.abs() > l.abs() { s } else { l });
    // The largest becomes `-most`, the number with no opposite.
    let mut d = half(-largest / most as f32);
    let mut best = (f32::INFINITY, SuperScales::default());
    for _ in 0..TURNS {
        if d == f16::ZERO {
            break;
        }
        let unit = d.to_f32();
        let mut found = SuperScales { d, ..SuperScales::default() };
        let mut total = 0.0;
        for ((x, wanted), scale) in x.chunks_exact(len).zip(wanted).zip(&mut found.scales) {
            let middle = (wanted / unit).round() as i32;
            let (error, chosen) = (middle - 1..=middle + 1)
                .map(|scale| scale.clamp(-most, most - 1))
                .map(|scale| (fit::error::<G>(x, unit * scale as f32, 0.0), scale))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .unwrap_or((0.0, 0));
            total += error;
            *scale = chosen as i8;
        }
        if total >= best.0 {
            break;
        }
        best = (total, found);
        // The regression of x on scale x value, for all sub-blocks at once.
        let (mut xy, mut yy) = (0.0, 0.0);
        for (x, scale) in x.chunks_exact(len).zip(found.scales) {
            let scale = f32::from(scale);
            for &x in x {
                let y = scale * G::nearest(if scale == 0.0 { 0.0 } else { x / (unit * scale) });
                xy += x * y;
                yy += y * y;
            }
        }
        if yy > 0.0 {
            d = half(xy / yy);
        }
    }
    finish::<G>(t, &best.1, x, block);
}

/// A super-block whose sub-blocks have a scale and a minimum each, from 0 to `most`; the minimum is
/// subtracted.
fn super_shifted<G: Grid>(t: BlockType, most: i32, x: &[f32], block: &mut [u8]) {
    let len = t.scale_len();
    let mut wanted = [(0f32, 0f32); 16];
    for (pair, x) in wanted.iter_mut().zip(x.chunks_exact(len)) {
        *pair = fit::scale_and_minimum::<G>(x, true);
    }
    let largest = |f: fn(&(f32, f32)) -> f32| wanted.iter().map(f).fold(0f32, f32::max);
    let mut d = half(largest(|pair| pair.0) / most as f32);
    let mut dmin = half(largest(|pair| -pair.1) / most as f32);
    let mut best = (f32::INFINITY, SuperScales { d, dmin, ..SuperScales::default() });
    for _ in 0..TURNS {
        let (unit, unit_min) = (d.to_f32(), dmin.to_f32());
        let mut found = SuperScales { d, dmin, ..SuperScales::default() };
        let mut total = 0.0;
        for (j, (x, wanted)) in x.chunks_exact(len).zip(wanted).enumerate() {
            let around = |wanted: f32, unit: f32| {
                let middle = if unit > 0.0 { (wanted / unit).round() as i32 } else { 0 };
                (middle - 1..=middle + 1).map(|k| k.clamp(0, most))
            };
            let mut nearest = (f32::INFINITY, 0, 0);
            for scale in around(wanted.0, unit) {
                for minimum in around(-wanted.1, unit_min) {
                    let (s, m) = (unit * scale as f32, -unit_min * minimum as f32);
                    let error = fit::error::<G>(x, s, m);
                    if error < nearest.0 {
                        nearest = (error, scale, minimum);
                    }
                }
            }
            total += nearest.0;
            found.scales[j] = nearest.1 as i8;
            found.minima[j] = nearest.2 as u8;
        }
        if total >= best.0 {
            break;
        }
        best = (total, found);
        (d, dmin) = regress::<G>(len, x, &found);
    }
    finish::<G>(t, &best.1, x, block);
}

/// The scales of the scales and of the minima that fit best, given what they scale: the regression
/// of x on y = scale x value and z = -minimum.
fn regress<G: Grid>(len: usize, x: &[f32], s: &SuperScales) -> (f16, f16) {
    let (unit, unit_min) = (s.d.to_f32(), s.dmin.to_f32());
    let (mut xy, mut xz, mut yy, mut yz, mut zz) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (j, x) in x.chunks_exact(len).enumerate() {
        let (scale, z) = (f32::from(s.scales[j]), -f32::from(s.minima[j]));
        let inverse = if scale > 0.0 && unit > 0.0 { 1.0 / (unit * scale) } else { 0.0 };
        for &x in x {
            let y = scale * G::nearest((x - unit_min * z) * inverse);
            xy += x * y;
            xz += x * z;
            yy += y * y;
            yz += y * z;
            zz += z * z;
        }
    }
    let determinant = yy * zz - yz * yz;
    let (d, dmin) = match determinant > 1e-6 * yy * zz {
        true => ((xy * zz - xz * yz) / determinant, (xz * yy - xy * yz) / determinant),
        false if yy > 0.0 => ((xy - unit_min * yz) / yy, unit_min),
        false => (unit, unit_min),
    };
    (half(d.max(0.0)), half(dmin.max(0.0)))
}

/// Stores the values that are nearest with these scales.
fn finish<G: Grid>(t: BlockType, s: &SuperScales, x: &[f32], block: &mut [u8]) {
    let (len, d, dmin) = (t.scale_len(), s.d.to_f32(), s.dmin.to_f32());
    let mut values = [0; 256];
    for (j, (x, values)) in x.chunks_exact(len).zip(values.chunks_exact_mut(len)).enumerate() {
        let (scale, m) = (d * f32::from(s.scales[j]), -dmin * f32::from(s.minima[j]));
        fit::codes::<G>(x, scale, m, values);
    }
    pack::large(t, s, &values, block);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut unit = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        // Sums of uniform numbers: about normal.
        (0..n).map(|_| 0.02 * (0..6).map(|_| unit()).sum::<f32>()).collect()
    }

    fn nmse(t: BlockType, x: &[f32]) -> f64 {
        let mut blocks = vec![0xa5; x.len() / t.block_len() * t.block_bytes()];
        t.quantize(x, &mut blocks);
        let mut back = vec![0.0; x.len()];
        t.dequantize(&blocks, &mut back);
        let error: f64 = x.iter().zip(&back).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        error / x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()
    }

    #[test]
    fn more_bits_leave_less_error() {
        let x = noise(256 * 64);
        let all = BlockType::READABLE.map(|t| (t, nmse(t, &x)));
        let of = |t| all.iter().find(|(known, _)| *known == t).unwrap().1;
        use BlockType::*;
        assert_eq!(of(F32), 0.0);
        let order = [F16, BF16, Q8_0, Q6_K, Q5_1, Q4_K, Q3_K, Q2_K];
        for pair in order.windows(2) {
            assert!(of(pair[0]) < of(pair[1]), "{pair:?}: {} {}", of(pair[0]), of(pair[1]));
        }
        // With b bits for normal weights, roughly 2^-2b of what one bit less leaves.
        for (t, most) in [(Q4_0, 8e-3), (IQ4_NL, 6e-3), (Q5_0, 2e-3), (Q2_K, 1.1e-1)] {
            assert!(of(t) < most, "{t}: {}", of(t));
        }
    }

    #[test]
    fn what_a_type_can_hold_comes_back_exactly() {
        for t in BlockType::READABLE.into_iter().filter(|t| !t.is_float()) {
            let zero = vec![0.0; 512];
            let mut blocks = vec![0xff; 512 / t.block_len() * t.block_bytes()];
            t.quantize(&zero, &mut blocks);
            let mut back = vec![1.0; 512];
            t.dequantize(&blocks, &mut back);
            assert_eq!(back, zero, "{t}");
            // One weight of a block alone, of either sign; and all alike.
            for value in [0.5, -0.5] {
                let mut x = vec![0.0; 256];
                x[77] = value;
                // (The IQ4 types have no zero.)
                assert!(nmse(t, &x) < 3e-3, "{t} {value}: {}", nmse(t, &x));
                let x = vec![value; 256];
                assert!(nmse(t, &x) < 1e-3, "{t} all {value}: {}", nmse(t, &x));
            }
        }
    }

    #[test]
    fn packing_is_the_inverse_of_reading() {
        let mut state = 3u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as u8
        };
        for t in BlockType::READABLE.into_iter().filter(|t| !t.is_float()) {
            for _ in 0..20 {
                // Any bytes are a block, but for nothing that would compare as different.
                let block: Vec<u8> = (0..t.block_bytes()).map(|_| next()).collect();
                let mut values = [0; 256];
                let values = &mut values[..t.block_len()];
                t.values(&block, values);
                let mut again = vec![0; block.len()];
                if t.block_len() == 256 {
                    pack::large(t, &t.super_scales(&block), values, &mut again);
                } else {
                    let at = |i: usize| f16::from_le_bytes([block[i], block[i + 1]]);
                    pack::small(t, [at(0), at(2)], values, &mut again);
                }
                assert_eq!(again, block, "{t}");
            }
        }
    }
}
