//! Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023,
//! arXiv 2302.01318): the text is distributed exactly as the target's own.
//!
//! The draft draws y_1..y_gamma, the target scores them in one pass, y_i is accepted with
//! probability min(1, p(y_i) / q(y_i)), and the first rejected token is replaced by a draw from
//! max(p - q, 0), normalised. If none is rejected, one more is drawn from p.

use super::{Algorithm, Block, Kept, Phase, Round, draft_of, eval_chain, want};
use crate::error::Result;
use crate::model::lm::{Batch, Row, Token};
use crate::sampling::{Distribution, Path};

/// Speculative sampling.
#[derive(Debug, Default)]
pub struct Speculative {
    drafted: Vec<Token>,
    /// What each drafted token was drawn from.
    q: Vec<Distribution>,
    p: Distribution,
}

impl Algorithm for Speculative {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let (text, gamma, vocab) = (round.text, round.gamma, round.models.vocab());
        let warp = &round.settings.warp;

        round.timeline.enter(Phase::Draft);
        let q_warp = warp.for_draft();
        let draft = draft_of(&mut round.models, round.settings.strategy)?;
        let q_want = want(&q_warp, draft, vocab, warp.is_greedy().then_some(1));
        self.q.resize_with(gamma.max(self.q.len()), Distribution::default);
        self.drafted.clear();
        // Drafted token i is in row `pending + 1 + i`, save the last, which is not evaluated.
        let mut pending = 0;
        for i in 0..gamma {
            let output = if i == 0 {
                let rows = eval_chain(draft, text, &[], gamma - 1, q_want)?;
                pending = rows.row(0).0;
                rows.get(0)
            } else {
                let mut batch = Batch::new();
                batch.push(self.drafted[i - 1], Some(Row(pending + i as u32 - 1)), q_want);
                draft.eval(&batch)?.get(0)
            };
            let q = &mut self.q[i];
            q.fill(output, vocab, &q_warp, Path { text, branch: &self.drafted })?;
            self.drafted.push(if warp.is_greedy() { q.argmax() } else { q.draw(round.rng) });
        }

        round.timeline.enter(Phase::Verify);
        let target = &mut *round.models.target;
        let p_want = want(warp, target, vocab, None);
        let rows = eval_chain(target, text, &self.drafted, 0, p_want)?;

        round.timeline.enter(Phase::Sample);
        block.drafted = gamma;
        let p = &mut self.p;
        for i in 0..=gamma {
            let branch = &self.drafted[..i];
            p.fill(rows.get(i), vocab, warp, Path { text, branch })?;
            if i == gamma {
                break;
            }
            let (token, q) = (self.drafted[i], &self.q[i]);
            if round.rng.uniform() * q.prob(token) >= p.prob(token) {
                p.subtract(q);
                break;
            }
            block.tokens.push(token);
            block.accepted += 1;
            block.log_p += p.log_prob(token);
            block.log_q += q.log_prob(token);
        }
        block.tokens.push(p.draw(round.rng));
        if round.settings.score {
            rows.score(block, vocab);
        }
        let in_draft = block.accepted.min(gamma - 1) as u32;
        Ok(Kept { target: Some(rows.row(block.accepted)), draft: Some(Row(pending + in_draft)) })
    }
}
