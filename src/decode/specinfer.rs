//! Lossless speculation on a tree: SpecInfer (Miao et al. 2024, arXiv 2305.09781, algorithm 2) with
//! candidates drawn with replacement, multi-candidate speculative decoding (Yang et al. 2024,
//! arXiv 2401.06706) without.
//!
//! After each node at depth i - 1 the draft draws k_i children from q. From the pending token down,
//! children are tried in the order in which they were drawn: y is accepted with probability
//! min(1, p(y) / q(y)), and if it is not, p becomes max(p - q, 0), normalised, and, without
//! replacement, q loses y. Where no child is accepted, the next token is drawn from what p is then.
//! With one child per node it is speculative sampling; at temperature 0 the children are the most
//! probable tokens and the text is the greedy one.

use std::ops::Range;

use super::{
    Algorithm, Block, Descriptor, Kept, Knob, Phase, Round, draft_of, eval_draft, fill_target,
    verify_nodes, want,
};
use crate::error::{Error, Result};
use crate::lm::{Batch, Row, Token};
use crate::sampling::{Distribution, Removed, Rng};

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "specinfer",
    summary: "lossless speculation on a tree of candidates",
    needs_draft: true,
    knobs: &[Knob::Branching, Knob::WithReplacement],
    rows: |s| nodes_of(&s.branching),
    draft_length: |s| s.branching.len(),
    algorithm: || Box::<SpecInfer>::default(),
};

/// Speculative sampling with a tree of candidates.
#[derive(Debug, Default)]
pub struct SpecInfer {
    nodes: Vec<Node>,
    /// The children of the pending token.
    roots: Range<usize>,
    /// What follows the pending token (the first) and each node that has children.
    q: Vec<Distribution>,
    p: Distribution,
    branch: Vec<Token>,
    removed: Vec<Removed>,
}

#[derive(Debug, Clone)]
struct Node {
    parent: Option<usize>,
    token: Token,
    children: Range<usize>,
}

impl Algorithm for SpecInfer {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        round.timeline.enter(Phase::Draft);
        let (pending, drafted) = self.draft(round).map_err(Error::of_draft)?;
        let (start, vocab, settings) = (round.path(), round.models.vocab(), round.settings);
        let nodes = self.nodes.iter().map(|node| (node.token, node.parent));
        let target = &mut *round.models.target;
        let rows = verify_nodes(target, round.timeline, settings, vocab, start, nodes)?;

        block.drafted = drafted;
        let mut path = Vec::new();
        self.branch.clear();
        loop {
            let row = path.last().map_or(0, |node: &usize| node + 1);
            let p = &mut self.p;
            fill_target(p, rows.get(row), vocab, &settings.warp, start.with(&self.branch))?;
            let children = match path.last() {
                None => self.roots.clone(),
                Some(&node) => self.nodes[node].children.clone(),
            };
            // Of the model's distributions, which trying changes.
            let log_probs: Vec<_> = self.nodes[children.clone()]
                .iter()
                .map(|node| (p.log_prob(node.token), self.q[row].log_prob(node.token)))
                .collect();
            let mut accepted = None;
            for (child, log_probs) in children.zip(log_probs) {
                let (token, q) = (self.nodes[child].token, &mut self.q[row]);
                if round.rng.uniform() * q.prob(token) < p.prob(token) {
                    accepted = Some((child, token, log_probs));
                    break;
                }
                p.subtract(q);
                if settings.warp.is_greedy() || !settings.with_replacement {
                    q.remove(token);
                    // With no mass left there are no more children either.
                    if q.mass() > 0.0 {
                        q.renormalize();
                    }
                }
            }
            let Some((child, token, (log_p, log_q))) = accepted else { break };
            path.push(child);
            self.branch.push(token);
            block.accepted += 1;
            block.log_p += log_p;
            block.log_q += log_q;
        }
        block.tokens.extend_from_slice(&self.branch);
        block.tokens.push(self.p.draw(round.rng));
        let before = std::iter::once(0).chain(path.iter().map(|node| node + 1));
        rows.score(block, before, vocab, settings);
        // The draft has not evaluated the leaves.
        let in_draft = path[..block.accepted.min(round.gamma - 1)].last();
        Ok(Kept {
            target: Some(rows.row(path.last().map_or(0, |node| node + 1))),
            draft: Some(Row(pending + in_draft.map_or(0, |&node| node as u32 + 1))),
        })
    }
}

impl SpecInfer {
    /// Draws the tree; returns the pending token's row and the tree's depth. Nodes lie behind that row
    /// in their order.
    fn draft(&mut self, round: &mut Round<'_>) -> Result<(u32, usize)> {
        let (start, vocab, settings) = (round.path(), round.models.shared(), round.settings);
        let (warp, q_warp) = (&settings.warp, settings.warp.for_draft());
        let reader = round.models.draft_reader();
        let branching = &settings.branching[..round.gamma];
        let draft = draft_of(&mut round.models, settings.strategy)?;
        let most = branching.iter().copied().max();
        let want = want(&q_warp, draft, vocab, start, most.filter(|_| warp.is_greedy()), None);
        self.nodes.clear();
        let inner = nodes_of(&branching[..branching.len() - 1]);
        self.q.resize_with((inner + 1).max(self.q.len()), Distribution::default);
        let rows = eval_draft(draft, reader, start.text, inner, want)?;
        let pending = rows.row(0).0;
        self.q[0].fill(rows.get(0), vocab, &q_warp, start)?;
        self.roots = self.grow(None, branching[0], settings, round.rng);
        let mut layer = self.roots.clone();
        let mut depth = usize::from(!layer.is_empty());
        for &k in &branching[1..] {
            // Nothing may follow that the draft has.
            if layer.is_empty() {
                break;
            }
            let mut batch = Batch::new();
            for node in &self.nodes[layer.clone()] {
                let parent = Row(pending + node.parent.map_or(0, |parent| parent as u32 + 1));
                batch.push(node.token, Some(parent), want);
            }
            let outputs = draft.eval(&batch)?;
            let next = self.nodes.len();
            for (i, node) in layer.clone().enumerate() {
                self.branch.clear();
                let up = std::iter::successors(Some(node), |&node| self.nodes[node].parent);
                self.branch.extend(up.map(|node| self.nodes[node].token));
                self.branch.reverse();
                let path = start.with(&self.branch);
                self.q[node + 1].fill(outputs.get(i), vocab, &q_warp, path)?;
                self.nodes[node].children = self.grow(Some(node), k, settings, round.rng);
            }
            layer = next..self.nodes.len();
            depth += usize::from(!layer.is_empty());
        }
        Ok((pending, depth))
    }

    /// Draws `k` children of a node, or as many as have mass; its q is afterwards as before.
    fn grow(
        &mut self,
        parent: Option<usize>,
        k: usize,
        settings: &super::Settings,
        rng: &mut Rng,
    ) -> Range<usize> {
        let first = self.nodes.len();
        let greedy = settings.warp.is_greedy();
        let q = &mut self.q[parent.map_or(0, |node| node + 1)];
        for _ in 0..k {
            if q.mass() <= 0.0 {
                break;
            }
            let token = if greedy { q.argmax() } else { q.draw(rng) };
            self.nodes.push(Node { parent, token, children: 0..0 });
            if greedy || !settings.with_replacement {
                self.removed.push(q.remove(token));
            }
        }
        if !self.removed.is_empty() {
            q.restore(self.removed.drain(..));
        }
        first..self.nodes.len()
    }
}

/// Nodes of a tree with these branching factors: k_1 + k_1 k_2 + ..., at most `usize::MAX`.
pub(super) fn nodes_of(branching: &[usize]) -> usize {
    let mut layer = 1usize;
    branching.iter().fold(0usize, |nodes, &k| {
        layer = layer.saturating_mul(k);
        nodes.saturating_add(layer)
    })
}
