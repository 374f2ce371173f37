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

mod auto;
mod autoregressive;
mod beam;
mod beams;
mod bild;
mod chain;
mod cost;
mod driver;
mod dsbd;
mod mmtad;
mod mtad;
mod mtjd;
mod pieces;
mod specinfer;
mod speculative;
mod statistics;
mod strategy;
mod timeline;
mod typical;

use std::borrow::Cow;
use std::sync::Arc;

pub use auto::{Auto, Choice, Decisions};
pub use autoregressive::Autoregressive;
pub use beam::BeamDecoding;
pub use bild::Bild;
pub use cost::CostTable;
pub use driver::{Decoding, Prefill};
pub use dsbd::Dsbd;
pub use mmtad::Mmtad;
pub use mtad::Mtad;
pub use mtjd::Mtjd;
pub use pieces::Interruptible;
pub(crate) use pieces::Pieces;
pub use specinfer::SpecInfer;
pub use speculative::Speculative;
pub use statistics::Statistics;
pub use strategy::{Descriptor, Knob, Strategy};
pub use timeline::{Listener, Phase, Timeline};
pub use typical::Typical;

use crate::error::{Error, Result};
use crate::lm::{Batch, Lm, MAX_TREE, Output, Outputs, Row, Token, Want, extend};
use crate::sampling::{Constraint, Distribution, Guide, Path, Rng, Score, Warp, score};

/// What an algorithm is told to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The algorithm.
    pub strategy: Strategy,
    /// Draft length: tokens drafted per round, at most; of MTJD the tokens of a block. SpecInfer
    /// has `branching` instead, the controller chooses its own.
    pub gamma: usize,
    /// Beams, of strategies that have them. The controller chooses its own.
    pub beam_width: usize,
    /// MTAD's threshold: joint p / joint q of an accepted block is above it.
    pub tau: f64,
    /// Whether beams and candidates are drawn with replacement.
    pub with_replacement: bool,
    /// SpecInfer's tree: children of each node, depth by depth.
    pub branching: Vec<usize>,
    /// BiLD's draft hands over where its largest probability is below this.
    pub fallback: f64,
    /// BiLD's target rolls back to the first token with -ln p above this; may be infinite.
    pub rollback: f64,
    /// Typical acceptance takes tokens with p above this ...
    pub epsilon: f64,
    /// ... or above this times exp(-entropy of p).
    pub delta: f64,
    /// What the controller decides by; `None` has it measured at the start.
    pub costs: Option<Arc<CostTable>>,
    /// How logits become probabilities, for target and draft alike.
    pub warp: Warp,
    /// What the text is held to, from the end of the prompt on: target and draft draw only tokens
    /// that may follow, and the text ends where it is complete.
    pub constraint: Option<Arc<dyn Constraint>>,
    /// Seed of all draws.
    pub seed: u64,
    /// Whether emitted tokens are scored under the unwarped target.
    pub score: bool,
    /// How many of the most probable tokens are told with each score.
    pub alternatives: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            strategy: Strategy::Mtad,
            gamma: 4,
            beam_width: 4,
            tau: 0.1,
            with_replacement: false,
            branching: vec![4, 2, 2],
            fallback: 0.5,
            rollback: 3.0,
            epsilon: 0.09,
            delta: 0.3,
            costs: None,
            warp: Warp::default(),
            constraint: None,
            seed: 0,
            score: false,
            alternatives: 0,
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
        Knob::ALL.into_iter().try_for_each(|knob| knob.validate(self))?;
        // Beside the pending token. Rows of a last step that is not verified are not needed.
        let Descriptor { name, rows, knobs, .. } = *self.strategy.descriptor();
        let rows = rows(self);
        if rows >= MAX_TREE {
            let of = match knobs.contains(&Knob::Branching) {
                true => format!("branching {:?}", self.branching),
                false => format!("gamma {} with beam-width {}", self.gamma, self.beam_width),
            };
            return Err(Error::invalid(format!(
                "{of} makes {rows} rows beside the pending token in a round of {name}, and {} are \
                 allowed; lower it",
                MAX_TREE - 1
            )));
        }
        Ok(())
    }

    /// How many alternatives each score has, if scores are wanted.
    fn scoring(&self) -> Option<usize> {
        self.score.then_some(self.alternatives)
    }

    /// The most tokens that a round drafts in a path.
    fn draft_length(&self) -> usize {
        (self.strategy.descriptor().draft_length)(self)
    }
}

/// Which tokens the models of a pair have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vocabulary {
    /// Tokens of the target. What its rows have beyond is padding, which is never drawn.
    pub tokens: usize,
    /// How many of them, from the first on, are the same tokens in the draft: it drafts these
    /// alone, while the target draws from all of its own.
    pub shared: usize,
    /// What the draft reads in the place of a token that is not shared; a shared one.
    pub stand_in: Token,
}

/// The models that decode together. They belong to the caller and are lent to each call.
pub struct Models<'a> {
    /// Whose text it is.
    pub target: &'a mut dyn Lm,
    /// Proposes tokens; needed by strategies that draft.
    pub draft: Option<&'a mut dyn Lm>,
    vocabulary: Vocabulary,
}

impl<'a> Models<'a> {
    /// A pair of one vocabulary: where rows of the one are longer, that is padding.
    pub fn pair(target: &'a mut dyn Lm, draft: &'a mut dyn Lm) -> Self {
        let tokens = target.vocab_size().min(draft.vocab_size());
        let vocabulary = Vocabulary { tokens, shared: tokens, stand_in: 0 };
        Models { target, draft: Some(draft), vocabulary }
    }

    /// A target alone, all of whose rows are tokens.
    pub fn alone(target: &'a mut dyn Lm) -> Self {
        let tokens = target.vocab_size();
        let vocabulary = Vocabulary { tokens, shared: tokens, stand_in: 0 };
        Models { target, draft: None, vocabulary }
    }

    /// The same models with what is known of their vocabularies, as far as their rows go.
    pub fn with_vocabulary(mut self, vocabulary: Vocabulary) -> Self {
        let tokens = vocabulary.tokens.min(self.target.vocab_size());
        let most = self.draft.as_ref().map_or(tokens, |draft| tokens.min(draft.vocab_size()));
        self.vocabulary = Vocabulary { tokens, shared: vocabulary.shared.min(most), ..vocabulary };
        self
    }

    /// The same models, lent on for a shorter time.
    pub fn reborrow(&mut self) -> Models<'_> {
        Models {
            target: &mut *self.target,
            draft: match &mut self.draft {
                Some(draft) => Some(&mut **draft),
                None => None,
            },
            vocabulary: self.vocabulary,
        }
    }

    /// Tokens of the target: what it draws from.
    pub fn vocab(&self) -> usize {
        self.vocabulary.tokens
    }

    /// Tokens that the draft has too: what it drafts.
    pub fn shared(&self) -> usize {
        self.vocabulary.shared
    }

    /// How the draft reads a text.
    fn draft_reader(&self) -> Reader {
        Reader::Draft { shared: self.vocabulary.shared, stand_in: self.vocabulary.stand_in }
    }
}

/// How a model reads a text of the target's tokens.
#[derive(Debug, Clone, Copy)]
enum Reader {
    /// As it is.
    Target,
    /// With another token for those that it does not have. What it drafts is the worse for that,
    /// but whether it is accepted is decided by the target.
    Draft { shared: usize, stand_in: Token },
}

impl Reader {
    fn read(self, text: &[Token]) -> Cow<'_, [Token]> {
        match self {
            Reader::Draft { shared, stand_in } if text.iter().any(|&t| t as usize >= shared) => {
                let known = |&t: &Token| if (t as usize) < shared { t } else { stand_in };
                text.iter().map(known).collect()
            }
            _ => Cow::Borrowed(text),
        }
    }
}

/// Where a token of the text is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The draft proposed it, and the target accepted it.
    Draft,
    /// The target's own.
    Target,
    /// No other token could follow by the grammar, so that no model was asked.
    Forced,
}

impl Origin {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Draft => "draft",
            Origin::Target => "target",
            Origin::Forced => "forced",
        }
    }
}

/// What one round emitted, or what came without one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Block {
    /// The accepted tokens, then the one drawn from the target. Or forced tokens alone.
    pub tokens: Vec<Token>,
    /// How many tokens were forced: all, or none.
    pub forced: usize,
    /// How many tokens were drafted in a path.
    pub drafted: usize,
    /// How many of them were accepted: the first `accepted` of `tokens`.
    pub accepted: usize,
    /// ln of the accepted tokens' joint probability under the warped target.
    pub log_p: f64,
    /// The same under the warped draft. Of MMTAD: that of the best final beam's first tokens, as
    /// many.
    pub log_q: f64,
    /// Of MTAD and MMTAD: ln p and ln q of each token of the best beam, accepted or not, up to one
    /// that has no probability.
    pub steps: Vec<(f64, f64)>,
    /// Of MTAD and MMTAD: the depths that clear the threshold; bit 0 is the first token.
    pub passed: u128,
    /// What the unwarped target makes of each emitted token; empty unless scores are wanted.
    pub scores: Vec<Score>,
}

impl Block {
    fn clear(&mut self) {
        self.tokens.clear();
        self.scores.clear();
        self.steps.clear();
        (self.forced, self.drafted, self.accepted, self.passed) = (0, 0, 0, 0);
        (self.log_p, self.log_q) = (0.0, 0.0);
    }

    /// Where `tokens[i]` is from.
    pub fn origin(&self, i: usize) -> Origin {
        match i {
            _ if i < self.forced => Origin::Forced,
            _ if i < self.accepted => Origin::Draft,
            _ => Origin::Target,
        }
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
    /// What holds the text to its language, if it has one.
    pub guide: Option<&'a Guide>,
    /// The settings.
    pub settings: &'a Settings,
    /// How many tokens to draft, at most: what the settings say, or what the context has room for.
    pub gamma: usize,
    /// The generator.
    pub rng: &'a mut Rng,
    /// Where phases are marked.
    pub timeline: &'a mut Timeline,
}

impl<'a> Round<'a> {
    /// The text, as rows see it.
    fn path(&self) -> Path<'a> {
        Path { text: self.text, branch: &[], guide: self.guide }
    }
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

    /// What it decided so far, if it decides anything.
    fn decisions(&self, _settings: &Settings) -> Option<Decisions> {
        None
    }
}

/// The pending token's row and those of a chain or a tree after it.
struct Rows<'a> {
    outputs: &'a Outputs,
    /// The pending token's place in the batch and in the tree.
    pending: usize,
}

impl<'a> Rows<'a> {
    /// What a row returned: 0 is the pending token's, the others follow in their order.
    fn get(&self, i: usize) -> Output<'a> {
        self.outputs.get(self.pending + i)
    }

    /// That row.
    fn row(&self, i: usize) -> Row {
        Row((self.pending + i) as u32)
    }

    /// Scores the block's tokens, if that is wanted; each follows the row that `before` names.
    fn score(
        &self,
        block: &mut Block,
        before: impl IntoIterator<Item = usize>,
        vocab: usize,
        settings: &Settings,
    ) {
        let Some(alternatives) = settings.scoring() else { return };
        for (&token, row) in block.tokens.iter().zip(before) {
            block.scores.push(score(self.get(row), token, vocab, alternatives));
        }
    }
}

/// Evaluates, in one pass on an empty tree, what of the text a model has not seen, and nodes after
/// it: tokens with the nodes before them, `None` for the pending token. The pending token and the
/// nodes return `want`. `later` is how many rows more the tree will have to hold.
fn eval_after<'a>(
    lm: &'a mut dyn Lm,
    reader: Reader,
    text: &[Token],
    nodes: impl ExactSizeIterator<Item = (Token, Option<usize>)>,
    later: usize,
    want: Want<'_>,
) -> Result<Rows<'a>> {
    let last = text.len() - 1;
    let done = lm.committed();
    if text.len() - done + nodes.len() + later > MAX_TREE {
        extend(lm, &reader.read(&text[done..last]))?;
    }
    let unseen = reader.read(&text[lm.committed()..]);
    let pending = unseen.len() - 1;
    let mut batch = Batch::new();
    for (i, &token) in unseen.iter().enumerate() {
        let parent = (i > 0).then(|| Row(i as u32 - 1));
        batch.push(token, parent, if i < pending { Want::Nothing } else { want });
    }
    for (token, parent) in nodes {
        let row = parent.map_or(pending, |node| pending + 1 + node);
        batch.push(token, Some(Row(row as u32)), want);
    }
    Ok(Rows { outputs: lm.eval(&batch)?, pending })
}

/// The same for the draft and no nodes.
fn eval_draft<'a>(
    draft: &'a mut dyn Lm,
    reader: Reader,
    text: &[Token],
    later: usize,
    want: Want<'_>,
) -> Result<Rows<'a>> {
    eval_after(draft, reader, text, std::iter::empty(), later, want)
}

/// The target's pass over drafted nodes, between the phases around it.
fn verify_nodes<'a>(
    target: &'a mut dyn Lm,
    timeline: &mut Timeline,
    settings: &Settings,
    vocab: usize,
    path: Path<'_>,
    nodes: impl ExactSizeIterator<Item = (Token, Option<usize>)>,
) -> Result<Rows<'a>> {
    timeline.enter(Phase::Verify);
    let want = want(&settings.warp, target, vocab, path, None, settings.scoring());
    let rows = eval_after(target, Reader::Target, path.text, nodes, 0, want)?;
    timeline.enter(Phase::Sample);
    Ok(rows)
}

/// The same for a chain.
fn verify_chain<'a>(
    target: &'a mut dyn Lm,
    timeline: &mut Timeline,
    settings: &Settings,
    vocab: usize,
    path: Path<'_>,
    chain: &[Token],
) -> Result<Rows<'a>> {
    let nodes = chain.iter().enumerate().map(|(i, &token)| (token, i.checked_sub(1)));
    verify_nodes(target, timeline, settings, vocab, path, nodes)
}

/// The least that rows of `lm` after `path` must return under this warping; `largest` as in [`Warp::want`],
/// `scoring` as in [`Settings::scoring`].
fn want(
    warp: &Warp,
    lm: &dyn Lm,
    vocab: usize,
    path: Path<'_>,
    largest: Option<usize>,
    scoring: Option<usize>,
) -> Want<'static> {
    match scoring {
        // Alternatives are found among all.
        Some(1..) => Want::Logits,
        // The largest logits may all be of tokens that may not follow.
        _ => {
            let whole = lm.vocab_size() == vocab && path.guide.is_none();
            warp.want(whole, largest, scoring.is_some())
        }
    }
}

/// Fills a distribution of the target, from which a token is going to be drawn.
fn fill_target(
    p: &mut Distribution,
    output: Output<'_>,
    vocab: usize,
    warp: &Warp,
    path: Path<'_>,
) -> Result<()> {
    p.fill(output, vocab, warp, path)?;
    match path.guide {
        Some(guide) if p.mass() <= 0.0 => Err(guide.refusal()),
        _ => Ok(()),
    }
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
        let branching = |k: &[usize]| Settings { branching: k.to_vec(), ..fine.clone() };
        assert!(Settings { rollback: f64::INFINITY, ..fine.clone() }.validate().is_ok());
        for (settings, name) in [
            (Settings { gamma: 0, ..fine.clone() }, "gamma"),
            (Settings { gamma: MAX_TREE, ..fine.clone() }, "gamma"),
            (Settings { beam_width: 0, ..fine.clone() }, "beam-width"),
            (wide.clone(), "gamma 64 with beam-width 4"),
            (Settings { strategy: Strategy::Mtjd, ..wide }, "gamma 64 with beam-width 4"),
            (Settings { strategy: Strategy::SpecInfer, ..branching(&[8, 8, 8]) }, "branching"),
            (Settings { strategy: Strategy::SpecInfer, ..branching(&[500; 30]) }, "branching"),
            (branching(&[]), "branching"),
            (branching(&[2, 0]), "branching"),
            (Settings { fallback: 1.5, ..fine.clone() }, "fallback"),
            (Settings { rollback: -1.0, ..fine.clone() }, "rollback"),
            (Settings { rollback: f64::NAN, ..fine.clone() }, "rollback"),
            (Settings { epsilon: -0.1, ..fine.clone() }, "epsilon"),
            (Settings { delta: f64::INFINITY, ..fine.clone() }, "delta"),
            (Settings { tau: -1.0, ..fine.clone() }, "tau"),
            (Settings { tau: f64::NAN, ..fine.clone() }, "tau"),
            (Settings { warp: Warp { top_p: 2.0, ..fine.warp }, ..fine.clone() }, "top-p"),
        ] {
            let message = settings.validate().unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
