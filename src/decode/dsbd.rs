//! Dynamic-width speculative beam decoding (Qin et al., AAAI 2025, arXiv 2409.16560): beam sampling
//! by the target, helped by beams of the draft.
//!
//! The draft samples W beams of gamma tokens; the target scores all their nodes in one pass. Layer
//! by layer, beams of the target are drawn from P(i, x) = w_i p(x | beam i), w_i the joint
//! probability of those drawn in the layer before. Each draw goes through the draft's pairs of the
//! layer, which came from Q(i, x) = v_i q(x | beam i), in their order: a pair is accepted with
//! probability min(1, P / Q), and if it is not, P becomes max(P - Q, 0), normalised; when there are
//! no pairs left, a pair is drawn from what P is then. So every draw is one from P.
//!
//! The width of a layer is the largest number that is likely enough to be accepted: with n pairs
//! left and a = sum min(P, Q), the largest w for which a binomial of n and a reaches w with
//! probability [`SURE`] or more, and 1 at least. (The first acceptance probability stands for all:
//! exact ones would need a residual for each number of rejections.) The round ends in the first
//! layer where a pair had to be drawn, or after the last, and commits the best beam alone: one line
//! in the cache between rounds. If that beam is one of the draft's, one more token is drawn after
//! it.
//!
//! With one beam it is speculative sampling; at temperature 0 the text is the greedy one.

use super::beams::{Beams, Sampling};
use super::{
    Algorithm, Block, Descriptor, Kept, Knob, Phase, Round, Rows, draft_of, fill_target,
    verify_nodes,
};
use crate::error::{Error, Result, TARGET};
use crate::lm::Token;
use crate::sampling::{Distribution, Guide, Removed, pick};

/// How likely a layer's width must be to be accepted.
const SURE: f64 = 0.7;

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "dsbd",
    summary: "beams of the target, helped by beams of the draft",
    needs_draft: true,
    knobs: &[Knob::Gamma, Knob::BeamWidth],
    rows: |s| s.gamma * s.beam_width,
    draft_length: |s| s.gamma,
    algorithm: || Box::<Dsbd>::default(),
};

/// DSBD.
#[derive(Debug, Default)]
pub struct Dsbd {
    beams: Beams,
    layer: Layer,
    branch: Vec<Token>,
    /// What follows the best beam.
    next: Distribution,
}

/// A beam of the target.
#[derive(Debug, Clone, Copy)]
struct TargetBeam {
    /// Its last node in the draft's tree; `None` is the pending token.
    node: Option<usize>,
    /// A token after it, if that is not the draft's.
    drawn: Option<Token>,
    /// Joint p of the path, relative to the other beams of the layer.
    weight: f64,
    /// ln of the joint p up to `node`.
    log_p: f64,
}

/// The joint distribution P of one layer, while beams are drawn from it.
#[derive(Debug, Default)]
struct Layer {
    /// The beams before this layer, with normalised weights.
    before: Vec<TargetBeam>,
    /// What follows each of them: P(i, x) is proportional to `scale` times its probability of x.
    p: Vec<Distribution>,
    scale: Vec<f64>,
    /// Whether P is a residual.
    residual: bool,
    /// Pairs that were drawn already, to be left out.
    taken: Vec<(usize, Token)>,
}

impl Algorithm for Dsbd {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (start, gamma, vocab) = (round.path(), round.gamma, round.models.vocab());
        let settings = round.settings;

        round.timeline.enter(Phase::Draft);
        let (shared, reader) = (round.models.shared(), round.models.draft_reader());
        let draft = draft_of(&mut round.models, settings.strategy)?;
        let how = Sampling { keep: true, ..Sampling::of_draft(settings, reader) };
        let sampled = self.beams.sample(draft, start, shared, gamma, &how, round.rng);
        let gamma = sampled.map_err(Error::of_draft)?;

        let nodes = self.beams.nodes.iter().map(|node| (node.token, node.parent));
        let target = &mut *round.models.target;
        let rows = verify_nodes(target, round.timeline, settings, vocab, start, nodes)?;
        block.drafted = gamma;

        let distinct = how.search || !how.with_replacement;
        let mut alive = vec![TargetBeam { node: None, drawn: None, weight: 1.0, log_p: 0.0 }];
        for step in 0..gamma {
            let first = self.beams.steps[step];
            let end = self.beams.steps.get(step + 1).copied().unwrap_or(self.beams.nodes.len());
            // The draft's beams before this layer.
            let sources: Vec<Option<usize>> = match step {
                0 => vec![None],
                _ => (self.beams.steps[step - 1]..first).map(Some).collect(),
            };
            let layer = &mut self.layer;
            let sum: f64 = alive.iter().map(|beam| beam.weight).sum();
            alive.iter_mut().for_each(|beam| beam.weight /= sum);
            std::mem::swap(&mut layer.before, &mut alive);
            alive.clear();
            layer.taken.clear();
            let fill = |layer: &mut Layer, beams: &Beams, branch: &mut Vec<Token>| {
                layer.fill(&rows, |node, p, output| {
                    beams.tokens(node, branch);
                    p.fill(output, vocab, &settings.warp, start.with(branch))
                })
            };
            fill(layer, &self.beams, &mut self.branch)?;
            let likely = 1.0 - layer.excess(&self.beams, 1.0);
            let width = likely_width(end - first, likely).min(settings.beam_width);

            let mut removed: Vec<(Option<usize>, Removed)> = Vec::new();
            let mut candidates = first..end;
            let mut ended = false;
            while alive.len() < width && layer.mass() > 0.0 {
                let mut found = None;
                for n in candidates.by_ref() {
                    let node = self.beams.nodes[n].clone();
                    // Less than 1 where pairs were taken out, and where a beam has none.
                    let mass = |&s: &Option<usize>| {
                        weight_of(&self.beams, s) * self.beams.following(s).mass()
                    };
                    let left: f64 = sources.iter().map(mass).sum();
                    let q = weight_of(&self.beams, node.parent)
                        * self.beams.following(node.parent).prob(node.token)
                        / left;
                    let i = layer.before.iter().position(|beam| beam.node == node.parent);
                    let p = i.map_or(0.0, |i| {
                        layer.scale[i] * layer.p[i].prob(node.token) / layer.mass()
                    });
                    let accepted = round.rng.uniform() * q < p;
                    if !accepted {
                        layer.subtract(&self.beams, 1.0 / left);
                    }
                    if distinct {
                        let q = self.beams.following_mut(node.parent);
                        removed.push((node.parent, q.remove(node.token)));
                    }
                    if let (true, Some(i)) = (accepted, i) {
                        found = Some((i, node.token, Some(n)));
                        break;
                    }
                    if layer.mass() <= 0.0 {
                        // Rounding left nothing of the residual, so P and Q are the same.
                        fill(layer, &self.beams, &mut self.branch)?;
                    }
                }
                let (i, token, node) = match found {
                    Some(found) => found,
                    None => {
                        ended = true;
                        let (i, token) = layer.draw(round.rng);
                        (i, token, None)
                    }
                };
                if layer.residual {
                    fill(layer, &self.beams, &mut self.branch)?;
                }
                let before = layer.before[i];
                let log_p = layer.p[i].log_prob(token);
                alive.push(TargetBeam {
                    node: node.or(before.node),
                    drawn: node.is_none().then_some(token),
                    weight: before.weight * log_p.exp(),
                    log_p: before.log_p + if node.is_some() { log_p } else { 0.0 },
                });
                if distinct {
                    layer.p[i].remove(token);
                    layer.taken.push((i, token));
                }
            }
            for (node, removed) in removed {
                self.beams.following_mut(node).restore([removed]);
            }
            if ended || alive.is_empty() {
                break;
            }
        }

        let Some(&(mut best)) = alive.first() else {
            let nothing = Error::NotFinite { model: TARGET.to_owned() };
            return Err(round.guide.map_or(nothing, Guide::refusal));
        };
        for beam in &alive[1..] {
            if beam.weight > best.weight {
                best = *beam;
            }
        }
        let path = self.beams.path(best.node);
        block.accepted = path.len();
        block.log_p = best.log_p;
        block.log_q = path.iter().map(|&node| self.beams.nodes[node].log_prob).sum();
        block.tokens.extend(path.iter().map(|&node| self.beams.nodes[node].token));
        let row = path.last().map_or(0, |node| node + 1);
        let next = match best.drawn {
            Some(token) => token,
            None => {
                let p = &mut self.next;
                let path = start.with(&block.tokens);
                fill_target(p, rows.get(row), vocab, &settings.warp, path)?;
                p.draw(round.rng)
            }
        };
        block.tokens.push(next);
        let before = std::iter::once(0).chain(path.iter().map(|node| node + 1));
        rows.score(block, before, vocab, settings);
        Ok(Kept {
            target: Some(rows.row(row)),
            draft: Some(self.beams.kept(&path, block.accepted)),
        })
    }
}

/// The weight v of a beam of the draft.
fn weight_of(beams: &Beams, node: Option<usize>) -> f64 {
    node.map_or(1.0, |node| beams.nodes[node].weight)
}

impl Layer {
    /// Makes P what it is before any draw, without the pairs that were taken.
    fn fill<'a>(
        &mut self,
        rows: &Rows<'a>,
        mut fill: impl FnMut(Option<usize>, &mut Distribution, crate::lm::Output<'a>) -> Result<()>,
    ) -> Result<()> {
        let count = self.before.len();
        self.p.resize_with(count.max(self.p.len()), Distribution::default);
        self.scale.clear();
        for (beam, p) in self.before.iter().zip(&mut self.p) {
            fill(beam.node, p, rows.get(beam.node.map_or(0, |node| node + 1)))?;
            self.scale.push(beam.weight);
        }
        for &(i, token) in &self.taken {
            self.p[i].remove(token);
        }
        self.residual = false;
        Ok(())
    }

    /// The sum of P, which is not normalised.
    fn mass(&self) -> f64 {
        self.scale.iter().zip(&self.p).map(|(scale, p)| scale * p.mass()).sum()
    }

    /// The sum of max(P - Q, 0), with Q times `scale`.
    fn excess(&self, beams: &Beams, scale: f64) -> f64 {
        let mass = self.mass();
        let each = |i: usize| {
            let node = self.before[i].node;
            let v = weight_of(beams, node) * scale;
            self.p[i].excess(self.scale[i] / mass, beams.following(node), v)
        };
        (0..self.before.len()).map(each).sum()
    }

    /// Makes P max(P - Q, 0), with Q times `scale`.
    fn subtract(&mut self, beams: &Beams, scale: f64) {
        let mass = self.mass();
        for (i, beam) in self.before.iter().enumerate() {
            let v = weight_of(beams, beam.node) * scale;
            let q = beams.following(beam.node);
            self.p[i].subtract_scaled(self.scale[i] / mass, q, v);
            self.scale[i] = 1.0;
        }
        self.residual = true;
    }

    /// Draws a pair from P.
    fn draw(&self, rng: &mut crate::sampling::Rng) -> (usize, Token) {
        let masses = self.scale.iter().zip(&self.p).map(|(scale, p)| scale * p.mass());
        let mut at = rng.uniform() * self.mass();
        let i = pick(masses.enumerate(), &mut at).expect("some mass is left");
        (i, self.p[i].draw(rng))
    }
}

/// The largest number that a binomial of `n` trials of probability `a` reaches with probability
/// [`SURE`]; 1 at least.
fn likely_width(n: usize, a: f64) -> usize {
    let a = a.clamp(0.0, 1.0);
    // Probabilities of each number of successes, trial by trial.
    let mut exactly = vec![0.0; n + 1];
    exactly[0] = 1.0;
    for trial in 1..=n {
        for k in (1..=trial).rev() {
            exactly[k] = exactly[k] * (1.0 - a) + exactly[k - 1] * a;
        }
        exactly[0] *= 1.0 - a;
    }
    let mut at_least = 0.0;
    for k in (1..=n).rev() {
        at_least += exactly[k];
        if at_least >= SURE {
            return k;
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_width_is_likely_to_be_accepted() {
        assert_eq!(likely_width(4, 1.0), 4);
        assert_eq!(likely_width(4, 0.0), 1);
        // 1 - 0.5^4 - 4 * 0.5^4 = 0.6875 is not enough for two.
        assert_eq!(likely_width(4, 0.5), 1);
        assert_eq!(likely_width(5, 0.5), 2);
    }
}
