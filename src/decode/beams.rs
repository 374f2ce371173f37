//! Beam sampling and beam search on one model: what MTAD, MMTAD and DSBD draft with, and what MTJD
//! and beam decoding do with the target itself.
//!
//! Beams share one tree of nodes, so extending them copies no cache: each step evaluates the new
//! node of every beam in one pass.

use super::{Reader, Settings, eval_after, want};
use crate::error::Result;
use crate::lm::{Batch, Lm, Outputs, Row, Token};
use crate::sampling::{Distribution, Path, Removed, Rng, Score, Warp, pick, score};

/// A token that a beam was extended by.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// The node before it; `None` is the pending token.
    pub parent: Option<usize>,
    pub token: Token,
    /// ln of its probability after its parent.
    pub log_prob: f64,
    /// Joint probability of the path that ends here, normalised over the beams of its step.
    pub weight: f64,
    /// What the unwarped model makes of it after its parent, if scores are wanted.
    pub score: Score,
    /// Which of the beams that were alive it extends.
    pub source: usize,
}

/// The end of a path.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beam {
    /// Its last node; `None` is the pending token.
    pub node: Option<usize>,
    /// Joint probability of the path, normalised over the beams that are alive.
    pub weight: f64,
}

/// How beams are extended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sampling {
    /// The model's warping.
    pub warp: Warp,
    /// The most beams.
    pub width: usize,
    /// Takes the most probable pairs instead of drawing: beam search.
    pub search: bool,
    /// Whether a pair of a beam and a token may be drawn twice. The two are separate beams then.
    pub with_replacement: bool,
    /// How many alternatives the scores of nodes have, if they are scored.
    pub scoring: Option<usize>,
    /// Whether the distributions of all steps are kept ([`Beams::following`]).
    pub keep: bool,
    /// How the model reads the text.
    pub reader: Reader,
}

impl Sampling {
    /// How a draft samples beams; at temperature 0 it searches.
    pub fn of_draft(settings: &Settings, reader: Reader) -> Self {
        Sampling {
            warp: settings.warp.for_draft(),
            width: settings.beam_width,
            search: settings.warp.is_greedy(),
            with_replacement: settings.with_replacement,
            scoring: None,
            keep: false,
            reader,
        }
    }

    /// How the target samples beams of its own: as a draft would, with scores if they are wanted.
    pub fn of_target(settings: &Settings) -> Self {
        Sampling { scoring: settings.scoring(), ..Self::of_draft(settings, Reader::Target) }
    }

    fn largest(&self) -> Option<usize> {
        // Beam search looks at the most probable tokens alone.
        self.search.then_some(self.width)
    }
}

/// Beams on a model, and the tree of all that they ever were.
#[derive(Debug, Default)]
pub(super) struct Beams {
    /// In the order in which they were drawn, parents before children.
    pub nodes: Vec<Node>,
    pub live: Vec<Beam>,
    /// The first node of each step.
    pub steps: Vec<usize>,
    next: Vec<Beam>,
    /// Of beam search: the most probable token that each beam still has to offer, and the pair's
    /// probability.
    offers: Vec<(Token, f64)>,
    removed: Vec<(usize, Removed)>,
    /// What follows the beams: from `first` on, that of each live one.
    distributions: Vec<Distribution>,
    first: usize,
    /// The pending token's row in the model's tree. Nodes lie behind it in their order.
    pending: u32,
    /// The first steps whose nodes were evaluated.
    evaluated: usize,
    branch: Vec<Token>,
}

impl Beams {
    /// Forgets all beams but the one that ends with the pending token.
    pub fn reset(&mut self) {
        self.nodes.clear();
        self.steps.clear();
        self.evaluated = 0;
        self.live.clear();
        self.live.push(Beam { node: None, weight: 1.0 });
    }

    /// Samples beams of `depth` tokens after the text, or of as many as the model can go on with.
    /// All steps but the last are evaluated. Returns how many there are.
    pub fn sample(
        &mut self,
        lm: &mut dyn Lm,
        start: Path<'_>,
        vocab: usize,
        depth: usize,
        how: &Sampling,
        rng: &mut Rng,
    ) -> Result<usize> {
        self.reset();
        let mut goes_on = self.begin(lm, start, vocab, (depth - 1) * how.width, how, rng)?;
        while goes_on && self.steps.len() < depth {
            goes_on = self.extend(lm, start, vocab, how, rng)?;
        }
        Ok(self.steps.len())
    }

    /// Evaluates the pending token and all nodes there are in one pass and does a step. `later` is
    /// how many rows later steps will add. Returns false if no token of the model may follow any
    /// beam: the beams are as before then.
    pub fn begin(
        &mut self,
        lm: &mut dyn Lm,
        start: Path<'_>,
        vocab: usize,
        later: usize,
        how: &Sampling,
        rng: &mut Rng,
    ) -> Result<bool> {
        let want = want(&how.warp, lm, vocab, start, how.largest(), how.scoring);
        let nodes = self.nodes.iter().map(|node| (node.token, node.parent));
        let rows = eval_after(lm, how.reader, start.text, nodes, later, want)?;
        self.pending = rows.row(0).0;
        self.first = 0;
        let first = self.pending as usize;
        let place = |beam: &Beam| first + beam.node.map_or(0, |node| node + 1);
        let places: Vec<usize> = self.live.iter().map(place).collect();
        self.step(rows.outputs, &places, start, vocab, how, rng)
    }

    /// Evaluates the newest nodes and does a step. Returns false as [`Beams::begin`] does.
    pub fn extend(
        &mut self,
        lm: &mut dyn Lm,
        start: Path<'_>,
        vocab: usize,
        how: &Sampling,
        rng: &mut Rng,
    ) -> Result<bool> {
        let want = want(&how.warp, lm, vocab, start, how.largest(), how.scoring);
        let mut batch = Batch::new();
        for beam in &self.live {
            let node = &self.nodes[beam.node.expect("an extended beam has a node")];
            batch.push(node.token, Some(self.row(node.parent)), want);
        }
        if how.keep {
            self.first = self.live[0].node.expect("an extended beam has a node") + 1;
        }
        let places: Vec<usize> = (0..self.live.len()).collect();
        let outputs = lm.eval(&batch)?;
        self.evaluated = self.steps.len();
        self.step(outputs, &places, start, vocab, how, rng)
    }

    /// Extends the live beams, of which the i-th has its output at `places[i]`.
    fn step(
        &mut self,
        outputs: &Outputs,
        places: &[usize],
        start: Path<'_>,
        vocab: usize,
        how: &Sampling,
        rng: &mut Rng,
    ) -> Result<bool> {
        let end = self.first + self.live.len();
        self.distributions.resize_with(end.max(self.distributions.len()), Distribution::default);
        let mut branch = std::mem::take(&mut self.branch);
        for (i, (beam, &place)) in self.live.iter().zip(places).enumerate() {
            self.tokens(beam.node, &mut branch);
            let path = start.with(&branch);
            self.distributions[self.first + i].fill(outputs.get(place), vocab, &how.warp, path)?;
        }
        self.branch = branch;
        let old = self.nodes.len();
        if !self.grow(how, rng) {
            return Ok(false);
        }
        if let Some(alternatives) = how.scoring {
            for node in &mut self.nodes[old..] {
                let output = outputs.get(places[node.source]);
                node.score = score(output, node.token, vocab, alternatives);
            }
        }
        Ok(true)
    }

    /// Draws pairs of a beam and a token that follows it by weight x p(token | beam), as many as
    /// the width, or as have mass when drawing without replacement. Beam search takes the most
    /// probable pairs. Returns false, with the beams as they were, if no pair has mass.
    fn grow(&mut self, how: &Sampling, rng: &mut Rng) -> bool {
        self.offers.clear();
        if how.search {
            let following = &self.distributions[self.first..];
            let offers = self.live.iter().zip(following).map(|(beam, p)| offer(beam, p));
            self.offers.extend(offers);
        }
        self.next.clear();
        self.removed.clear();
        for _ in 0..how.width {
            let drawn = if how.search { self.most_probable() } else { self.draw(rng) };
            let Some((source, token)) = drawn else { break };
            let beam = self.live[source];
            let p = &mut self.distributions[self.first + source];
            let weight = beam.weight * p.prob(token);
            if self.next.is_empty() {
                self.steps.push(self.nodes.len());
            }
            self.next.push(Beam { node: Some(self.nodes.len()), weight });
            let (parent, log_prob) = (beam.node, p.log_prob(token));
            self.nodes.push(Node {
                parent,
                token,
                log_prob,
                weight,
                score: Score::default(),
                source,
            });
            if how.search || !how.with_replacement {
                self.removed.push((source, p.remove(token)));
            }
            if how.search {
                self.offers[source] = offer(&beam, p);
            }
        }
        if how.keep {
            for (source, removed) in self.removed.drain(..) {
                self.distributions[self.first + source].restore([removed]);
            }
        }
        if self.next.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.live, &mut self.next);
        self.normalize();
        for beam in &self.live {
            self.nodes[beam.node.expect("it was just given one")].weight = beam.weight;
        }
        true
    }

    /// Makes the weights of the live beams sum to 1.
    pub fn normalize(&mut self) {
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
    fn draw(&self, rng: &mut Rng) -> Option<(usize, Token)> {
        let following = &self.distributions[self.first..];
        let masses = || self.live.iter().zip(following).map(|(beam, p)| beam.weight * p.mass());
        let mut at = rng.uniform() * masses().sum::<f64>();
        let i = pick(masses().enumerate(), &mut at)?;
        Some((i, following[i].draw(rng)))
    }

    /// What follows a node, if all steps are kept; `None` is the pending token.
    pub fn following(&self, node: Option<usize>) -> &Distribution {
        &self.distributions[node.map_or(0, |node| node + 1)]
    }

    /// The same, to remove tokens from it.
    pub fn following_mut(&mut self, node: Option<usize>) -> &mut Distribution {
        &mut self.distributions[node.map_or(0, |node| node + 1)]
    }

    /// The beam of the largest weight (ties: the earlier one).
    pub fn best(&self) -> Beam {
        let mut best = self.live[0];
        for beam in &self.live[1..] {
            if beam.weight > best.weight {
                best = *beam;
            }
        }
        best
    }

    /// A node's row in the model's tree, if it was evaluated; `None` is the pending token.
    pub fn row(&self, node: Option<usize>) -> Row {
        Row(self.pending + node.map_or(0, |node| node as u32 + 1))
    }

    /// The row to keep of a path of which the first `accepted` nodes are in the text: that of its
    /// last node which was evaluated, and so is mostly not of the last step.
    pub fn kept(&self, path: &[usize], accepted: usize) -> Row {
        let evaluated = accepted.min(self.evaluated);
        self.row(path[..evaluated].last().copied())
    }

    /// The nodes from the pending token's child to `node`.
    pub fn path(&self, node: Option<usize>) -> Vec<usize> {
        let mut path: Vec<usize> = std::iter::successors(node, |&n| self.nodes[n].parent).collect();
        path.reverse();
        path
    }

    /// The tokens of that path.
    pub fn tokens(&self, node: Option<usize>, into: &mut Vec<Token>) {
        into.clear();
        into.extend(
            std::iter::successors(node, |&n| self.nodes[n].parent).map(|n| self.nodes[n].token),
        );
        into.reverse();
    }
}

/// The most probable token that follows a beam, and the pair's probability; 0 if none is left.
fn offer(beam: &Beam, p: &Distribution) -> (Token, f64) {
    if p.mass() <= 0.0 {
        return (0, 0.0);
    }
    let token = p.argmax();
    (token, beam.weight * p.prob(token))
}
