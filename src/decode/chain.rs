//! A chain of tokens that the draft draws one by one, and its verification in one pass of the
//! target: what speculative sampling, typical acceptance and BiLD share. They differ in the test
//! that a token must pass.

use super::{Block, Kept, Phase, Round, draft_of, eval_draft, fill_target, verify_chain, want};
use crate::error::{Error, Result};
use crate::lm::{Batch, Row, Token};
use crate::sampling::{Distribution, Rng};

/// Drafted tokens and what they were drawn from.
#[derive(Debug, Default)]
pub(super) struct Chain {
    tokens: Vec<Token>,
    q: Vec<Distribution>,
    p: Distribution,
    /// The pending token's row in the draft's tree. Those of the chain follow.
    pending: u32,
    /// Rows that the draft evaluated from there on.
    evaluated: u32,
}

impl Chain {
    /// Draws up to `round.gamma` tokens; at temperature 0 takes the most probable ones. Ends before
    /// a token where no probability reaches `least`, or where nothing may follow that the draft has.
    fn draft(&mut self, round: &mut Round<'_>, least: f64) -> Result<()> {
        let (path, gamma, vocab) = (round.path(), round.gamma, round.models.shared());
        let (warp, reader) = (&round.settings.warp, round.models.draft_reader());
        let q_warp = warp.for_draft();
        let draft = draft_of(&mut round.models, round.settings.strategy)?;
        let want = want(&q_warp, draft, vocab, path, warp.is_greedy().then_some(1), None);
        self.q.resize_with(gamma.max(self.q.len()), Distribution::default);
        self.tokens.clear();
        for i in 0..gamma {
            let output = if i == 0 {
                let rows = eval_draft(draft, reader, path.text, gamma - 1, want)?;
                self.pending = rows.row(0).0;
                rows.get(0)
            } else {
                let mut batch = Batch::new();
                let parent = Row(self.pending + i as u32 - 1);
                batch.push(self.tokens[i - 1], Some(parent), want);
                draft.eval(&batch)?.get(0)
            };
            self.evaluated = i as u32 + 1;
            let q = &mut self.q[i];
            q.fill(output, vocab, &q_warp, path.with(&self.tokens)).map_err(Error::of_draft)?;
            if q.mass() <= 0.0 {
                break;
            }
            if least > 0.0 && q.prob(q.argmax()) < least {
                break;
            }
            self.tokens.push(if warp.is_greedy() { q.argmax() } else { q.draw(round.rng) });
        }
        Ok(())
    }

    /// A round: drafts a chain, accepts its tokens while `accept` says so and adds one from the
    /// target. `accept` sees p, q, the token and the generator; where it refuses, it may leave in p
    /// what the next token is to be drawn from. `least` as for `draft`.
    pub fn round(
        &mut self,
        round: &mut Round<'_>,
        block: &mut Block,
        least: f64,
        mut accept: impl FnMut(&mut Distribution, &Distribution, Token, &mut Rng) -> bool,
    ) -> Result<Kept> {
        round.timeline.enter(Phase::Draft);
        self.draft(round, least)?;
        let (path, vocab, settings) = (round.path(), round.models.vocab(), round.settings);
        let target = &mut *round.models.target;
        let rows = verify_chain(target, round.timeline, settings, vocab, path, &self.tokens)?;

        block.drafted = self.tokens.len();
        let p = &mut self.p;
        for i in 0..=self.tokens.len() {
            let path = path.with(&self.tokens[..i]);
            fill_target(p, rows.get(i), vocab, &settings.warp, path)?;
            let Some(&token) = self.tokens.get(i) else { break };
            let (log_p, log_q) = (p.log_prob(token), self.q[i].log_prob(token));
            if !accept(p, &self.q[i], token, round.rng) {
                break;
            }
            block.tokens.push(token);
            block.accepted += 1;
            block.log_p += log_p;
            block.log_q += log_q;
        }
        block.tokens.push(p.draw(round.rng));
        rows.score(block, 0.., vocab, settings);
        let in_draft = (block.accepted as u32).min(self.evaluated - 1);
        Ok(Kept {
            target: Some(rows.row(block.accepted)),
            draft: Some(Row(self.pending + in_draft)),
        })
    }
}
