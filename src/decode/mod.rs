//! Decoding algorithms, one per file, over [`Lm`] alone.
//!
//! An [`Algorithm`] does one *round*: it looks at the text, lets the models evaluate what it needs
//! and fills a [`Block`] with the tokens that come next. [`Decoding`] drives it: it owns the text,
//! the generator and the statistics, and commits what a round decided.
//!
//! What a model has evaluated is never stored beside it: the text is a list of tokens, a model
//! has evaluated the first [`Lm::committed`] of them, and a round feeds it the others. So a draft
//! that lags behind, because all it drafted was accepted or because it was not asked for a while,
//! catches up in the pass that it does anyway. The last token is *pending*: no model has evaluated
//! it.

mod autoregressive;
mod driver;
mod mtad;
mod speculative;
mod statistics;
mod timeline;

use std::fmt;
use std::str::FromStr;

pub use autoregressive::Autoregressive;
pub use driver::{Decoding, Prefill};
pub use mtad::Mtad;
pub use speculative::Speculative;
pub use statistics::Statistics;
pub use timeline::{Listener, Phase, Timeline};

use crate::error::{Error, Result};
use crate::model::lm::{Batch, Lm, MAX_TREE, Output, Outputs, Row, Token, Want, extend};
use crate::sampling::{Rng, Warp, unwarped_log_prob};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The target's most probable token, one at a time.
    Greedy,
    /// Draws from the target, one at a time.
    Sample,
    /// Speculative sampling: the target's distribution exactly.
    Speculative,
    /// Multi-token joint decoding: blocks whose joint likelihood ratio clears a threshold.
    Mtad,
}

impl Strategy {
    /// All strategies with the names that users know them by.
    pub const ALL: [(Strategy, &'static str); 4] = [
        (Strategy::Greedy, "greedy"),
        (Strategy::Sample, "sample"),
        (Strategy::Speculative, "speculative"),
        (Strategy::Mtad, "mtad"),
    ];

    /// Whether it needs a draft model.
    pub fn needs_draft(self) -> bool {
        match self {
            Strategy::Greedy | Strategy::Sample => false,
            Strategy::Speculative | Strategy::Mtad => true,
        }
    }

    /// Its algorithm, with no memory of any text.
    fn algorithm(self) -> Box<dyn Algorithm> {
        match self {
            Strategy::Greedy | Strategy::Sample => Box::<Autoregressive>::default(),
            Strategy::Speculative => Box::<Speculative>::default(),
            Strategy::Mtad => Box::<Mtad>::default(),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::ALL.iter().find(|(strategy, _)| strategy == self);
        f.pad(named.expect("every strategy has a name").1)
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, known)| *known == name);
        known.map(|(strategy, _)| *strategy).ok_or_else(|| {
            let names = Self::ALL.map(|(_, name)| name).join(", ");
            Error::invalid(format!("there is no strategy {name:?}; there are {names}"))
        })
    }
}

/// What an algorithm is told to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The algorithm.
    pub strategy: Strategy,
    /// Draft length: tokens drafted per round.
    pub gamma: usize,
    /// Beams that MTAD drafts with.
    pub beam_width: usize,
    /// MTAD's threshold: joint p / joint q of an accepted block is above it.
    pub tau: f64,
    /// Whether beams are drawn with replacement.
    pub with_replacement: bool,
    /// How logits become probabilities, for target and draft alike.
    pub warp: Warp,
    /// Seed of all draws.
    pub seed: u64,
    /// Whether emitted tokens are scored under the unwarped target.
    pub score: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            strategy: Strategy::Mtad,
            gamma: 4,
            beam_width: 4,
            tau: 0.1,
            with_replacement: false,
            warp: Warp::default(),
            seed: 0,
            score: false,
        }
    }
}

impl Settings {
    /// Refuses settings outside their ranges.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting's name, its range and what was found.
    pub fn validate(&self) -> Result<()> {
        self.warp.validate()?;
        if !(1..MAX_TREE).contains(&self.gamma) {
            let most = MAX_TREE - 1;
            return Err(Error::invalid(format!(
                "gamma must be from 1 to {most}, not {}",
                self.gamma
            )));
        }
        if !(1..=MAX_TREE).contains(&self.beam_width) {
            return Err(Error::invalid(format!(
                "beam-width must be from 1 to {MAX_TREE}, not {}",
                self.beam_width
            )));
        }
        // The pending token, then all beams of all steps but the last, whose rows nobody needs.
        let rows = 1 + (self.gamma - 1) * self.beam_width;
        if self.strategy == Strategy::Mtad && rows > MAX_TREE {
            return Err(Error::invalid(format!(
                "gamma {} with beam-width {} drafts {rows} rows per round, and {MAX_TREE} are \
                 allowed; lower one of them",
                self.gamma, self.beam_width
            )));
        }
        if !(self.tau.is_finite() && self.tau >= 0.0) {
            return Err(Error::invalid(format!("tau must be 0 or more, not {}", self.tau)));
        }
        Ok(())
    }
}

/// The models that decode together. They belong to the caller and are lent to each call.
pub struct Models<'a> {
    /// Whose text it is.
    pub target: &'a mut dyn Lm,
    /// Proposes tokens; needed by strategies that draft.
    pub draft: Option<&'a mut dyn Lm>,
}

impl<'a> Models<'a> {
    /// A pair.
    pub fn pair(target: &'a mut dyn Lm, draft: &'a mut dyn Lm) -> Self {
        Models { target, draft: Some(draft) }
    }

    /// A target alone.
    pub fn alone(target: &'a mut dyn Lm) -> Self {
        Models { target, draft: None }
    }

    /// The same models, lent on for a shorter time.
    pub fn reborrow(&mut self) -> Models<'_> {
        Models {
            target: &mut *self.target,
            draft: match &mut self.draft {
                Some(draft) => Some(&mut **draft),
                None => None,
            },
        }
    }

    /// Tokens that both models know: rows of the one may be longer, by padding at their end.
    pub fn vocab(&self) -> usize {
        let target = self.target.vocab_size();
        self.draft.as_ref().map_or(target, |draft| target.min(draft.vocab_size()))
    }
}

/// What one round emitted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Block {
    /// The accepted tokens, then the one drawn from the target.
    pub tokens: Vec<Token>,
    /// How many tokens were drafted in a path.
    pub drafted: usize,
    /// How many of them were accepted: the first `accepted` of `tokens`.
    pub accepted: usize,
    /// ln of the accepted tokens' joint probability under the warped target.
    pub log_p: f64,
    /// The same under the warped draft.
    pub log_q: f64,
    /// ln p of each emitted token under the unwarped target; empty unless scores are wanted.
    pub scores: Vec<f64>,
}

impl Block {
    fn clear(&mut self) {
        self.tokens.clear();
        self.scores.clear();
        (self.drafted, self.accepted, self.log_p, self.log_q) = (0, 0, 0.0, 0.0);
    }

    /// Whether `tokens[i]` was drafted (and not drawn from the target).
    pub fn is_drafted(&self, i: usize) -> bool {
        i < self.accepted
    }

    /// ln (joint p / joint q) of the accepted tokens, if there are any.
    pub fn log_ratio(&self) -> Option<f64> {
        (self.accepted > 0).then_some(self.log_p - self.log_q)
    }
}

/// What an algorithm sees of the decoding during one round.
pub struct Round<'a> {
    /// The models. Their lines are prefixes of `text`, their trees are empty.
    pub models: Models<'a>,
    /// Prompt and emitted tokens. The last one is pending.
    pub text: &'a [Token],
    /// The settings.
    pub settings: &'a Settings,
    /// How many tokens to draft: `settings.gamma`, or what the context has room for.
    pub gamma: usize,
    /// The generator.
    pub rng: &'a mut Rng,
    /// Where phases are marked.
    pub timeline: &'a mut Timeline,
}

/// The tips of the paths that a round wants committed: the longest part of the pending token and
/// the accepted ones that each model evaluated. `None` commits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// In the target's tree.
    pub target: Option<Row>,
    /// In the draft's tree.
    pub draft: Option<Row>,
}

/// A way to choose the next tokens.
pub trait Algorithm: Send {
    /// Does one round: evaluates, fills the (empty) block with one token or more, and says which
    /// rows to commit. It commits none itself.
    ///
    /// # Errors
    /// What the models report. The driver then forgets uncommitted rows.
    fn round(&mut self, round: &mut Round<'_>, block: &mut Block) -> Result<Kept>;
}

/// The pending token's row and those of a chain after it.
struct Rows<'a> {
    outputs: &'a Outputs,
    /// The pending token's place in the batch and in the tree.
    pending: usize,
}

impl<'a> Rows<'a> {
    /// What the row after `i` tokens of the chain returned.
    fn get(&self, i: usize) -> Output<'a> {
        self.outputs.get(self.pending + i)
    }

    /// That row.
    fn row(&self, i: usize) -> Row {
        Row((self.pending + i) as u32)
    }

    /// Scores the block's tokens, the first of which follows the pending token.
    fn score(&self, block: &mut Block, vocab: usize) {
        for (i, &token) in block.tokens.iter().enumerate() {
            block.scores.push(unwarped_log_prob(self.get(i), token, vocab));
        }
    }
}

/// Evaluates, in one pass on an empty tree, what of the text a model has not seen, and `chain`
/// after it. The pending token and the chain return `want`. `later` is how many rows more the tree
/// will have to hold.
fn eval_chain<'a>(
    lm: &'a mut dyn Lm,
    text: &[Token],
    chain: &[Token],
    later: usize,
    want: Want<'_>,
) -> Result<Rows<'a>> {
    let last = text.len() - 1;
    let done = lm.committed();
    if text.len() - done + chain.len() + later > MAX_TREE {
        extend(lm, &text[done..last])?;
    }
    let unseen = &text[lm.committed()..];
    let pending = unseen.len() - 1;
    let mut batch = Batch::new();
    for (i, &token) in unseen.iter().chain(chain).enumerate() {
        let parent = (i > 0).then(|| Row(i as u32 - 1));
        batch.push(token, parent, if i < pending { Want::Nothing } else { want });
    }
    Ok(Rows { outputs: lm.eval(&batch)?, pending })
}

/// The least that rows of `lm` must return under this warping; `largest` as in [`Warp::want`].
fn want(warp: &Warp, lm: &dyn Lm, vocab: usize, largest: Option<usize>) -> Want<'static> {
    warp.want(lm.vocab_size() == vocab, largest)
}

/// The draft of a strategy that needs one.
fn draft_of<'m>(models: &'m mut Models<'_>, strategy: Strategy) -> Result<&'m mut dyn Lm> {
    match &mut models.draft {
        Some(draft) => Ok(&mut **draft),
        None => Err(Error::invalid(format!(
            "strategy {strategy} needs a draft model; name one, or use greedy or sample"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_have_names() {
        for (strategy, name) in Strategy::ALL {
            assert_eq!(strategy.to_string(), name);
            assert_eq!(name.parse::<Strategy>().unwrap(), strategy);
        }
        let message = "beams".parse::<Strategy>().unwrap_err().to_string();
        assert!(message.contains("beams") && message.contains("speculative"), "{message}");
    }

    #[test]
    fn errors_name_the_setting() {
        let fine = Settings::default();
        assert!(fine.validate().is_ok());
        let wide = Settings { gamma: 64, beam_width: 4, ..fine.clone() };
        assert!(Settings { strategy: Strategy::Speculative, ..wide.clone() }.validate().is_ok());
        for (settings, name) in [
            (Settings { gamma: 0, ..fine.clone() }, "gamma"),
            (Settings { gamma: MAX_TREE, ..fine.clone() }, "gamma"),
            (Settings { beam_width: 0, ..fine.clone() }, "beam-width"),
            (wide, "gamma 64 with beam-width 4"),
            (Settings { tau: -1.0, ..fine.clone() }, "tau"),
            (Settings { tau: f64::NAN, ..fine.clone() }, "tau"),
            (Settings { warp: Warp { top_p: 2.0, ..fine.warp }, ..fine.clone() }, "top-p"),
        ] {
            let message = settings.validate().unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
