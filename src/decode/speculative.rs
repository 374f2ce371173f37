//! Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023,
//! arXiv 2302.01318): the text is distributed exactly as the target's own.
//!
//! The draft draws y_1..y_gamma, the target scores them in one pass, y_i is accepted with
//! probability min(1, p(y_i) / q(y_i)), and the first rejected token is replaced by a draw from
//! max(p - q, 0), normalised. If none is rejected, one more is drawn from p.

use super::chain::Chain;
use super::{Algorithm, Block, Descriptor, Kept, Knob, Round};
use crate::error::Result;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "speculative",
    summary: "speculative sampling: the distribution of the target, exactly",
    needs_draft: true,
    knobs: &[Knob::Gamma],
    rows: |_| 0,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Speculative>::default(),
};

/// Speculative sampling.
#[derive(Debug, Default)]
pub struct Speculative {
    chain: Chain,
}

impl Algorithm for Speculative {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        self.chain.round(round, block, 0.0, |p, q, token, rng| {
            let accepted = rng.uniform() * q.prob(token) < p.prob(token);
            if !accepted {
                p.subtract(q);
            }
            accepted
        })
    }
}
