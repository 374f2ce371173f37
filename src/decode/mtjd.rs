//! Multi-token joint decoding (Qin et al., ICLR 2025, arXiv 2407.09722, section 3): the target alone
//! beam-samples blocks of gamma tokens by their joint likelihood and commits the best beam.
//!
//! It is what MTAD approximates: slow, and the reference of its quality. At temperature 0 it is
//! beam search in blocks, whose text is not the greedy one.

use super::beams::{Beams, Sampling};
use super::{Algorithm, Block, Descriptor, Kept, Knob, Phase, Round};
use crate::error::Result;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "mtjd",
    summary: "beams of the target, in blocks: what mtad approximates",
    needs_draft: false,
    knobs: &[Knob::Gamma, Knob::BeamWidth, Knob::WithReplacement],
    rows: |s| (s.gamma - 1) * s.beam_width,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Mtjd>::default(),
};

/// MTJD.
#[derive(Debug, Default)]
pub struct Mtjd {
    beams: Beams,
}

impl Algorithm for Mtjd {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (path, vocab) = (round.path(), round.models.vocab());
        round.timeline.enter(Phase::Verify);
        let (target, how) = (&mut *round.models.target, Sampling::of_target(round.settings));
        let depth = self.beams.sample(target, path, vocab, round.gamma, &how, round.rng)?;
        if let (0, Some(guide)) = (depth, round.guide) {
            return Err(guide.refusal());
        }

        round.timeline.enter(Phase::Sample);
        let path = self.beams.path(self.beams.best().node);
        for &node in &path {
            let node = &self.beams.nodes[node];
            block.tokens.push(node.token);
            if how.scoring.is_some() {
                block.scores.push(node.score.clone());
            }
        }
        // The last token was not evaluated: it is pending.
        Ok(Kept { target: Some(self.beams.kept(&path, path.len())), draft: None })
    }
}
