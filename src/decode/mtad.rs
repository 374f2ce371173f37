//! Multi-token assisted decoding (Qin et al., ICLR 2025, arXiv 2407.09722): blocks are drafted and
//! accepted by their *joint* likelihood.
//!
//! The draft proposes a block by beam sampling, the target scores it in one pass, and the longest
//! prefix with joint p / joint q > tau is accepted. So every accepted block satisfies that, and tau
//! trades the text's likelihood under the target for speed. At temperature 0 beam sampling is beam
//! search, and the text is the target's greedy one.

use super::{Algorithm, Block, Kept, Phase, Round, Settings, draft_of, eval_chain, want};
use crate::error::Result;
use crate::model::lm::{Batch, Row, Token};
use crate::sampling::{Distribution, Path, Rng, pick};

/// MTAD, verifying one chain of drafted tokens.
#[derive(Debug, Default)]
pub struct Mtad {
    beams: Beams,
    /// What follows each beam.
    q: Vec<Distribution>,
    /// What follows the pending token and each drafted one.
    p: Vec<Distribution>,
    /// The tokens of a path.
    branch: Vec<Token>,
}

impl Algorithm for Mtad {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (text, gamma, vocab) = (round.text, round.gamma, round.models.vocab());
        let settings = round.settings;
        let (warp, width) = (&settings.warp, settings.beam_width);

        round.timeline.enter(Phase::Draft);
        let q_warp = warp.for_draft();
        let draft = draft_of(&mut round.models, settings.strategy)?;
        // Beam search looks at the most probable tokens alone.
        let q_want = want(&q_warp, draft, vocab, warp.is_greedy().then_some(width));
        self.q.resize_with(width.max(self.q.len()), Distribution::default);
        let rows = eval_chain(draft, text, &[], (gamma - 1) * width, q_want)?;
        let pending = rows.row(0);
        // Nodes are evaluated in their order, right after the pending token.
        let row_of = |node: Option<usize>| node.map_or(pending, |n| Row(pending.0 + 1 + n as u32));
        self.q[0].fill(rows.get(0), vocab, &q_warp, Path { text, branch: &[] })?;
        self.beams.reset();
        self.beams.grow(&mut self.q, settings, round.rng);
        for _ in 1..gamma {
            let mut batch = Batch::new();
            for beam in &self.beams.live {
                let node = &self.beams.nodes[beam.node.expect("a grown beam has a token")];
                batch.push(node.token, Some(row_of(node.parent)), q_want);
            }
            let outputs = draft.eval(&batch)?;
            for (i, beam) in self.beams.live.iter().enumerate() {
                self.beams.tokens(beam.node, &mut self.branch);
                let path = Path { text, branch: &self.branch };
                self.q[i].fill(outputs.get(i), vocab, &q_warp, path)?;
            }
            self.beams.grow(&mut self.q, settings, round.rng);
        }
        let best = self.beams.best().node;
        self.beams.tokens(best, &mut self.branch);
        let nodes = self.beams.path(best);

        round.timeline.enter(Phase::Verify);
        let target = &mut *round.models.target;
        let p_want = want(warp, target, vocab, None);
        let rows = eval_chain(target, text, &self.branch, 0, p_want)?;

        round.timeline.enter(Phase::Sample);
        block.drafted = gamma;
        self.p.resize_with((gamma + 1).max(self.p.len()), Distribution::default);
        let log_tau = settings.tau.ln();
        let (mut log_p, mut log_q) = (0.0, 0.0);
        let path_of = |i: usize| Path { text, branch: &self.branch[..i] };
        for (i, (&token, &node)) in self.branch.iter().zip(&nodes).enumerate() {
            self.p[i].fill(rows.get(i), vocab, warp, path_of(i))?;
            log_p += self.p[i].log_prob(token);
            log_q += self.beams.nodes[node].log_q;
            // A longer prefix may pass where a shorter one failed, so this goes on, unless
            // nothing longer can have any probability.
            if log_p - log_q > log_tau {
                (block.accepted, block.log_p, block.log_q) = (i + 1, log_p, log_q);
            }
            if log_p == f64::NEG_INFINITY {
                break;
            }
        }
        if block.accepted == gamma {
            self.p[gamma].fill(rows.get(gamma), vocab, warp, path_of(gamma))?;
        }
        block.tokens.extend_from_slice(&self.branch[..block.accepted]);
        block.tokens.push(self.p[block.accepted].draw(round.rng));
        if settings.score {
            rows.score(block, vocab);
        }
        // The draft has not evaluated the last drafted token.
        let in_draft = nodes[..block.accepted.min(gamma - 1)].last().copied();
        Ok(Kept { target: Some(rows.row(block.accepted)), draft: Some(row_of(in_draft)) })
    }
}

/// A drafted token.
#[derive(Debug, Clone, Copy)]
struct Node {
    /// The node before it; `None` is the pending token.
    parent: Option<usize>,
    token: Token,
    /// ln q(token) after its parent.
    log_q: f64,
}

/// The end of a drafted path.
#[derive(Debug, Clone, Copy)]
struct Beam {
    node: Option<usize>,
    /// Joint probability of the path, normalised over the beams that are alive.
    weight: f64,
}

/// Beam sampling: paths that are drawn, step by step, by their joint probability.
#[derive(Debug, Default)]
struct Beams {
    nodes: Vec<Node>,
    live: Vec<Beam>,
    next: Vec<Beam>,
    /// Of beam search: the most probable token that each beam still has to offer, and the pair's
    /// probability.
    offers: Vec<(Token, f64)>,
}

impl Beams {
    /// Begins with one beam, of no drafted tokens.
    fn reset(&mut self) {
        self.nodes.clear();
        self.live.clear();
        self.live.push(Beam { node: None, weight: 1.0 });
    }

    /// One step: draws pairs of a beam and a token that follows it by weight x q(token | beam), as
    /// many as the width, or as have mass when drawing without replacement. At temperature 0 takes
    /// the most probable pairs. `q[i]` is what follows beam i.
    fn grow(&mut self, q: &mut [Distribution], settings: &Settings, rng: &mut Rng) {
        let search = settings.warp.is_greedy();
        self.offers.clear();
        if search {
            let offers = self.live.iter().zip(&*q).map(|(beam, q)| offer(beam, q));
            self.offers.extend(offers);
        }
        self.next.clear();
        for _ in 0..settings.beam_width {
            let drawn = if search { self.most_probable() } else { self.draw(q, rng) };
            let Some((i, token)) = drawn else { break };
            let (beam, q) = (self.live[i], &mut q[i]);
            self.next
                .push(Beam { node: Some(self.nodes.len()), weight: beam.weight * q.prob(token) });
            self.nodes.push(Node { parent: beam.node, token, log_q: q.log_prob(token) });
            if search || !settings.with_replacement {
                q.remove(token);
            }
            if search {
                self.offers[i] = offer(&beam, q);
            }
        }
        std::mem::swap(&mut self.live, &mut self.next);
        let sum: f64 = self.live.iter().map(|beam| beam.weight).sum();
        self.live.iter_mut().for_each(|beam| beam.weight /= sum);
    }

    /// The pair with the largest probability (ties: the earlier beam).
    fn most_probable(&self) -> Option<(usize, Token)> {
        let mut best = None;
        for (i, &(token, prob)) in self.offers.iter().enumerate() {
            if prob > best.map_or(0.0, |(_, _, most)| most) {
                best = Some((i, token, prob));
            }
        }
        best.map(|(i, token, _)| (i, token))
    }

    /// Draws a pair: a beam by what its pairs have of the mass, then a token of it.
    fn draw(&self, q: &[Distribution], rng: &mut Rng) -> Option<(usize, Token)> {
        let masses = || self.live.iter().zip(q).map(|(beam, q)| beam.weight * q.mass());
        let mut at = rng.uniform() * masses().sum::<f64>();
        let i = pick(masses().enumerate(), &mut at)?;
        Some((i, q[i].draw(rng)))
    }

    /// The beam of the largest weight (ties: the earlier one).
    fn best(&self) -> Beam {
        let mut best = self.live[0];
        for beam in &self.live[1..] {
            if beam.weight > best.weight {
                best = *beam;
            }
        }
        best
    }

    /// The nodes from the pending token's child to `node`.
    fn path(&self, node: Option<usize>) -> Vec<usize> {
        let mut path: Vec<usize> = std::iter::successors(node, |&n| self.nodes[n].parent).collect();
        path.reverse();
        path
    }

    /// The tokens of that path.
    fn tokens(&self, node: Option<usize>, into: &mut Vec<Token>) {
        into.clear();
        into.extend(
            std::iter::successors(node, |&n| self.nodes[n].parent).map(|n| self.nodes[n].token),
        );
        into.reverse();
    }
}

/// The most probable token that follows a beam, and the pair's probability; 0 if none is left.
fn offer(beam: &Beam, q: &Distribution) -> (Token, f64) {
    let token = q.argmax();
    (token, beam.weight * q.prob(token))
}
