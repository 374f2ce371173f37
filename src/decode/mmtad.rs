//! Multi-candidate MTAD (Qin et al., ICLR 2025, arXiv 2407.09722): all that the beams ever drafted is
//! verified as a tree, in one pass of the target.
//!
//! The threshold at depth i is tau times the joint q of the first i tokens of the best final beam.
//! The deepest depth wins at which a node has a joint p above it, and there the node with the
//! largest joint p. So of every accepted block: joint p / joint q of the best final beam's first
//! tokens, as many > tau. With one beam it is MTAD; at temperature 0 the text is the greedy one.

use super::beams::{Beams, Sampling};
use super::{
    Algorithm, Block, Descriptor, Kept, Knob, Phase, Round, draft_of, fill_target, verify_nodes,
};
use crate::error::{Error, Result};
use crate::lm::Token;
use crate::sampling::Distribution;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "mmtad",
    summary: "multi-token joint decoding with all beams verified, as a tree",
    needs_draft: true,
    knobs: &[Knob::Tau, Knob::Gamma, Knob::BeamWidth, Knob::WithReplacement],
    rows: |s| s.gamma * s.beam_width,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Mmtad>::default(),
};

/// MTAD, verifying a tree.
#[derive(Debug, Default)]
pub struct Mmtad {
    beams: Beams,
    /// What follows the pending token (the first) and each node.
    p: Vec<Distribution>,
    /// Which of them are of this round.
    filled: Vec<bool>,
    /// ln of the joint p of each node's path.
    joint: Vec<f64>,
    branch: Vec<Token>,
}

impl Algorithm for Mmtad {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (start, gamma, vocab) = (round.path(), round.gamma, round.models.vocab());
        let settings = round.settings;

        round.timeline.enter(Phase::Draft);
        let (shared, reader) = (round.models.shared(), round.models.draft_reader());
        let draft = draft_of(&mut round.models, settings.strategy)?;
        let how = Sampling::of_draft(settings, reader);
        let sampled = self.beams.sample(draft, start, shared, gamma, &how, round.rng);
        let gamma = sampled.map_err(Error::of_draft)?;
        let best = self.beams.path(self.beams.best().node);

        let nodes = self.beams.nodes.iter().map(|node| (node.token, node.parent));
        let target = &mut *round.models.target;
        let rows = verify_nodes(target, round.timeline, settings, vocab, start, nodes)?;

        block.drafted = gamma;
        let count = self.beams.nodes.len();
        self.p.resize_with((count + 1).max(self.p.len()), Distribution::default);
        self.filled.clear();
        self.filled.resize(count + 1, false);
        self.joint.clear();
        // The i-th row belongs to the pending token (0) or to node i - 1.
        let mut fill = |p: &mut [Distribution], node: Option<usize>| {
            let row = node.map_or(0, |node| node + 1);
            if std::mem::replace(&mut self.filled[row], true) {
                return Ok(row);
            }
            self.beams.tokens(node, &mut self.branch);
            let path = start.with(&self.branch);
            fill_target(&mut p[row], rows.get(row), vocab, &settings.warp, path).map(|()| row)
        };
        let log_tau = settings.tau.ln();
        let mut log_q = 0.0;
        let mut chosen = None;
        for (depth, &on_best) in best.iter().enumerate() {
            log_q += self.beams.nodes[on_best].log_prob;
            let end = self.beams.steps.get(depth + 1).copied().unwrap_or(count);
            let mut most = f64::NEG_INFINITY;
            for n in self.beams.steps[depth]..end {
                let node = &self.beams.nodes[n];
                let before = node.parent.map_or(0.0, |parent| self.joint[parent]);
                // What follows an impossible node need not be known.
                let mut log_p = f64::NEG_INFINITY;
                if before > f64::NEG_INFINITY {
                    let row = fill(&mut self.p, node.parent)?;
                    log_p = self.p[row].log_prob(node.token);
                }
                if n == on_best {
                    block.steps.push((log_p, node.log_prob));
                }
                let joint = before + log_p;
                self.joint.push(joint);
                if joint - log_q > log_tau && joint > most {
                    most = joint;
                    chosen = Some(n);
                    (block.accepted, block.log_p, block.log_q) = (depth + 1, joint, log_q);
                    block.passed |= 1 << depth;
                }
            }
        }
        let row = fill(&mut self.p, chosen)?;
        let path = self.beams.path(chosen);
        block.tokens.extend(path.iter().map(|&node| self.beams.nodes[node].token));
        block.tokens.push(self.p[row].draw(round.rng));
        let before = std::iter::once(0).chain(path.iter().map(|node| node + 1));
        rows.score(block, before, vocab, settings);
        Ok(Kept {
            target: Some(rows.row(row)),
            draft: Some(self.beams.kept(&path, block.accepted)),
        })
    }
}
