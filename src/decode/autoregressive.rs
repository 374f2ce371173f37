//! One token at a time from the target: greedy (temperature 0) and sampling.
//!
//! The baseline of every comparison, and what other strategies fall back to when the context has
//! no room for a draft.

use super::{Algorithm, Block, Descriptor, Kept, Round, fill_target, verify_chain};
use crate::error::Result;
use crate::sampling::Distribution;

/// What it says of itself.
pub(super) const SAMPLE: Descriptor = Descriptor {
    name: "sample",
    summary: "draws from the target, one token at a time",
    needs_draft: false,
    knobs: &[],
    rows: |_| 0,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Autoregressive>::default(),
};

/// What it says of itself.
pub(super) const GREEDY: Descriptor = Descriptor {
    name: "greedy",
    summary: "the most probable token of the target, one at a time",
    needs_draft: false,
    knobs: &[],
    rows: |_| 0,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Autoregressive>::default(),
};

/// Autoregressive decoding.
#[derive(Debug, Default)]
pub struct Autoregressive {
    p: Distribution,
}

impl Algorithm for Autoregressive {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (vocab, warp, path) = (round.models.vocab(), &round.settings.warp, round.path());
        let target = &mut *round.models.target;
        let rows = verify_chain(target, round.timeline, round.settings, vocab, path, &[])?;
        fill_target(&mut self.p, rows.get(0), vocab, warp, path)?;
        block.tokens.push(self.p.draw(round.rng));
        rows.score(block, 0.., vocab, round.settings);
        Ok(Kept { target: Some(rows.row(0)), draft: None })
    }
}
