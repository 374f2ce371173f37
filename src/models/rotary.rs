//! Rotary positions: how fast each pair of a head's elements turns (RoPE; Su et al. 2021), and how
//! models stretch that over longer contexts.

use std::f64::consts::PI;

use super::config::Hyperparameters;
use crate::error::{Error, Result};
use crate::graph::{RotaryPairs, RotaryTable};

/// The rotation of a model's queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Which elements form a pair.
    pub pairs: RotaryPairs,
    /// Elements of a head that are rotated; even.
    pub dims: usize,
    /// Base of the frequencies.
    pub base: f32,
    /// How positions are stretched.
    pub scaling: Scaling,
}

/// How positions are stretched over a longer context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// All positions are divided by this; 1 for not at all.
    Linear(f64),
    /// Each pair has a factor of its own in the file (LongRoPE; Ding et al. 2024, arXiv 2402.13753).
    PerPair {
        /// Multiplies queries and keys.
        attention: f64,
    },
    /// Slow pairs are stretched and fast ones are not (YaRN; Peng et al. 2023, arXiv 2309.00071).
    Yarn(Yarn),
}

/// YaRN's parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times longer the context is.
    pub factor: f64,
    /// Positions of the context that it was stretched from.
    pub original_context: usize,
    /// Pairs that turn at least so often in the original context are left as they are.
    pub beta_fast: f64,
    /// Pairs that turn at most so often are stretched in full.
    pub beta_slow: f64,
    /// How much of the difference between the two is applied: 1 is all.
    pub extrapolation: f64,
    /// Multiplies queries and keys beside YaRN's own factor.
    pub attention: f64,
    /// Whether the ramp between fast and slow pairs begins and ends at whole pairs.
    pub truncated: bool,
}

impl Rotary {
    /// Reads a model's rotation of heads of `head_dim` elements.
    ///
    /// # Errors
    /// Impossible values; a scaling that is not known, by name.
    pub fn read(
        keys: &Hyperparameters<'_>,
        pairs: RotaryPairs,
        head_dim: usize,
        context: usize,
    ) -> Result<Self> {
        let dims = keys.optional("rope.dimension_count")?.unwrap_or(head_dim);
        if dims > head_dim || dims % 2 != 0 {
            return Err(keys.wrong(format!("cannot rotate {dims} elements of heads of {head_dim}")));
        }
        let number =
            |name: &str, default: f32| Ok::<_, Error>(f64::from(keys.positive(name, default)?));
        let scaling = match keys.text("rope.scaling.type")? {
            Some("none") => Scaling::Linear(1.0),
            // (Without a word, and by an older key, factors are meant so as well; 0 is none.)
            None | Some("linear") => {
                let factor = match keys.optional_positive("rope.scaling.factor")? {
                    Some(factor) => Some(factor),
                    None => keys.optional_positive("rope.scale_linear")?,
                };
                Scaling::Linear(factor.map_or(1.0, f64::from))
            }
            // (Its factors are tensors, which other families do not read.)
            Some("longrope") if keys.architecture() == "phi3" => {
                Scaling::PerPair { attention: number("rope.scaling.attn_factor", 1.0)? }
            }
            Some("yarn") => Scaling::Yarn(Yarn {
                factor: number("rope.scaling.factor", 1.0)?,
                original_context: keys
                    .optional("rope.scaling.original_context_length")?
                    .unwrap_or(context),
                beta_fast: number("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: number("rope.scaling.yarn_beta_slow", 1.0)?,
                extrapolation: number("rope.scaling.yarn_ext_factor", 1.0)?,
                attention: number("rope.scaling.attn_factor", 1.0)?
                    * number("rope.scaling.yarn_attn_factor", 1.0)?,
                truncated: true,
            }),
            Some(other) => {
                return Err(keys.unsupported(format!(
                    "scales rotary positions by `{other}`; `none`, `linear`, `yarn`, `longrope` and Llama-3's factors are run"
                )));
            }
        };
        Ok(Rotary { pairs, dims, base: keys.positive("rope.freq_base", 10_000.0)?, scaling })
    }

    /// The same without any stretching.
    pub fn unscaled(&self) -> Self {
        Rotary { scaling: Scaling::Linear(1.0), ..self.clone() }
    }

    /// The same with YaRN's ramp between any two points, not whole pairs.
    pub fn untruncated(&self) -> Self {
        match self.scaling {
            Scaling::Yarn(yarn) => {
                let scaling = Scaling::Yarn(Yarn { truncated: false, ..yarn });
                Rotary { scaling, ..self.clone() }
            }
            _ => self.clone(),
        }
    }

    /// The rotations themselves; `factors` divide the frequencies of pairs, one for each (Llama 3).
    pub fn table(&self, factors: Option<&[f32]>) -> RotaryTable {
        RotaryTable {
            pairs: self.pairs,
            frequencies: self.frequencies(factors),
            magnitude: self.magnitude(),
        }
    }

    /// Radians per position of each pair: base^(-2i/d) (Su et al., section 3.2.2), stretched, and
    /// divided by the pair's own factor if there are any (Llama 3).
    pub fn frequencies(&self, factors: Option<&[f32]>) -> Vec<f64> {
        let (dims, base) = (self.dims as f64, f64::from(self.base));
        let frequency = |i: usize| {
            let plain = base.powf(-2.0 * i as f64 / dims);
            let stretched = match self.scaling {
                Scaling::Linear(factor) => plain / factor,
                Scaling::PerPair { .. } => plain,
                Scaling::Yarn(yarn) => {
                    // (Equation 13, with the bounds of the ramp in pairs rather than in turns.)
                    let kept = yarn.kept(i, dims, base) * yarn.extrapolation;
                    plain / yarn.factor * (1.0 - kept) + plain * kept
                }
            };
            stretched / factors.map_or(1.0, |factors| f64::from(factors[i]))
        };
        (0..self.dims / 2).map(frequency).collect()
    }

    /// What rotated queries and keys are multiplied with: YaRN's 0.1 ln s + 1 (Peng et al.,
    /// equation 15, as its square root of 1/t), else 1.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            Scaling::Linear(_) => 1.0,
            Scaling::PerPair { attention } => attention,
            Scaling::Yarn(yarn) => yarn.attention * (1.0 + 0.1 * yarn.factor.max(1.0).ln()),
        }
    }
}

impl Yarn {
    /// How much of pair `i`'s own frequency is kept: 1 for fast pairs, 0 for slow ones, and a ramp
    /// between them.
    fn kept(&self, i: usize, dims: f64, base: f64) -> f64 {
        // The pair, a fraction, that turns so often in the original context.
        let pair = |turns: f64| {
            dims * (self.original_context as f64 / (turns * 2.0 * PI)).ln() / (2.0 * base.ln())
        };
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = if self.truncated { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dims - 1.0));
        let ramp = (i as f64 - low) / (high - low).max(0.001);
        1.0 - ramp.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn() -> Rotary {
        let scaling = Scaling::Yarn(Yarn {
            factor: 4.0,
            original_context: 2048,
            beta_fast: 32.0,
            beta_slow: 1.0,
            extrapolation: 1.0,
            attention: 1.0,
            truncated: true,
        });
        Rotary { pairs: RotaryPairs::Halves, dims: 64, base: 10_000.0, scaling }
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
        let (rotary, plain) = (yarn(), Rotary { scaling: Scaling::Linear(1.0), ..yarn() });
        let (stretched, plain) = (rotary.frequencies(None), plain.frequencies(None));
        for (i, (s, p)) in stretched.iter().zip(&plain).enumerate() {
            // 64 ln(2048 / 64 pi) / 2 ln 10000 = 8.06, and 64 ln(2048 / 2 pi) / 2 ln 10000 = 20.1.
            let kept = match i {
                0..=8 => 1.0,
                21.. => 0.0,
                i => 1.0 - (i as f64 - 8.0) / 13.0,
            };
            assert!((s / p - (kept + (1.0 - kept) / 4.0)).abs() < 1e-12, "pair {i}: {}", s / p);
        }
        assert!((rotary.magnitude() - 1.138_629_436).abs() < 1e-9);
    }

    #[test]
    fn factors_and_linear_scaling_divide() {
        let rotary = Rotary { dims: 4, scaling: Scaling::Linear(2.0), ..yarn() };
        assert_eq!(rotary.frequencies(Some(&[1.0, 8.0])), [0.5, 0.01 / 16.0]);
        assert_eq!(rotary.magnitude(), 1.0);
    }
}
