//! The controller: chooses, round by round, whether and how to speculate, for most tokens per
//! second.
//!
//! It knows from a [`CostTable`] what a round costs, and estimates from counts what it yields: for
//! each way to speculate (speculative sampling; MTAD and MMTAD with 1, 2, 4 or 8 beams) and each
//! draft length the mean number of accepted tokens. One round tells of more than its own way: a
//! prefix of a draft stands for a shorter one, a tree holds the chain that MTAD would have
//! verified, and from p and q of a chain that was drawn token by token follows what speculative
//! sampling would have accepted. What no round has told of is taken from a prior, scaled by how
//! acceptance so far compares with it.
//!
//! The choice with the most expected tokens per second is used. Others that might be better, if what
//! is known of them is too little or too old, are tried as long as trying has cost no more than a
//! small share of the time so far; time is what the table says, so the clock plays no part: a seed
//! and a table give one text. Estimates forget, so a draft that gets better or worse is noticed.

use super::{
    Algorithm, Autoregressive, Block, CostTable, Descriptor, Kept, Knob, Mmtad, Mtad, Round,
    Settings,
};
use super::{Speculative, Strategy};
use crate::error::{Error, Result};

/// The longest draft that the controller chooses.
pub(super) const MOST_GAMMA: usize = 8;
/// Rounds after which a count is worth 1 / e.
const MEMORY: f64 = 150.0;
/// The prior counts as so many rounds.
const PRIOR: f64 = 4.0;
/// What others may yield at best, in terms of their prior, before they are tried.
const OPTIMISM: f64 = 1.5;
/// Trials may cost this share of the time.
const TRIALS: f64 = 0.02;
/// Trials may cost so many plain passes from the start.
const FIRST_TRIALS: f64 = 2.0;

/// A way to do a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// [`Strategy::Sample`] is plain decoding.
    pub strategy: Strategy,
    /// Draft length; 0 for plain decoding.
    pub gamma: usize,
    /// Beams; 1 where there are none.
    pub beam_width: usize,
}

/// What the controller did and why.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decisions {
    /// What it chose, with the number of rounds, most frequent first.
    pub rounds: Vec<(Choice, u64)>,
    /// How many of the rounds were trials.
    pub trials: u64,
    /// What it would choose now, and the tokens per second that it expects of that.
    pub best: Option<(Choice, f64)>,
    /// Tokens per second of plain decoding, by the cost table.
    pub plain: f64,
}

/// A discounted mean.
#[derive(Debug, Clone, Copy, Default)]
struct Estimate {
    weight: f64,
    sum: f64,
    /// The round of its last count.
    at: u64,
}

impl Estimate {
    fn add(&mut self, now: u64, weight: f64, sum: f64) {
        let kept = self.kept(now);
        self.weight = self.weight * kept + weight;
        self.sum = self.sum * kept + sum;
        self.at = now;
    }

    /// What its counts are worth by now.
    fn kept(&self, now: u64) -> f64 {
        (-((now - self.at) as f64) / MEMORY).exp()
    }

    /// The mean, with a prior. If `aged`, counts are worth the less the older they are.
    fn mean(&self, prior: f64, prior_weight: f64, now: u64, aged: bool) -> f64 {
        let kept = if aged { self.kept(now) } else { 1.0 };
        (self.sum * kept + prior * prior_weight) / (self.weight * kept + prior_weight)
    }
}

/// A way to speculate: strategy, beams, and the share of tokens that the prior says passes from
/// each depth to the next.
const WAYS: [(Strategy, usize, f64); 8] = [
    (Strategy::Speculative, 1, 0.7),
    (Strategy::Mtad, 1, 0.75),
    (Strategy::Mtad, 2, 0.8),
    (Strategy::Mtad, 4, 0.84),
    (Strategy::Mtad, 8, 0.86),
    (Strategy::Mmtad, 2, 0.83),
    (Strategy::Mmtad, 4, 0.87),
    (Strategy::Mmtad, 8, 0.89),
];

/// A strategy's place among those that the controller chooses from.
fn family(strategy: Strategy) -> usize {
    match strategy {
        Strategy::Speculative => 0,
        Strategy::Mtad => 1,
        _ => 2,
    }
}

fn way_of(strategy: Strategy, width: usize) -> usize {
    let found = WAYS.iter().position(|way| (way.0, way.1) == (strategy, width));
    found.expect("only ways are asked for")
}

/// What it says of itself.
pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    name: "auto",
    summary: "whichever of plain, speculative, mtad and mmtad is the fastest here at tau",
    needs_draft: true,
    knobs: &[Knob::Tau],
    rows: |_| 0,
    draft_length: |_| MOST_GAMMA,
    algorithm: || Box::<Auto>::default(),
};

/// The controller.
#[derive(Debug, Default)]
pub struct Auto {
    plain: Autoregressive,
    speculative: Speculative,
    mtad: Mtad,
    mmtad: Mmtad,
    /// The settings of the last choice.
    settings: Settings,
    /// Accepted tokens by way and draft length - 1.
    accepted: [[Estimate; MOST_GAMMA]; WAYS.len()],
    /// Accepted tokens in terms of the prior, by strategy: the rules differ too much for one to
    /// tell of another.
    likeness: [Estimate; 3],
    /// Rounds so far.
    now: u64,
    /// Seconds so far, by the table, and how many of them trials have cost.
    elapsed: f64,
    spent: f64,
    decisions: Decisions,
}

impl Algorithm for Auto {
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept> {
        let Some(costs) = round.settings.costs.clone() else {
            return Err(Error::invalid("strategy auto needs a cost table"));
        };
        let lag = round.models.draft.as_ref().map_or(0, |d| round.text.len() - 1 - d.committed());
        let (choice, trial, best_rate) = self.choose(&costs, round.gamma, lag);
        self.settings.clone_from(round.settings);
        self.settings.strategy = choice.strategy;
        self.settings.gamma = choice.gamma.max(1);
        self.settings.beam_width = choice.beam_width;
        let algorithm: &mut dyn Algorithm = match choice.strategy {
            Strategy::Speculative => &mut self.speculative,
            Strategy::Mtad => &mut self.mtad,
            Strategy::Mmtad => &mut self.mmtad,
            _ => &mut self.plain,
        };
        let mut inner = Round {
            models: round.models.reborrow(),
            text: round.text,
            guide: round.guide,
            settings: &self.settings,
            gamma: choice.gamma,
            rng: round.rng,
            timeline: round.timeline,
        };
        let kept = algorithm.round(&mut inner, block)?;

        self.now += 1;
        let cost = cost_of(&costs, choice, lag);
        self.elapsed += cost;
        if trial {
            self.spent += (cost - block.tokens.len() as f64 / best_rate).max(0.0);
            self.decisions.trials += 1;
        }
        self.learn(choice, block, round.settings.tau.ln());
        let counted = self.decisions.rounds.iter_mut().find(|(known, _)| *known == choice);
        match counted {
            Some((_, rounds)) => *rounds += 1,
            None => self.decisions.rounds.push((choice, 1)),
        }
        Ok(kept)
    }

    fn decisions(&self, settings: &Settings) -> Option<Decisions> {
        let costs = settings.costs.as_deref()?;
        let mut decisions = self.decisions.clone();
        decisions.rounds.sort_by_key(|&(_, rounds)| std::cmp::Reverse(rounds));
        let (best, rate) = self.best(costs, MOST_GAMMA, 0);
        (decisions.best, decisions.plain) = (Some((best, rate)), 1.0 / costs.target(1));
        Some(decisions)
    }
}

const PLAIN: Choice = Choice { strategy: Strategy::Sample, gamma: 0, beam_width: 1 };

/// Seconds of a round, where the draft has `lag` tokens more to catch up on than the pending one.
fn cost_of(costs: &CostTable, choice: Choice, lag: usize) -> f64 {
    let Choice { strategy, gamma, beam_width } = choice;
    let rows = match strategy {
        Strategy::Mmtad => 1 + gamma * beam_width,
        _ => 1 + gamma,
    };
    let draft = match gamma {
        0 => 0.0,
        _ => costs.draft(1 + lag) + (gamma - 1) as f64 * costs.draft(beam_width),
    };
    draft + costs.target(rows)
}

/// Accepted tokens of a draft of `gamma` if each passes with this probability.
fn prior(share: f64, gamma: usize) -> f64 {
    (1..=gamma as i32).map(|depth| share.powi(depth)).sum()
}

impl Auto {
    /// Every way to speculate with drafts of at most `most` tokens.
    fn choices(most: usize) -> impl Iterator<Item = (usize, Choice)> {
        WAYS.iter().enumerate().flat_map(move |(way, &(strategy, beam_width, _))| {
            (1..=most.min(MOST_GAMMA))
                .map(move |gamma| (way, Choice { strategy, gamma, beam_width }))
        })
    }

    /// Expected tokens per second. `hopeful`: what might be, for all that is known for sure.
    fn rate(
        &self,
        costs: &CostTable,
        way: usize,
        choice: Choice,
        lag: usize,
        hopeful: bool,
    ) -> f64 {
        let gamma = choice.gamma;
        let usual = prior(WAYS[way].2, gamma);
        let likeness = self.likeness[family(WAYS[way].0)].mean(1.0, 4.0, self.now, hopeful);
        let factor = if hopeful { OPTIMISM * likeness } else { likeness };
        let estimate = &self.accepted[way][gamma - 1];
        let prior = (usual * factor).min(gamma as f64);
        let accepted = estimate.mean(prior, PRIOR, self.now, hopeful);
        (1.0 + accepted) / cost_of(costs, choice, lag)
    }

    /// The choice that is expected to be the fastest, with its tokens per second.
    fn best(&self, costs: &CostTable, most: usize, lag: usize) -> (Choice, f64) {
        let plain = (PLAIN, 1.0 / costs.target(1));
        Self::choices(most)
            .map(|(way, choice)| (choice, self.rate(costs, way, choice, lag, false)))
            .fold(plain, |best, other| if other.1 > best.1 { other } else { best })
    }

    /// What to do next, whether it is a trial, and the best rate that is expected.
    fn choose(&self, costs: &CostTable, most: usize, lag: usize) -> (Choice, bool, f64) {
        // Catching up is paid once.
        let (best, rate) = self.best(costs, most, 0);
        let (trial, hope) = Self::choices(most)
            .filter(|&(_, choice)| choice != best)
            .map(|(way, choice)| (choice, self.rate(costs, way, choice, 0, true)))
            .fold((best, 0.0), |most, other| if other.1 > most.1 { other } else { most });
        let risk = cost_of(costs, trial, lag) - 1.0 / rate;
        let allowed = FIRST_TRIALS * costs.target(1) + TRIALS * self.elapsed;
        if hope > rate && self.spent + risk <= allowed {
            (trial, true, rate)
        } else {
            (best, false, rate)
        }
    }

    /// Counts what a round tells of its own way and of others.
    fn learn(&mut self, choice: Choice, block: &Block, log_tau: f64) {
        let Choice { strategy, beam_width, gamma } = choice;
        // The depths at which the chain passes, as MTAD sees it, and how many of its tokens
        // speculative sampling would have accepted on average.
        let (mut chain, mut log_ratio) = (0u128, 0.0);
        let (mut survives, mut expected) = (1.0f64, 0.0);
        for length in 1..=gamma.min(MOST_GAMMA) {
            if let Some(&(log_p, log_q)) = block.steps.get(length - 1) {
                log_ratio += log_p - log_q;
                chain |= u128::from(log_ratio > log_tau) << (length - 1);
                survives *= (log_p - log_q).exp().min(1.0);
                expected += survives;
            }
            let below = (1u128 << length) - 1;
            let deepest = |passed: u128| f64::from(u128::BITS - (passed & below).leading_zeros());
            match strategy {
                Strategy::Speculative => {
                    self.count(strategy, 1, length, block.accepted.min(length) as f64);
                }
                Strategy::Mtad => {
                    self.count(strategy, beam_width, length, deepest(block.passed));
                    if beam_width == 1 {
                        self.count(Strategy::Speculative, 1, length, expected);
                    }
                }
                Strategy::Mmtad => {
                    self.count(strategy, beam_width, length, deepest(block.passed));
                    self.count(Strategy::Mtad, beam_width, length, deepest(chain));
                }
                _ => {}
            }
        }
        let mut compare = |strategy, width: usize, accepted: f64| {
            let usual = prior(WAYS[way_of(strategy, width)].2, gamma);
            self.likeness[family(strategy)].add(self.now, usual, accepted);
        };
        if gamma > 0 {
            compare(strategy, beam_width, block.accepted as f64);
        }
        if strategy == Strategy::Mtad && beam_width == 1 {
            compare(Strategy::Speculative, 1, expected);
        }
    }

    fn count(&mut self, strategy: Strategy, width: usize, gamma: usize, accepted: f64) {
        self.accepted[way_of(strategy, width)][gamma - 1].add(self.now, 1.0, accepted);
    }
}
