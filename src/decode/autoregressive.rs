//! One token at a time from the target: greedy (temperature 0) and sampling.
//!
//! The baseline of every comparison, and what other strategies fall back to when the context has
//! no room for a draft.

use super::{Algorithm, Block, Kept, Phase, Round, eval_chain, want};
use crate::error::Result;
use crate::sampling::{Distribution, Path};

/// Autoregressive decoding.
#[derive(Debug, Default)]
pub struct Autoregressive {
    p: Distribution,
}

impl Algorithm for Autoregressive {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (vocab, warp, text) = (round.models.vocab(), &round.settings.warp, round.text);
        round.timeline.enter(Phase::Verify);
        let target = &mut *round.models.target;
        let want = want(warp, target, vocab, None);
        let rows = eval_chain(target, text, &[], 0, want)?;

        round.timeline.enter(Phase::Sample);
        self.p.fill(rows.get(0), vocab, warp, Path { text, branch: &[] })?;
        block.tokens.push(self.p.draw(round.rng));
        if round.settings.score {
            rows.score(block, vocab);
        }
        Ok(Kept { target: Some(rows.row(0)), draft: None })
    }
}
