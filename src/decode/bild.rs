//! BiLD, the big little decoder (Kim et al. 2023, arXiv 2302.07863): the draft writes alone while it
//! is sure of itself. Lossy.
//!
//! Fallback: the draft hands over where its largest probability is below a threshold, or at gamma
//! tokens. Rollback: the target scores what was written, and from the first token with
//! -ln p(y_i) above a threshold on, all is taken back and the target goes on with its own token. A
//! token of probability 0 is taken back at every threshold, also an infinite one.

use super::chain::Chain;
use super::{Algorithm, Block, Descriptor, Kept, Knob, Round};
use crate::error::Result;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "bild",
    summary: "the draft goes on while it is sure; the target takes back what it finds too unlikely",
    needs_draft: true,
    knobs: &[Knob::Gamma, Knob::Fallback, Knob::Rollback],
    rows: |_| 0,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Bild>::default(),
};

/// BiLD.
#[derive(Debug, Default)]
pub struct Bild {
    chain: Chain,
}

impl Algorithm for Bild {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (fallback, rollback) = (round.settings.fallback, round.settings.rollback);
        self.chain.round(round, block, fallback, |p, _, token, _| {
            p.prob(token) > 0.0 && -p.log_prob(token) <= rollback
        })
    }
}
