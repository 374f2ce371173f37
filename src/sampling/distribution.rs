//! The probabilities of one row.

use super::{Path, Rng, Warp};
use crate::error::{Error, Result, TARGET};
use crate::lm::{Output, Token, largest, largest_first};

/// Weights that are summed together before a draw looks at single ones.
const CHUNK: usize = 256;

/// A probability for each token, to be filled again for each row.
///
/// Weights are f32 and relative to the largest; sums are f64. Tokens can be taken out
/// ([`Distribution::remove`]) to draw without replacement.
#[derive(Debug, Clone, Default)]
pub struct Distribution {
    /// By token. Those outside the support have weight 0.
    weights: Vec<f32>,
    /// The tokens that may have weight, most probable first; `None` if all may.
    support: Option<Vec<Token>>,
    /// What a weight is divided by to become a probability.
    total: f64,
    /// The sum of the weights: `total` less what was removed.
    left: f64,
    /// Tokens with logits, then weights, of which the support is chosen.
    candidates: Vec<(Token, f32)>,
    /// The tokens to penalise, in their order, and how often they occurred.
    recent: Vec<(Token, u32)>,
    /// The last support, kept for its memory while there is none.
    spare: Vec<Token>,
    /// The logits of a row of which not every token may follow.
    masked: Vec<f32>,
}

impl Distribution {
    /// Takes the warped probabilities of a row, of its first `vocab` entries. `path` is what the
    /// penalty looks back on. If it has a guide, tokens that may not follow are as if they had a
    /// logit of negative infinity; where none may, every probability is 0 and
    /// [`Distribution::mass`] with them.
    ///
    /// Of a row of the largest logits all that is needed must have been asked for
    /// ([`Warp::want`]); if the settings leave the distribution untruncated, it then holds the
    /// true probabilities of those tokens alone.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if no probabilities can be made of the logits (not numbers, infinite).
    ///
    /// # Panics
    /// If the row returned neither logits nor the largest of them, or not all logits where there is a
    /// guide.
    pub fn fill(
        &mut self,
        output: Output<'_>,
        vocab: usize,
        warp: &Warp,
        path: Path<'_>,
    ) -> Result<()> {
        match (output, path.guide) {
            (Output::Logits(logits), None) => self.fill_from_logits(&logits[..vocab], warp, path),
            (Output::Logits(logits), Some(guide)) => {
                let mut masked = std::mem::take(&mut self.masked);
                let any = guide.mask(path).apply(&logits[..vocab], &mut masked);
                if any {
                    self.fill_from_logits(&masked, warp, path);
                } else {
                    self.candidates.clear();
                    self.support_from_candidates(vocab);
                    self.total = 1.0;
                }
                self.masked = masked;
                if !any {
                    return Ok(());
                }
            }
            (Output::Top { top, log_sum_exp }, None) => {
                self.candidates.clear();
                self.candidates.extend_from_slice(top);
                if log_sum_exp.is_some_and(|sum| !sum.is_finite()) {
                    return Err(not_finite());
                }
                if warp.is_greedy() || warp.top_k > 0 {
                    self.candidates.truncate(if warp.is_greedy() { 1 } else { warp.top_k });
                    self.weigh_candidates(warp);
                    self.support_from_candidates(vocab);
                } else {
                    let lse = log_sum_exp.expect("a row that is not truncated has its sum");
                    for (_, x) in &mut self.candidates {
                        *x = (f64::from(*x) - lse).exp() as f32;
                    }
                    self.support_from_candidates(vocab);
                    self.total = 1.0;
                }
            }
            (other, _) => panic!("a row returned {other:?}, of which there is no distribution"),
        }
        if self.left > 0.0 && self.left.is_finite() { Ok(()) } else { Err(not_finite()) }
    }

    fn fill_from_logits(&mut self, logits: &[f32], warp: &Warp, path: Path<'_>) {
        self.recent.clear();
        if warp.penalises() {
            path.recent(warp.repeat_last_n, &mut self.recent);
            self.recent.retain(|&(token, _)| (token as usize) < logits.len());
        }
        let k = if warp.is_greedy() { 1 } else { warp.top_k };
        if k > 0 && k < logits.len() {
            // The largest that are not penalised are among so many of all.
            largest(logits, k + self.recent.len(), &mut self.candidates);
            if !self.recent.is_empty() {
                let recent = &self.recent;
                let is_recent = |token: &Token| recent.binary_search_by_key(token, |r| r.0).is_ok();
                self.candidates.retain(|(token, _)| !is_recent(token));
                let penalised = |&(t, n): &(Token, u32)| (t, warp.penalised(logits[t as usize], n));
                self.candidates.extend(recent.iter().map(penalised));
                self.candidates.sort_unstable_by(largest_first);
                self.candidates.truncate(k);
            }
            self.weigh_candidates(warp);
            return self.support_from_candidates(logits.len());
        }

        if let Some(support) = self.support.take() {
            self.spare = support;
        }
        self.weights.clear();
        self.weights.extend_from_slice(logits);
        for &(token, count) in &self.recent {
            let x = &mut self.weights[token as usize];
            *x = warp.penalised(*x, count);
        }
        let max = self.weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // A single token under a temperature of 0 gets here too.
        let temperature = if warp.is_greedy() { 1.0 } else { warp.temperature };
        for w in &mut self.weights {
            *w = exp((*w - max) / temperature);
        }
        if warp.top_p < 1.0 {
            // Tokens below this together have less than half of what may be left out, so the
            // tokens above it reach top-p, and of those mostly a few do.
            let total = sum(&self.weights);
            let least = 0.5 * (1.0 - f64::from(warp.top_p)) * total / self.weights.len() as f64;
            self.candidates.clear();
            let weights = (0..).zip(self.weights.iter().copied());
            self.candidates.extend(weights.filter(|&(_, w)| f64::from(w) >= least));
            self.truncate_before_sorting(f64::from(warp.top_p) * total);
            self.candidates.sort_unstable_by(largest_first);
            self.truncate_candidates(warp, total);
            self.support_from_candidates(logits.len());
        } else {
            if warp.min_p > 0.0 {
                // The largest weight is 1.
                for w in &mut self.weights {
                    *w = if *w < warp.min_p { 0.0 } else { *w };
                }
            }
            self.left = sum(&self.weights);
            self.total = self.left;
        }
    }

    /// Turns the candidates' logits, largest first, into the weights of those that survive.
    fn weigh_candidates(&mut self, warp: &Warp) {
        let temperature = if warp.is_greedy() { 1.0 } else { warp.temperature };
        let max = self.candidates.first().map_or(0.0, |c| c.1);
        for (_, x) in &mut self.candidates {
            *x = exp((*x - max) / temperature);
        }
        let total = self.candidates.iter().map(|c| f64::from(c.1)).sum();
        self.truncate_candidates(warp, total);
    }

    /// Leaves the candidates with the largest weights, as many as are sure to reach `mass`.
    fn truncate_before_sorting(&mut self, mass: f64) {
        let mut few = 64;
        while few < self.candidates.len() {
            self.candidates.select_nth_unstable_by(few - 1, largest_first);
            let reached: f64 = self.candidates[..few].iter().map(|c| f64::from(c.1)).sum();
            // A little more, as sums in another order differ in the last places.
            if reached >= mass * (1.0 + 1e-9) {
                self.candidates.truncate(few);
            }
            few *= 8;
        }
    }

    /// Top-p and min-p over the candidates' weights, largest first; `total` is the sum that top-p
    /// is a share of.
    fn truncate_candidates(&mut self, warp: &Warp, total: f64) {
        if warp.top_p < 1.0 {
            let mut reached = 0.0;
            let crossing = self.candidates.iter().position(|c| {
                reached += f64::from(c.1);
                reached >= f64::from(warp.top_p) * total
            });
            self.candidates.truncate(crossing.map_or(usize::MAX, |i| i + 1));
        }
        if warp.min_p > 0.0 {
            let least = warp.min_p * self.candidates.first().map_or(0.0, |c| c.1);
            self.candidates.truncate(self.candidates.partition_point(|c| c.1 >= least));
        }
    }

    /// Gives the candidates their weights and every other token none.
    fn support_from_candidates(&mut self, vocab: usize) {
        let mut support = match self.support.take() {
            // Few entries are not zero, and it is known which.
            Some(support) => {
                for &token in &support {
                    self.weights[token as usize] = 0.0;
                }
                support
            }
            None => {
                self.weights.fill(0.0);
                std::mem::take(&mut self.spare)
            }
        };
        self.weights.resize(vocab, 0.0);
        support.clear();
        support.extend(self.candidates.iter().map(|c| c.0));
        for &(token, w) in &self.candidates {
            self.weights[token as usize] = w;
        }
        self.support = Some(support);
        self.left = self.sum_left();
        self.total = self.left;
    }

    fn sum_left(&self) -> f64 {
        match &self.support {
            Some(support) => support.iter().map(|&t| f64::from(self.weights[t as usize])).sum(),
            None => sum(&self.weights),
        }
    }

    /// The probability of a token; 0 once it was removed, and for one beyond the vocabulary that
    /// the row was taken for: a draft may have fewer tokens than its target.
    pub fn prob(&self, token: Token) -> f64 {
        self.weights.get(token as usize).map_or(0.0, |&w| f64::from(w) / self.total)
    }

    /// ln of [`Distribution::prob`]; negative infinity for 0.
    pub fn log_prob(&self, token: Token) -> f64 {
        let weight = self.weights.get(token as usize).map_or(0.0, |&w| f64::from(w));
        weight.ln() - self.total.ln()
    }

    /// The probability of all tokens that were not removed.
    pub fn mass(&self) -> f64 {
        self.left / self.total
    }

    /// The most probable token of those not removed (ties: the smaller token).
    pub fn argmax(&self) -> Token {
        let weight = |t: Token| (t, self.weights[t as usize]);
        let largest = match &self.support {
            Some(support) => support.iter().map(|&t| weight(t)).min_by(largest_first),
            None => (0..self.weights.len() as Token).map(weight).min_by(largest_first),
        };
        largest.expect("a distribution was filled").0
    }

    /// Draws one of the tokens that were not removed, by their probabilities. Some mass must be
    /// left.
    pub fn draw(&self, rng: &mut Rng) -> Token {
        let mut at = rng.uniform() * self.left;
        let weight = |t: &Token| f64::from(self.weights[*t as usize]);
        let drawn = match &self.support {
            Some(support) => pick(support.iter().map(|t| (*t, weight(t))), &mut at),
            None => {
                let mut drawn = None;
                for (i, chunk) in self.weights.chunks(CHUNK).enumerate() {
                    let mass = sum(chunk);
                    // The last chunk with mass is also where rounding may lead.
                    if mass > 0.0 {
                        drawn = Some(i);
                        if at < mass {
                            break;
                        }
                        at -= mass;
                    }
                }
                let first = drawn.expect("some mass is left") * CHUNK;
                let chunk = first as Token..(first + CHUNK).min(self.weights.len()) as Token;
                pick(chunk.map(|t| (t, weight(&t))), &mut at)
            }
        };
        drawn.expect("some mass is left")
    }

    /// Takes a token out, so that it is not drawn again. Probabilities of the others stay as they
    /// are, and [`Distribution::mass`] is what they sum to. Returns what
    /// [`Distribution::restore`] wants to undo it.
    pub fn remove(&mut self, token: Token) -> Removed {
        let weight = std::mem::take(&mut self.weights[token as usize]);
        // A difference would lose what is left beside a token of almost all the mass.
        self.left = self.sum_left();
        Removed { token, weight }
    }

    /// Puts tokens back that were removed, as they were.
    pub fn restore(&mut self, removed: impl IntoIterator<Item = Removed>) {
        for Removed { token, weight } in removed {
            self.weights[token as usize] = weight;
        }
        self.left = self.sum_left();
    }

    /// Makes probabilities sum to 1 again after removals. Some mass must be left.
    pub fn renormalize(&mut self) {
        self.total = self.left;
    }

    /// Makes this the residual max(p - q, 0), normalised, with p what it was: what a rejected
    /// token is replaced from (Leviathan et al. 2023, algorithm 1). If rounding leaves nothing, it
    /// stays p.
    pub fn subtract(&mut self, q: &Distribution) {
        if self.excess(1.0, q, 1.0) > 0.0 {
            self.subtract_scaled(1.0, q, 1.0);
            self.renormalize();
        }
    }

    /// Makes this max(a p - b q, 0), not normalised, with p what it was: one part of a residual of
    /// joint distributions. [`Distribution::mass`] is then its sum.
    pub fn subtract_scaled(&mut self, a: f64, q: &Distribution, b: f64) {
        let a = a / self.total;
        self.each(|t, w| *w = (f64::from(*w) * a - b * q.prob(t)).max(0.0) as f32);
        self.left = self.sum_left();
        self.total = 1.0;
    }

    /// The sum over tokens of max(a p - b q, 0).
    pub fn excess(&self, a: f64, q: &Distribution, b: f64) -> f64 {
        let a = a / self.total;
        let excess = |t: Token, w: f32| (f64::from(w) * a - b * q.prob(t)).max(0.0);
        match &self.support {
            Some(support) => support.iter().map(|&t| excess(t, self.weights[t as usize])).sum(),
            None => (0..).zip(&self.weights).map(|(t, &w)| excess(t, w)).sum(),
        }
    }

    /// The entropy -sum p ln p of what was not removed, in nats.
    pub fn entropy(&self) -> f64 {
        // With p = w / total: ln total - (sum w ln w) / total.
        let term = |w: f32| if w > 0.0 { f64::from(w) * f64::from(w.ln()) } else { 0.0 };
        let sum: f64 = match &self.support {
            Some(support) => support.iter().map(|&t| term(self.weights[t as usize])).sum(),
            None => self.weights.iter().map(|&w| term(w)).sum(),
        };
        (self.total.ln() * self.mass() - sum / self.total).max(0.0)
    }

    /// Visits the weights of the support.
    fn each(&mut self, mut visit: impl FnMut(Token, &mut f32)) {
        match &self.support {
            Some(support) => {
                support.iter().for_each(|&t| visit(t, &mut self.weights[t as usize]));
            }
            None => (0..).zip(&mut self.weights).for_each(|(t, w)| visit(t, w)),
        }
    }
}

fn not_finite() -> Error {
    Error::NotFinite { model: TARGET.to_owned() }
}

/// A token that was taken out of a distribution.
#[derive(Debug, Clone, Copy)]
pub struct Removed {
    token: Token,
    weight: f32,
}

/// The element at which a sum of weights passes `at`, or the last with weight if rounding keeps
/// the sum below.
pub(crate) fn pick<T>(weighted: impl Iterator<Item = (T, f64)>, at: &mut f64) -> Option<T> {
    let mut last = None;
    for (item, weight) in weighted {
        if weight > 0.0 {
            last = Some(item);
            if *at < weight {
                break;
            }
            *at -= weight;
        }
    }
    last
}

/// A sum in eight lanes, always in the same order.
fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let chunks = weights.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|&w| f64::from(w)).sum();
    for chunk in chunks {
        for (lane, &w) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(w);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

/// e^x for x <= 0, to about 1e-7 of itself; 0 below e^-87.7.
///
/// Plain additions and multiplications: the same bits on every platform, where the C libraries
/// differ in the last place, and a loop over it becomes SIMD. x = n ln 2 + r, so e^x = 2^n e^r with
/// |r| <= ln 2 / 2, and e^r is its Taylor polynomial of degree 7.
#[inline]
fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; a small integer times the first is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Written so that what is not a number stays so.
    let x = if x < -88.0 { -88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut e = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        e = e * r + c;
    }
    // 2^n through the exponent's bits; n = -127 gives 0.
    let scale =
        f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    e * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::{Outputs, Want};

    const NEUTRAL: Warp = Warp {
        repeat_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repeat_last_n: 64,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    };

    fn filled(logits: &[f32], warp: &Warp, path: Path<'_>) -> Distribution {
        let mut d = Distribution::default();
        d.fill(Output::Logits(logits), logits.len(), warp, path).unwrap();
        d
    }

    fn probs(d: &Distribution) -> Vec<f64> {
        (0..d.weights.len() as Token).map(|t| d.prob(t)).collect()
    }

    fn near(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    fn logs(probs: &[f32]) -> Vec<f32> {
        probs.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn exp_is_exp() {
        for i in 0..=88_000 {
            let x = -i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let tolerance = if x < -87.3 { 2e-38 } else { 1.5e-7 * exact };
            assert!((f64::from(exp(x)) - exact).abs() <= tolerance, "{x}: {}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn each_setting_does_its_part() {
        let logits = logs(&[0.4, 0.05, 0.3, 0.05, 0.2]);
        let none = Path::default();
        let expect = |warp: Warp, expected: &[f64]| {
            near(&probs(&filled(&logits, &warp, none)), expected);
        };
        expect(NEUTRAL, &[0.4, 0.05, 0.3, 0.05, 0.2]);
        let norm = 0.16 + 0.0025 + 0.09 + 0.0025 + 0.04;
        let squares = [0.16, 0.0025, 0.09, 0.0025, 0.04].map(|x| x / norm);
        expect(Warp { temperature: 0.5, ..NEUTRAL }, &squares);
        expect(Warp { temperature: 0.0, ..NEUTRAL }, &[1.0, 0.0, 0.0, 0.0, 0.0]);
        // A tie at the border: the smaller token stays.
        let share = |x: f64| x / 0.95;
        let four = [share(0.4), share(0.05), share(0.3), 0.0, share(0.2)];
        expect(Warp { top_k: 4, ..NEUTRAL }, &four);
        expect(Warp { top_k: 5, ..NEUTRAL }, &[0.4, 0.05, 0.3, 0.05, 0.2]);
        let three = [4.0 / 9.0, 0.0, 3.0 / 9.0, 0.0, 2.0 / 9.0];
        expect(Warp { top_p: 0.71, ..NEUTRAL }, &three);
        expect(Warp { min_p: 0.3, ..NEUTRAL }, &three);
        expect(Warp { top_p: 1e-6, ..NEUTRAL }, &[1.0, 0.0, 0.0, 0.0, 0.0]);
        // Top-p is over what top-k left: 0.4 / 0.7 alone does not reach 0.6, and would not have
        // to reach more than 0.7 before renormalisation.
        let two = [4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0, 0.0];
        expect(Warp { top_k: 2, top_p: 0.9, ..NEUTRAL }, &two);
        expect(Warp { top_k: 2, top_p: 0.57, ..NEUTRAL }, &[1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_penalty_takes_the_sign_into_account() {
        let logits = [2.0, -1.0, 0.5];
        let warp = Warp { repeat_penalty: 2.0, repeat_last_n: 3, ..NEUTRAL };
        let path = Path { text: &[2, 0, 0], branch: &[1], guide: None };
        let expected = probs(&filled(&[1.0, -2.0, 0.5], &NEUTRAL, Path::default()));
        near(&probs(&filled(&logits, &warp, path)), &expected);
        let greedy = Warp { temperature: 0.0, repeat_penalty: 5.0, ..warp };
        assert_eq!(filled(&logits, &greedy, path).argmax(), 2);
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time() {
        let warp = Warp { presence_penalty: 0.25, frequency_penalty: 0.5, ..NEUTRAL };
        let path = Path { text: &[2, 0, 0], branch: &[0], guide: None };
        let expected =
            filled(&[2.0 - 0.25 - 1.5, -1.0, 0.5 - 0.25 - 0.5], &NEUTRAL, Path::default());
        near(&probs(&filled(&[2.0, -1.0, 0.5], &warp, path)), &probs(&expected));
    }

    #[test]
    fn the_largest_logits_give_the_same_bits_as_all() {
        let mut rng = Rng::new(1);
        let (mut a, mut b) = (Distribution::default(), Distribution::default());
        for round in 0..200 {
            let logits: Vec<f32> = (0..300).map(|_| rng.below(60) as f32 / 8.0).collect();
            let warp = Warp {
                temperature: [0.0, 0.6, 1.3][round % 3],
                top_k: 1 + round % 50,
                top_p: [1.0, 0.8][round % 2],
                min_p: [0.0, 0.1][round / 2 % 2],
                ..NEUTRAL
            };
            let want = warp.want(true, None, false);
            assert!(matches!(want, Want::Top { .. }));
            let mut outputs = Outputs::default();
            outputs.push(&want, &logits);
            a.fill(outputs.get(0), 300, &warp, Path::default()).unwrap();
            b.fill(Output::Logits(&logits), 300, &warp, Path::default()).unwrap();
            assert_eq!(probs(&a), probs(&b));
            assert_eq!(a.draw(&mut rng.clone()), b.draw(&mut rng.clone()));
            // Other kinds of rows in between leave no trace.
            b.fill(Output::Logits(&logits), 300, &NEUTRAL, Path::default()).unwrap();
        }
    }

    #[test]
    fn a_few_largest_of_an_unwarped_row_keep_their_true_probabilities() {
        let logits = logs(&[0.4, 0.05, 0.3, 0.05, 0.2]);
        let mut outputs = Outputs::default();
        outputs.push(&NEUTRAL.want(true, Some(2), false), &logits);
        let mut d = Distribution::default();
        d.fill(outputs.get(0), 5, &NEUTRAL, Path::default()).unwrap();
        near(&probs(&d), &[0.4, 0.0, 0.3, 0.0, 0.0]);
        assert!((d.log_prob(2) - 0.3f64.ln()).abs() < 1e-6);
        assert_eq!(d.log_prob(4), f64::NEG_INFINITY);
    }

    #[test]
    fn top_p_of_a_long_row_keeps_the_fewest_that_reach_it() {
        let mut rng = Rng::new(2);
        for (spread, top_p) in [(0.5, 0.5), (0.5, 0.99), (3.0, 0.9), (3.0, 0.999), (20.0, 0.9)] {
            let logits: Vec<f32> = (0..5000).map(|_| (rng.uniform() * spread) as f32).collect();
            let d = filled(&logits, &Warp { top_p, ..NEUTRAL }, Path::default());
            let all = filled(&logits, &NEUTRAL, Path::default());
            let mut order: Vec<Token> = (0..5000).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            let mut before = 0.0;
            for token in order {
                // Next to the border rounding may decide.
                if (before - f64::from(top_p)).abs() > 1e-6 {
                    assert_eq!(d.prob(token) > 0.0, before < f64::from(top_p), "{before}");
                }
                before += all.prob(token);
            }
        }
    }

    #[test]
    fn padding_entries_are_not_seen() {
        let mut d = Distribution::default();
        d.fill(Output::Logits(&[0.0, 0.0, 9.0]), 2, &NEUTRAL, Path::default()).unwrap();
        near(&probs(&d), &[0.5, 0.5]);
    }

    #[test]
    fn logits_that_are_not_numbers_are_refused() {
        let mut d = Distribution::default();
        for logits in [
            [f32::NAN, 0.0],
            [f32::NAN, f32::NAN],
            [f32::NEG_INFINITY, f32::NEG_INFINITY],
            [f32::INFINITY, 0.0],
        ] {
            for warp in [NEUTRAL, Warp { top_p: 0.5, ..NEUTRAL }] {
                let path = Path::default();
                assert!(d.fill(Output::Logits(&logits), 2, &warp, path).is_err(), "{logits:?}");
            }
        }
        let logits = Output::Logits(&[f32::NEG_INFINITY, 0.0]);
        d.fill(logits, 2, &NEUTRAL, Path::default()).unwrap();
        near(&probs(&d), &[0.0, 1.0]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let mut rng = Rng::new(3);
        let logits: Vec<f32> = (0..1000).map(|_| rng.uniform() as f32 * 4.0).collect();
        for warp in [NEUTRAL, Warp { top_k: 30, ..NEUTRAL }, Warp { min_p: 0.5, ..NEUTRAL }] {
            let d = filled(&logits, &warp, Path::default());
            let draws = 400_000;
            let mut counts = vec![0u32; 1000];
            for _ in 0..draws {
                counts[d.draw(&mut rng) as usize] += 1;
            }
            let (mut chi, mut cells) = (0.0, -1.0);
            for (&count, p) in counts.iter().zip(probs(&d)) {
                let expected = p * f64::from(draws);
                if p == 0.0 {
                    assert_eq!(count, 0);
                } else {
                    chi += (f64::from(count) - expected).powi(2) / expected;
                    cells += 1.0;
                }
            }
            let z = (chi - cells) / (2.0f64 * cells).sqrt();
            assert!(z.abs() < 4.5, "{z}");
        }
    }

    #[test]
    fn removal_leaves_the_others_and_ends_with_nothing() {
        let mut rng = Rng::new(5);
        for warp in [NEUTRAL, Warp { top_k: 3, ..NEUTRAL }] {
            let mut d = filled(&[60.0, 0.0, 1.0], &warp, Path::default());
            let p = probs(&d);
            let mut drawn = Vec::new();
            while d.mass() > 0.0 {
                let token = d.draw(&mut rng);
                assert_eq!(d.prob(token), p[token as usize]);
                d.remove(token);
                drawn.push(token);
            }
            assert_eq!(drawn[0], 0);
            drawn.sort_unstable();
            assert_eq!(drawn, [0, 1, 2]);
        }
    }

    #[test]
    fn what_was_removed_comes_back_as_it_was() {
        for warp in [NEUTRAL, Warp { top_k: 3, ..NEUTRAL }] {
            let mut d = filled(&logs(&[0.5, 0.3, 0.2]), &warp, Path::default());
            let before = probs(&d);
            let removed = [d.remove(0), d.remove(2)];
            d.renormalize();
            near(&probs(&d), &[0.0, 1.0, 0.0]);
            d.restore(removed);
            d.renormalize();
            assert_eq!(probs(&d), before);
        }
    }

    #[test]
    fn entropy_and_excess_are_what_they_are_defined_as() {
        for warp in [NEUTRAL, Warp { top_k: 3, ..NEUTRAL }] {
            let p = filled(&logs(&[0.5, 0.25, 0.25]), &warp, Path::default());
            let q = filled(&logs(&[0.2, 0.7, 0.1]), &warp, Path::default());
            assert!((p.entropy() - 1.5 * 2.0f64.ln()).abs() < 1e-6);
            assert!((p.excess(1.0, &q, 1.0) - 0.45).abs() < 1e-6);
            assert!((p.excess(0.5, &q, 0.2) - (0.21 + 0.105)).abs() < 1e-6);
        }
    }

    #[test]
    fn a_penalty_may_bring_others_among_the_largest() {
        let mut rng = Rng::new(9);
        for round in 0..100 {
            let logits: Vec<f32> = (0..200).map(|_| rng.below(40) as f32 - 15.0).collect();
            let text: Vec<Token> = (0..50).map(|_| rng.below(200)).collect();
            let path = Path { text: &text, branch: &[], guide: None };
            let penalty = [0.5, 1.7][round % 2];
            let warp = Warp { repeat_penalty: penalty, top_k: 1 + round % 20, ..NEUTRAL };
            let mut all: Vec<(Token, f32)> = (0..).zip(logits.iter().copied()).collect();
            for (t, x) in &mut all {
                if text.contains(t) {
                    *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
                }
            }
            all.sort_by(largest_first);
            let d = filled(&logits, &warp, path);
            let kept: Vec<Token> = all[..warp.top_k].iter().map(|c| c.0).collect();
            assert_eq!(d.support.as_deref(), Some(&kept[..]));
        }
    }

    #[test]
    fn the_residual_is_what_p_has_above_q() {
        let p = filled(&logs(&[0.5, 0.3, 0.2]), &NEUTRAL, Path::default());
        let q = filled(&logs(&[0.2, 0.7, 0.1]), &NEUTRAL, Path::default());
        let mut residual = p.clone();
        residual.subtract(&q);
        near(&probs(&residual), &[0.75, 0.0, 0.25]);
        let mut nothing = p.clone();
        nothing.subtract(&p);
        near(&probs(&nothing), &probs(&p));
        let mut listed =
            filled(&logs(&[0.5, 0.3, 0.2]), &Warp { top_k: 2, ..NEUTRAL }, Path::default());
        listed.subtract(&q);
        near(&probs(&listed), &[1.0, 0.0, 0.0]);
    }
}
