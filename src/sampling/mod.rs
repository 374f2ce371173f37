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

use crate::lm::{Output, Token, log_sum_exp};

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
