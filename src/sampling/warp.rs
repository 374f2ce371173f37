//! How logits become probabilities: the settings.

use super::Guide;
use crate::error::{Error, Result};
use crate::lm::{Token, Want};

/// Above this many survivors a whole row of logits is read rather than its largest.
const MOST_READ_AS_TOP: usize = 256;

/// Settings of the warping, applied in the order of the fields: penalties, temperature, top-k,
/// top-p, min-p. The default changes nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warp {
    /// Divides positive logits, and multiplies others, of tokens that occur among the last
    /// [`repeat_last_n`](Warp::repeat_last_n) of the row's own path (Keskar et al. 2019, with
    /// llama.cpp's treatment of the sign). 1 is off.
    pub repeat_penalty: f32,
    /// Taken off the logits of such tokens, once, whatever their number; negative favours them.
    pub presence_penalty: f32,
    /// Taken off the logits of such tokens for each time that they occur there; negative favours them.
    pub frequency_penalty: f32,
    /// How many tokens back the penalties look.
    pub repeat_last_n: usize,
    /// Divides the logits. 0 takes the largest logit (ties: the smaller token).
    pub temperature: f32,
    /// Keeps this many of the most probable tokens (ties: smaller tokens). 0 is off.
    pub top_k: usize,
    /// Keeps the most probable of what top-k left, renormalised, until their sum reaches this;
    /// the token that crosses it is kept (Holtzman et al. 2020). 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this share as probable as the most probable. 0 is off.
    pub min_p: f32,
}

impl Default for Warp {
    fn default() -> Self {
        Warp {
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: 64,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
        }
    }
}

impl Warp {
    /// Refuses settings outside their ranges.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting's name, its range and what was found.
    pub fn validate(&self) -> Result<()> {
        let fine = |ok: bool, name: &str, range: &str, found: f32| {
            if ok {
                Ok(())
            } else {
                Err(Error::invalid(format!("{name} must be {range}, not {found}")))
            }
        };
        fine(
            self.temperature.is_finite() && self.temperature >= 0.0,
            "temperature",
            "0 (greedy) or more",
            self.temperature,
        )?;
        fine(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top-p",
            "above 0 and at most 1 (off)",
            self.top_p,
        )?;
        fine((0.0..=1.0).contains(&self.min_p), "min-p", "from 0 (off) to 1", self.min_p)?;
        fine(
            self.repeat_penalty.is_finite() && self.repeat_penalty > 0.0,
            "repeat-penalty",
            "above 0 (1 is off)",
            self.repeat_penalty,
        )?;
        let penalty = |name, x: f32| {
            fine((-100.0..=100.0).contains(&x), name, "from -100 to 100 (0 is off)", x)
        };
        penalty("presence-penalty", self.presence_penalty)?;
        penalty("frequency-penalty", self.frequency_penalty)
    }

    /// Whether tokens are penalised for having occurred.
    pub(super) fn penalises(&self) -> bool {
        self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// A logit less the penalties of a token that occurred `count` times.
    pub(super) fn penalised(&self, x: f32, count: u32) -> f32 {
        let x = if x > 0.0 { x / self.repeat_penalty } else { x * self.repeat_penalty };
        x - count as f32 * self.frequency_penalty - self.presence_penalty
    }

    /// Whether the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The warping of the draft: the same, as ratios of unequally warped distributions mean
    /// nothing. Only when the target is greedy is the draft left unwarped but for the penalties,
    /// so that its probabilities still rank candidates.
    pub fn for_draft(&self) -> Warp {
        if self.is_greedy() {
            let neutral = Warp::default();
            Warp {
                temperature: neutral.temperature,
                top_k: neutral.top_k,
                top_p: neutral.top_p,
                min_p: neutral.min_p,
                ..*self
            }
        } else {
            *self
        }
    }

    /// The least that a model must return for [`super::Distribution::fill`] to be exact. `whole`:
    /// the model's rows have no entries beyond those that may be drawn. `largest`: only so many of
    /// the most probable tokens are going to be looked at, if that is known. `score`: the row is
    /// also going to be scored ([`super::unwarped_log_prob`]).
    pub fn want(&self, whole: bool, largest: Option<usize>, score: bool) -> Want<'static> {
        let unwarped =
            self.temperature == 1.0 && self.top_k == 0 && self.top_p == 1.0 && self.min_p == 0.0;
        let k = match largest {
            _ if self.is_greedy() => 1,
            Some(k) if unwarped => k,
            _ => self.top_k,
        };
        // A penalty may change which tokens are the largest.
        if whole && !self.penalises() && (1..=MOST_READ_AS_TOP).contains(&k) {
            // Renormalised survivors need no log-sum-exp; true probabilities and scores do.
            let sum = score || !(self.is_greedy() || self.top_k > 0);
            Want::Top { k, temperature: sum.then_some(1.0) }
        } else {
            Want::Logits
        }
    }
}

/// The tokens that lead to a row and include its own: the text, then a branch of the tree.
#[derive(Debug, Clone, Copy, Default)]
pub struct Path<'a> {
    /// The text so far.
    pub text: &'a [Token],
    /// Drafted tokens after it.
    pub branch: &'a [Token],
    /// What the text is held to, if anything: the row's distribution is of what may follow.
    pub guide: Option<&'a Guide>,
}

impl<'a> Path<'a> {
    /// The same text with another branch.
    pub fn with(self, branch: &'a [Token]) -> Self {
        Path { branch, ..self }
    }

    /// The different tokens among the last `n`, in `into`, in their order, each with its number.
    pub(super) fn recent(&self, n: usize, into: &mut Vec<(Token, u32)>) {
        into.clear();
        let last = self.branch.iter().rev().chain(self.text.iter().rev()).take(n);
        into.extend(last.map(|&token| (token, 1)));
        into.sort_unstable();
        into.dedup_by(|next, kept| {
            let is_same = next.0 == kept.0;
            kept.1 += u32::from(is_same);
            is_same
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_setting() {
        let neutral = Warp::default();
        assert!(neutral.validate().is_ok());
        for (warp, name) in [
            (Warp { temperature: -0.1, ..neutral }, "temperature"),
            (Warp { temperature: f32::NAN, ..neutral }, "temperature"),
            (Warp { top_p: 0.0, ..neutral }, "top-p"),
            (Warp { top_p: 1.1, ..neutral }, "top-p"),
            (Warp { min_p: -0.1, ..neutral }, "min-p"),
            (Warp { repeat_penalty: 0.0, ..neutral }, "repeat-penalty"),
            (Warp { repeat_penalty: f32::INFINITY, ..neutral }, "repeat-penalty"),
            (Warp { presence_penalty: f32::NAN, ..neutral }, "presence-penalty"),
            (Warp { frequency_penalty: 101.0, ..neutral }, "frequency-penalty"),
        ] {
            let message = warp.validate().unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }

    #[test]
    fn a_row_returns_no_more_than_is_needed() {
        let neutral = Warp::default();
        let top = |k| Want::Top { k, temperature: None };
        let summed = |k| Want::Top { k, temperature: Some(1.0) };
        let greedy = Warp { temperature: 0.0, ..neutral };
        assert_eq!(greedy.want(true, None, false), top(1));
        assert_eq!(greedy.want(true, None, true), summed(1));
        assert_eq!(greedy.want(false, None, false), Want::Logits);
        assert_eq!(greedy.for_draft().want(true, Some(4), false), summed(4));
        assert_eq!(neutral.want(true, None, false), Want::Logits);
        let few = Warp { top_k: 40, temperature: 0.7, ..neutral };
        assert_eq!(few.want(true, None, false), top(40));
        for penalised in [
            Warp { repeat_penalty: 1.1, ..greedy },
            Warp { presence_penalty: 0.5, ..greedy },
            Warp { frequency_penalty: -0.5, ..greedy },
        ] {
            assert_eq!(penalised.want(true, None, false), Want::Logits);
            assert_eq!(penalised.for_draft(), Warp { temperature: 1.0, ..penalised });
        }
    }

    #[test]
    fn the_path_ends_with_the_branch() {
        let path = Path { text: &[1, 2, 3, 3], branch: &[9, 3], guide: None };
        let mut recent = Vec::new();
        path.recent(4, &mut recent);
        assert_eq!(recent, [(3, 3), (9, 1)]);
        path.recent(100, &mut recent);
        assert_eq!(recent, [(1, 1), (2, 1), (3, 3), (9, 1)]);
    }
}
