//! Typical acceptance (Cai et al. 2024, arXiv 2401.10774, section 3.2): a drafted token is accepted
//! where the target finds it typical, whatever the draft thought of it. Lossy.
//!
//! y_i is accepted while p(y_i) > min(epsilon, delta exp(-H(p))), H the entropy of p: where the
//! target is undecided, less probable tokens do. At epsilon 0 every token that has any probability
//! is accepted. At temperature 0 the text is the greedy one.

use super::chain::Chain;
use super::{Algorithm, Block, Descriptor, Kept, Knob, Round};
use crate::error::Result;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "typical",
    summary: "drafted tokens that are typical of the target",
    needs_draft: true,
    knobs: &[Knob::Gamma, Knob::Epsilon, Knob::Delta],
    rows: |_| 0,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Typical>::default(),
};

/// Typical acceptance.
#[derive(Debug, Default)]
pub struct Typical {
    chain: Chain,
}

impl Algorithm for Typical {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (epsilon, delta) = (round.settings.epsilon, round.settings.delta);
        self.chain.round(round, block, 0.0, |p, _, token, _| {
            let prob = p.prob(token);
            // The entropy is a sum over the vocabulary; above epsilon nobody needs it.
            prob > epsilon || prob > 0.0 && prob > delta * (-p.entropy()).exp()
        })
    }
}
