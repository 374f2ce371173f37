//! From logits to tokens: warping, distributions, draws, log-probabilities.
//!
//! [`Warp`] holds the settings (temperature, top-k, ...), [`Distribution`] the warped
//! probabilities of one row, [`Rng`] the seeded generator. A distribution is filled again and
//! again: nothing of the vocabulary's size is allocated per step, and nothing is sorted unless a
//! setting needs an order. A [`Constraint`] is a language that texts are held to.

mod constraint;
mod distribution;
mod rng;
mod warp;

pub use constraint::{Constraint, Guide, Mask, Matcher};
pub(crate) use distribution::pick;
pub use distribution::{Distribution, Removed};
pub use rng::{Rng, RngState};
pub use warp::{Path, Warp};

use crate::lm::{Output, Token, largest, log_sum_exp};

/// What the target itself makes of a token: before any warping.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// ln p of the token.
    pub log_prob: f64,
    /// The most probable tokens in its place with their ln p, largest first, as many as were asked for.
    pub alternatives: Vec<(Token, f64)>,
}

/// The [`Score`] of a token, with so many alternatives, for which the row must have returned all logits; otherwise
/// as [`unwarped_log_prob`].
///
/// # Panics
/// If the row did not return that.
pub fn score(output: Output<'_>, token: Token, vocab: usize, alternatives: usize) -> Score {
    match output {
        Output::Logits(logits) if alternatives > 0 => {
            let logits = &logits[..vocab];
            let sum = log_sum_exp(logits, 1.0);
            let mut found = Vec::new();
            largest(logits, alternatives, &mut found);
            let log_prob = |logit: f32| f64::from(logit) - sum;
            Score {
                log_prob: log_prob(logits[token as usize]),
                alternatives: found.into_iter().map(|(token, x)| (token, log_prob(x))).collect(),
            }
        }
        output => {
            assert_eq!(alternatives, 0, "alternatives are found among all logits");
            let log_prob = unwarped_log_prob(output, token, vocab);
            Score { log_prob, alternatives: Vec::new() }
        }
    }
}

/// ln p(token) of a row before any warping, over the first `vocab` entries: what perplexity is
/// made of. A row of the largest logits must hold the token and have been asked for with the
/// log-sum-exp at temperature 1, as [`Warp::want`] does for rows that are to be scored.
///
/// # Panics
/// If the row did not return that.
pub fn unwarped_log_prob(output: Output<'_>, token: Token, vocab: usize) -> f64 {
    match output {
        Output::Logits(logits) => {
            f64::from(logits[token as usize]) - log_sum_exp(&logits[..vocab], 1.0)
        }
        Output::Top { top, log_sum_exp: Some(log_sum_exp) } => {
            let found = top.iter().find(|(t, _)| *t == token);
            f64::from(found.expect("an emitted token is among the largest").1) - log_sum_exp
        }
        other => panic!("a row returned {other:?}, of which nothing can be scored"),
    }
}
