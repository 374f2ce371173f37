//! One token at a time from the target: greedy (temperature 0) and sampling.
//!
//! The baseline of every comparison, and what other strategies fall back to when the context has
//! no room for a draft.

use super::{Algorithm, Block, Descriptor, Kept, Round, verify_chain};
use crate::error::Result;
use crate::sampling::{Distribution, Path};

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
        let (vocab, warp, text) = (round.models.vocab(), &round.settings.warp, round.text);
        let target = &mut *round.models.target;
        let rows = verify_chain(target, round.timeline, round.settings, vocab, text, &[])?;
        self.p.fill(rows.get(0), vocab, warp, Path { text, branch: &[] })?;
        block.tokens.push(self.p.draw(round.rng));
        rows.score(block, 0.., vocab, round.settings);
        Ok(Kept { target: Some(rows.row(0)), draft: None })
    }
}
