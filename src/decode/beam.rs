//! Beam decoding by the target alone: beam sampling, at temperature 0 beam search.
//!
//! Beams of the whole text compete by joint likelihood, and a token is emitted as soon as all live
//! beams agree on it. Between rounds the beams beyond the emitted text are remembered as tokens and
//! evaluated again with the next pass, as rows beside the pending token's. They may be ahead of the
//! text by so many tokens that all of them fit in half a tree; beyond that the best beam decides
//! on the next token and those that differ from it are dropped. At the end of the context the best
//! beam is emitted whole.

use super::beams::{Beam, Beams, Sampling};
use super::{Algorithm, Block, Descriptor, Kept, Knob, Phase, Round};
use crate::error::Result;
use crate::lm::{MAX_TREE, Token};

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "beam",
    summary: "beams of the target, over its whole text",
    needs_draft: false,
    knobs: &[Knob::BeamWidth, Knob::WithReplacement],
    rows: |_| 0,
    draft_length: |s| s.gamma,
    algorithm: || Box::<BeamDecoding>::default(),
};

/// Beam sampling by the target.
#[derive(Debug, Default)]
pub struct BeamDecoding {
    beams: Beams,
    /// The text that the beams go on from.
    text: Vec<Token>,
}

impl Algorithm for BeamDecoding {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (path, text, vocab) = (round.path(), round.text, round.models.vocab());
        let how = Sampling::of_target(round.settings);
        round.timeline.enter(Phase::Verify);
        let target = &mut *round.models.target;
        if self.text != text {
            self.beams.reset();
        }
        // After an error the beams are not those of any text.
        self.text.clear();
        let most_ahead = (MAX_TREE / 2 / how.width).max(1);
        let begun = self.beams.begin(target, path, vocab, 0, &how, round.rng)?;
        if let (false, Some(guide)) = (begun, round.guide) {
            return Err(guide.refusal());
        }
        let emitted = loop {
            let best = self.beams.path(self.beams.best().node);
            // The newest nodes would be evaluated at the position of the last of `best`.
            if text.len() + best.len() > target.capacity() {
                break best;
            }
            let agreed = self.agreed(&best);
            if agreed > 0 {
                break best[..agreed].to_vec();
            }
            let rows = self.beams.row(None).0 as usize + 1 + self.beams.nodes.len();
            if best.len() >= most_ahead || rows > MAX_TREE {
                break best[..1].to_vec();
            }
            if !self.beams.extend(target, path, vocab, &how, round.rng)? {
                // No beam can go on, which the next round finds too if it is so for the text.
                break best[..1].to_vec();
            }
        };

        round.timeline.enter(Phase::Sample);
        for &node in &emitted {
            let node = &self.beams.nodes[node];
            block.tokens.push(node.token);
            if how.scoring.is_some() {
                block.scores.push(node.score.clone());
            }
        }
        let (&tip, before) = emitted.split_last().expect("a token is emitted");
        let kept = self.beams.row(before.last().copied());
        self.go_on_from(tip);
        self.text.extend_from_slice(text);
        self.text.extend_from_slice(&block.tokens);
        Ok(Kept { target: Some(kept), draft: None })
    }
}

impl BeamDecoding {
    /// How many nodes of a path all live beams have in common.
    fn agreed(&self, path: &[usize]) -> usize {
        let common = |beam: &Beam| {
            let other = self.beams.path(beam.node);
            path.iter().zip(&other).take_while(|(a, b)| self.same(**a, **b)).count()
        };
        self.beams.live.iter().map(common).min().unwrap_or(0)
    }

    /// Whether two nodes at the same place are the same token; nodes drawn twice are separate.
    fn same(&self, a: usize, b: usize) -> bool {
        self.beams.nodes[a].token == self.beams.nodes[b].token
    }

    /// Drops the beams that do not go through the tokens of `tip`'s path, and what the others have
    /// up to there.
    fn go_on_from(&mut self, tip: usize) {
        let beams = &mut self.beams;
        let depth = beams.path(Some(tip)).len();
        let (mut start, mut tokens) = (Vec::new(), Vec::new());
        beams.tokens(Some(tip), &mut start);
        let mut nodes = Vec::new();
        let mut live = Vec::new();
        // Old and new places of the nodes that stay.
        let mut moved: Vec<(usize, usize)> = Vec::new();
        for beam in &beams.live {
            beams.tokens(beam.node, &mut tokens);
            if !tokens.starts_with(&start) {
                continue;
            }
            let mut parent = None;
            for &old in &beams.path(beam.node)[depth..] {
                let new = match moved.iter().find(|(from, _)| *from == old) {
                    Some(&(_, new)) => new,
                    None => {
                        moved.push((old, nodes.len()));
                        nodes.push(super::beams::Node { parent, ..beams.nodes[old].clone() });
                        nodes.len() - 1
                    }
                };
                parent = Some(new);
            }
            live.push(Beam { node: parent, weight: beam.weight });
        }
        beams.reset();
        (beams.nodes, beams.live) = (nodes, live);
        beams.normalize();
    }
}
