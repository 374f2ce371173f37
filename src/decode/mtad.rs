//! Multi-token assisted decoding (Qin et al., ICLR 2025, arXiv 2407.09722): blocks are drafted and
//! accepted by their *joint* likelihood.
//!
//! The draft proposes a block by beam sampling, the target scores it in one pass, and the longest
//! prefix with joint p / joint q > tau is accepted. So every accepted block satisfies that, and tau
//! trades the text's likelihood under the target for speed. At temperature 0 beam sampling is beam
//! search, and the text is the target's greedy one.

use super::beams::{Beams, Sampling};
use super::{
    Algorithm, Block, Descriptor, Kept, Knob, Phase, Round, draft_of, fill_target, verify_chain,
};
use crate::error::{Error, Result};
use crate::lm::Token;
use crate::sampling::Distribution;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "mtad",
    summary: "multi-token joint decoding: blocks whose joint likelihood ratio clears tau",
    needs_draft: true,
    knobs: &[Knob::Tau, Knob::Gamma, Knob::BeamWidth, Knob::WithReplacement],
    rows: |s| (s.gamma - 1) * s.beam_width,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Mtad>::default(),
};

/// MTAD, verifying one chain of drafted tokens.
#[derive(Debug, Default)]
pub struct Mtad {
    beams: Beams,
    /// What follows the pending token and each drafted one.
    p: Vec<Distribution>,
    /// The tokens of the best beam.
    branch: Vec<Token>,
}

impl Algorithm for Mtad {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (start, gamma, vocab) = (round.path(), round.gamma, round.models.vocab());
        let settings = round.settings;
        let warp = &settings.warp;

        round.timeline.enter(Phase::Draft);
        let (shared, reader) = (round.models.shared(), round.models.draft_reader());
        let draft = draft_of(&mut round.models, settings.strategy)?;
        let how = Sampling::of_draft(settings, reader);
        let sampled = self.beams.sample(draft, start, shared, gamma, &how, round.rng);
        let gamma = sampled.map_err(Error::of_draft)?;
        let best = self.beams.best().node;
        self.beams.tokens(best, &mut self.branch);
        let nodes = self.beams.path(best);

        let target = &mut *round.models.target;
        let rows = verify_chain(target, round.timeline, settings, vocab, start, &self.branch)?;

        block.drafted = gamma;
        self.p.resize_with((gamma + 1).max(self.p.len()), Distribution::default);
        let log_tau = settings.tau.ln();
        let (mut log_p, mut log_q) = (0.0, 0.0);
        let path_of = |i: usize| start.with(&self.branch[..i]);
        for (i, (&token, &node)) in self.branch.iter().zip(&nodes).enumerate() {
            fill_target(&mut self.p[i], rows.get(i), vocab, warp, path_of(i))?;
            let step = (self.p[i].log_prob(token), self.beams.nodes[node].log_prob);
            block.steps.push(step);
            log_p += step.0;
            log_q += step.1;
            // A longer prefix may pass where a shorter one failed, so this goes on, unless
            // nothing longer can have any probability.
            if log_p - log_q > log_tau {
                (block.accepted, block.log_p, block.log_q) = (i + 1, log_p, log_q);
                block.passed |= 1 << i;
            }
            if log_p == f64::NEG_INFINITY {
                break;
            }
        }
        if block.accepted == gamma {
            fill_target(&mut self.p[gamma], rows.get(gamma), vocab, warp, path_of(gamma))?;
        }
        block.tokens.extend_from_slice(&self.branch[..block.accepted]);
        block.tokens.push(self.p[block.accepted].draw(round.rng));
        rows.score(block, 0.., vocab, settings);
        Ok(Kept {
            target: Some(rows.row(block.accepted)),
            draft: Some(self.beams.kept(&nodes, block.accepted)),
        })
    }
}
