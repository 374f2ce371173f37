//! Searching for the scales of a block: least squares over candidates.
//!
//! Rounding weights `x` to `s g + m`, with `g` from a fixed [`Grid`] of numbers, leaves an error
//! that has many local minima in `(s, m)`. For given `g` the best `s` and `m` are those of a linear
//! regression of `x` on `g`, and for given `s` and `m` the best `g` is the nearest. So each
//! candidate for the range that the grid spans is rounded once and regressed once, and the best
//! one is then improved by taking the two steps in turn. The error is the plain sum of squares.

use super::IQ4_VALUES;

/// The numbers that a type can store before they are scaled.
pub(super) trait Grid {
    /// The least.
    const LOW: f32;
    /// The largest.
    const HIGH: f32;
    /// How far apart the outermost are.
    const STEP: f32;

    /// The nearest one, or so near to it that the error is the same but for a thousandth.
    fn nearest(x: f32) -> f32;

    /// How the nearest one is stored.
    fn code(x: f32) -> u8;
}

/// The whole numbers from `LOW` to `HIGH`, stored from 0 on.
pub(super) struct Whole<const LOW: i32, const HIGH: i32>;

impl<const LOW: i32, const HIGH: i32> Grid for Whole<LOW, HIGH> {
    const LOW: f32 = LOW as f32;
    const HIGH: f32 = HIGH as f32;
    const STEP: f32 = 1.0;

    fn nearest(x: f32) -> f32 {
        // Adding 1.5 x 2^23 leaves no bits for a fraction, which is ties-to-even rounding of what
        // is small; `round_ties_even` is a function call on baseline x86-64.
        const SHIFT: f32 = 12_582_912.0;
        (x.clamp(Self::LOW, Self::HIGH) + SHIFT) - SHIFT
    }

    fn code(x: f32) -> u8 {
        (Self::nearest(x) - Self::LOW) as u8
    }
}

/// The sixteen numbers of the IQ4 types.
pub(super) struct Iq4;

/// The nearest of them to each quarter from -128 on.
static IQ4_NEAREST: [f32; 1024] = {
    let mut table = [0.0; 1024];
    let mut quarter = 0;
    while quarter < table.len() {
        let (mut nearest, mut distance, mut code) = (0, i32::MAX, 0);
        while code < IQ4_VALUES.len() {
            let off = (IQ4_VALUES[code] as i32 * 4 - (quarter as i32 - 512)).abs();
            if off < distance {
                (nearest, distance) = (IQ4_VALUES[code], off);
            }
            code += 1;
        }
        table[quarter] = nearest as f32;
        quarter += 1;
    }
    table
};

impl Grid for Iq4 {
    const LOW: f32 = IQ4_VALUES[0] as f32;
    const HIGH: f32 = IQ4_VALUES[15] as f32;
    const STEP: f32 = 22.0;

    fn nearest(x: f32) -> f32 {
        // The low bits of a sum with 2^23 are the rounded number.
        const SHIFT: f32 = 8_388_608.0;
        let quarter = (x.clamp(Self::LOW, Self::HIGH) * 4.0 + 512.0) + SHIFT;
        IQ4_NEAREST[quarter.to_bits() as usize & 1023]
    }

    fn code(x: f32) -> u8 {
        let distance = |code: &usize| (f32::from(IQ4_VALUES[*code]) - x).abs();
        (0..16).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0) as u8
    }
}

/// Sums over weights are kept in this many parts, so that compilers can use vectors.
const LANES: usize = 8;

/// What a regression of weights on their rounded values needs.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    n: f32,
    x: f32,
    xx: f32,
    g: f32,
    gg: f32,
    xg: f32,
}

impl Sums {
    /// Of weights alone.
    fn of(x: &[f32]) -> Self {
        let mut lanes = [[0f32; LANES]; 2];
        for x in x.chunks_exact(LANES) {
            for i in 0..LANES {
                lanes[0][i] += x[i];
                lanes[1][i] += x[i] * x[i];
            }
        }
        let [sum, xx] = lanes.map(|lane| lane.iter().sum());
        Sums { n: x.len() as f32, x: sum, xx, ..Sums::default() }
    }

    /// The same with those of `g = nearest((x - m) / s)`, given 1 / s.
    fn rounded<G: Grid>(self, x: &[f32], inverse: f32, m: f32) -> Self {
        let mut lanes = [[0f32; LANES]; 3];
        for x in x.chunks_exact(LANES) {
            for i in 0..LANES {
                let g = G::nearest((x[i] - m) * inverse);
                lanes[0][i] += g;
                lanes[1][i] += g * g;
                lanes[2][i] += x[i] * g;
            }
        }
        let [g, gg, xg] = lanes.map(|lane| lane.iter().sum());
        Sums { g, gg, xg, ..self }
    }

    /// The squared error of `s g + m`.
    fn error(&self, s: f32, m: f32) -> f32 {
        self.xx - 2.0 * (s * self.xg + m * self.x)
            + s * (s * self.gg + 2.0 * m * self.g)
            + self.n * m * m
    }

    /// The best `s` with `m = 0`.
    fn scale(&self) -> f32 {
        if self.gg > 0.0 { self.xg / self.gg } else { 0.0 }
    }

    /// The best `(s, m)`; with `m = 0` where it would have to be positive and may not.
    fn line(&self, negative: bool) -> (f32, f32) {
        let determinant = self.n * self.gg - self.g * self.g;
        if determinant > 0.0 {
            let s = (self.n * self.xg - self.x * self.g) / determinant;
            let m = (self.x - s * self.g) / self.n;
            if !negative || m <= 0.0 {
                return (s, m);
            }
        }
        (self.scale(), 0.0)
    }
}

/// 1 / s, or 0 for what cannot be divided by.
fn invert(s: f32) -> f32 {
    let inverse = 1.0 / s;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The squared error of weights that are rounded to `s g + m`.
pub(super) fn error<G: Grid>(x: &[f32], s: f32, m: f32) -> f32 {
    let inverse = invert(s);
    let mut lanes = [0f32; LANES];
    for x in x.chunks_exact(LANES) {
        for i in 0..LANES {
            let off = x[i] - (s * G::nearest((x[i] - m) * inverse) + m);
            lanes[i] += off * off;
        }
    }
    lanes.iter().sum()
}

/// How the weights are stored with this scale and minimum.
pub(super) fn codes<G: Grid>(x: &[f32], s: f32, m: f32, codes: &mut [u8]) {
    let inverse = invert(s);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = G::code((x - m) * inverse);
    }
}

/// Takes the two steps in turn from a first `(s, m)`, as long as that helps.
fn improve<G: Grid>(
    x: &[f32],
    mut best: (f32, f32, f32),
    line: impl Fn(&Sums) -> (f32, f32),
) -> (f32, f32) {
    let alone = Sums::of(x);
    for _ in 0..4 {
        let sums = alone.rounded::<G>(x, invert(best.1), best.2);
        let (s, m) = line(&sums);
        let error = sums.error(s, m);
        if error >= best.0 || s == 0.0 {
            break;
        }
        best = (error, s, m);
    }
    (best.1, best.2)
}

/// The scale, of either sign, that fits `x` to multiples of the grid's numbers.
pub(super) fn scale<G: Grid>(x: &[f32]) -> f32 {
    let extreme = x.iter().fold(0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
    if extreme == 0.0 {
        return 0.0;
    }
    let mut best = (f32::INFINITY, 0.0, 0.0);
    let alone = Sums::of(x);
    // The extreme weight lies at an end of the grid, or a little beside it.
    for end in [G::LOW, G::HIGH] {
        for fifth in -6..=6 {
            let inverse = (end + 0.2 * fifth as f32 * G::STEP) / extreme;
            let sums = alone.rounded::<G>(x, inverse, 0.0);
            let s = sums.scale();
            let error = sums.error(s, 0.0);
            if error < best.0 {
                best = (error, s, 0.0);
            }
        }
    }
    improve::<G>(x, best, |sums| (sums.scale(), 0.0)).0
}

/// The `(s, m)` with `s >= 0` that fits `x` to `s g + m`; `m <= 0` if `negative`. The grid begins
/// at 0.
pub(super) fn scale_and_minimum<G: Grid>(x: &[f32], negative: bool) -> (f32, f32) {
    let least = x.iter().copied().fold(f32::INFINITY, f32::min);
    let low = if negative { least.min(0.0) } else { least };
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let range = high - low;
    if range <= 0.0 {
        return (0.0, low);
    }
    let mut best = (error::<G>(x, range / G::HIGH, low), range / G::HIGH, low);
    let alone = Sums::of(x);
    // Ends of the grid's range, in steps inside (or outside) that of the weights.
    const ENDS: [f32; 6] = [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0];
    let step = range / G::HIGH;
    for below in ENDS {
        let first = low + below * step;
        for above in ENDS {
            let span = high - above * step - first;
            let sums = alone.rounded::<G>(x, G::HIGH / span, first);
            let (s, m) = sums.line(negative);
            let error = sums.error(s, m);
            if s > 0.0 && error < best.0 {
                best = (error, s, m);
            }
        }
    }
    improve::<G>(x, best, |sums| sums.line(negative))
}
