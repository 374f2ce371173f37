//! What a decoder sees of a language model: a committed line of tokens with a small tree on it.
//!
//! Every decoder in [`crate::decode`] is written against [`Lm`] alone. A model's cache is a
//! *line* of committed rows (prompt and accepted text) plus a *tree* of uncommitted rows (draft
//! candidates). [`Lm::eval`] grows the tree, [`Lm::commit`] commits one path and forgets the rest.
//! Positions and attention masks derive from parents: a row's position is its parent's plus one,
//! and it sees the whole line, its ancestors and itself. Chain drafting, beams, trees, rollback
//! and prompt reuse are all these two calls, and no cache is ever copied.
//!
//! Rows of a line can be kept ([`Lm::keep_rows`]), and other lines of the same model begin with
//! them ([`Lm::adopt_rows`]).

mod kept;
pub mod table;
pub mod tree;

use std::cmp::Ordering;
use std::ops::Range;

use crate::error::{Error, Result};
pub use kept::KeptRows;

/// A token's number in the vocabulary.
pub type Token = u32;

/// The most uncommitted rows that a tree holds.
pub const MAX_TREE: usize = 128;

/// An uncommitted row of the tree: the n-th evaluated since the last [`Lm::commit`] or
/// [`Lm::truncate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row(pub u32);

/// What a row of a batch should return.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Want<'a> {
    /// Nothing: the row only enters the cache.
    Nothing,
    /// All logits.
    Logits,
    /// The `k` largest logits, largest first (ties: the smaller token first), and, if a
    /// temperature is given, the log-sum-exp of all logits divided by it.
    Top {
        /// How many; at most the vocabulary's size are returned.
        k: usize,
        /// Greater than 0. `None` spares a sum over the whole vocabulary.
        temperature: Option<f32>,
    },
    /// The log-probabilities, at `temperature`, of these tokens.
    LogProbs {
        /// Which tokens.
        tokens: &'a [Token],
        /// Greater than 0.
        temperature: f32,
    },
}

/// Tokens to evaluate in one pass.
#[derive(Debug, Clone, Default)]
pub struct Batch<'a> {
    /// The tokens, parents before children.
    pub tokens: Vec<Token>,
    /// The row that each token follows; `None` is the end of the line.
    pub parents: Vec<Option<Row>>,
    /// What each row returns.
    pub wants: Vec<Want<'a>>,
}

impl<'a> Batch<'a> {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a token after `parent` and returns its place in the batch.
    pub fn push(&mut self, token: Token, parent: Option<Row>, want: Want<'a>) -> usize {
        self.tokens.push(token);
        self.parents.push(parent);
        self.wants.push(want);
        self.tokens.len() - 1
    }

    /// A chain of tokens after `parent`: row `first` and those that follow it. The last returns
    /// `want`, the others nothing.
    pub fn chain(tokens: &[Token], parent: Option<Row>, first: Row, want: Want<'a>) -> Self {
        let mut batch = Batch::new();
        for (i, &token) in tokens.iter().enumerate() {
            let parent = if i == 0 { parent } else { Some(Row(first.0 + i as u32 - 1)) };
            let want = if i + 1 == tokens.len() { want } else { Want::Nothing };
            batch.push(token, parent, want);
        }
        batch
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// What one row returned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Output<'a> {
    /// It wanted nothing.
    Nothing,
    /// All logits, one for each token of the vocabulary.
    Logits(&'a [f32]),
    /// The largest logits with their tokens, and the log-sum-exp of all if it was asked for.
    Top {
        /// Largest first.
        top: &'a [(Token, f32)],
        /// ln sum exp(logit / temperature) over the vocabulary.
        log_sum_exp: Option<f64>,
    },
    /// Log-probabilities of the tokens asked for, in their order.
    LogProbs(&'a [f64]),
}

/// The largest logits of some rows, as a device found them.
#[derive(Debug, Clone, Default)]
pub struct TopK {
    /// How many of each row.
    pub k: usize,
    /// Tokens and logits, row by row: largest first, of equal ones the first.
    pub top: Vec<(Token, f32)>,
    /// For each row, ln sum exp(logit / temperature).
    pub log_sum_exp: Vec<f64>,
}

/// The outputs of one [`Lm::eval`], by place in its batch.
///
/// Models fill it with full logits through [`Outputs::from_logits`] or with reduced forms that a
/// device computed through [`Outputs::push_top`] and its siblings.
#[derive(Debug, Default)]
pub struct Outputs {
    rows: Vec<Stored>,
    logits: Vec<f32>,
    top: Vec<(Token, f32)>,
    log_probs: Vec<f64>,
    /// Where the largest of a row are looked for.
    candidates: Vec<(Token, f32)>,
}

/// Ranges into the arrays of [`Outputs`], so that a reused `Outputs` allocates nothing.
#[derive(Debug, Clone)]
enum Stored {
    Nothing,
    Logits(std::ops::Range<usize>),
    Top(std::ops::Range<usize>, Option<f64>),
    LogProbs(std::ops::Range<usize>),
}

impl Outputs {
    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.logits.clear();
        self.top.clear();
        self.log_probs.clear();
    }

    /// Takes over what another holds.
    pub(crate) fn assign(&mut self, other: &Outputs) {
        self.rows.clone_from(&other.rows);
        self.logits.clone_from(&other.logits);
        self.top.clone_from(&other.top);
        self.log_probs.clone_from(&other.log_probs);
    }

    /// What row `i` of the batch returned.
    ///
    /// # Panics
    /// If the batch had no such row.
    pub fn get(&self, i: usize) -> Output<'_> {
        match &self.rows[i] {
            Stored::Nothing => Output::Nothing,
            Stored::Logits(range) => Output::Logits(&self.logits[range.clone()]),
            Stored::Top(range, lse) => {
                Output::Top { top: &self.top[range.clone()], log_sum_exp: *lse }
            }
            Stored::LogProbs(range) => Output::LogProbs(&self.log_probs[range.clone()]),
        }
    }

    /// The full logits of row `i`.
    ///
    /// # Panics
    /// If row `i` did not want [`Want::Logits`].
    pub fn logits(&self, i: usize) -> &[f32] {
        match self.get(i) {
            Output::Logits(logits) => logits,
            other => panic!("row {i} returned {other:?}, not logits"),
        }
    }

    /// Adds a row that wanted nothing.
    pub fn push_nothing(&mut self) {
        self.rows.push(Stored::Nothing);
    }

    /// Adds a row's full logits.
    pub fn push_logits(&mut self, logits: &[f32]) {
        let start = self.logits.len();
        self.logits.extend_from_slice(logits);
        self.rows.push(Stored::Logits(start..self.logits.len()));
    }

    /// Adds a row's largest logits.
    pub fn push_top(
        &mut self,
        top: impl IntoIterator<Item = (Token, f32)>,
        log_sum_exp: Option<f64>,
    ) {
        let start = self.top.len();
        self.top.extend(top);
        self.rows.push(Stored::Top(start..self.top.len(), log_sum_exp));
    }

    /// Adds a row's log-probabilities.
    pub fn push_log_probs(&mut self, log_probs: impl IntoIterator<Item = f64>) {
        let start = self.log_probs.len();
        self.log_probs.extend(log_probs);
        self.rows.push(Stored::LogProbs(start..self.log_probs.len()));
    }

    /// Adds what `want` asks of a row with these logits.
    pub fn push(&mut self, want: &Want<'_>, logits: &[f32]) {
        match *want {
            Want::Nothing => self.push_nothing(),
            Want::Logits => self.push_logits(logits),
            Want::Top { k, temperature } => {
                let mut candidates = std::mem::take(&mut self.candidates);
                largest(logits, k, &mut candidates);
                let lse = temperature.map(|temperature| log_sum_exp(logits, temperature));
                self.push_top(candidates.drain(..), lse);
                self.candidates = candidates;
            }
            Want::LogProbs { tokens, temperature } => {
                let lse = log_sum_exp(logits, temperature);
                self.push_log_probs(
                    tokens.iter().map(|&t| f64::from(logits[t as usize] / temperature) - lse),
                );
            }
        }
    }

    /// Takes whole rows of logits (`logits.len()` = wanting rows x vocabulary, in batch order)
    /// and stores what each row of the batch wants of them.
    pub fn from_logits(&mut self, wants: &[Want<'_>], logits: &[f32], vocab_size: usize) {
        let mut rows = logits.chunks_exact(vocab_size);
        for want in wants {
            match want {
                Want::Nothing => self.push_nothing(),
                want => self.push(want, rows.next().expect("a row of logits for each want")),
            }
        }
    }
}

impl Outputs {
    /// Takes what a device found of the rows that want something, all of which want [`Want::Top`].
    pub(crate) fn push_top_k(&mut self, wants: &[Want<'_>], found: &TopK) {
        let mut rows = found.top.chunks_exact(found.k).zip(&found.log_sum_exp);
        for want in wants {
            match want {
                Want::Top { k, temperature } => {
                    let (top, &sum) = rows.next().expect("a row for each want");
                    self.push_top(top.iter().take(*k).copied(), temperature.map(|_| sum));
                }
                _ => self.push_nothing(),
            }
        }
    }
}

/// The order of logits or weights with their tokens: the larger first, of equal ones the smaller
/// token.
pub(crate) fn largest_first(a: &(Token, f32), b: &(Token, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The `k` largest of `logits` with their tokens, largest first, in `into`.
///
/// One scan that keeps candidates in a buffer of bounded size: nothing of the vocabulary's size is
/// written, and what cannot be among the largest costs one comparison.
pub(crate) fn largest(logits: &[f32], k: usize, into: &mut Vec<(Token, f32)>) {
    into.clear();
    if k == 0 {
        return;
    }
    // Twice what is wanted, so that each selection sheds half of it.
    let most = k.saturating_mul(2).max(64);
    let mut least = f32::NEG_INFINITY;
    for (token, &x) in (0..).zip(logits) {
        // What is not a number must be seen: it comes first, whatever its sign.
        if x >= least || x.is_nan() {
            into.push((token, if x.is_nan() { f32::NAN } else { x }));
            if into.len() == most {
                into.select_nth_unstable_by(k - 1, largest_first);
                into.truncate(k);
                least = into[k - 1].1;
            }
        }
    }
    into.sort_unstable_by(largest_first);
    into.truncate(k);
}

/// ln sum exp(x / temperature), summed in f64.
pub fn log_sum_exp(logits: &[f32], temperature: f32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max) / temperature).exp()).sum();
    f64::from(max / temperature) + sum.ln()
}

/// A language model with one session's cache.
///
/// Implementations keep *width invariance*: a row evaluated among others returns the same bits as
/// alone, otherwise speculation would change the text.
pub trait Lm: Send {
    /// Tokens in the vocabulary: the length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// Rows in the committed line.
    fn committed(&self) -> usize;

    /// The most rows that line and tree may have together.
    fn capacity(&self) -> usize;

    /// Evaluates tokens and appends them to the tree. The first becomes row
    /// `Row(number of uncommitted rows)`, the others follow.
    ///
    /// # Errors
    /// [`crate::Error::ContextFull`] if a row's position would pass [`Lm::capacity`];
    /// [`crate::Error::Invalid`] for a token outside the vocabulary, a parent that is not there,
    /// or more than [`MAX_TREE`] uncommitted rows; what the device reports. After an error
    /// nothing was appended.
    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs>;

    /// Commits the path from the line to `tip` and forgets every other uncommitted row; `None`
    /// forgets all.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if `tip` is not in the tree.
    fn commit(&mut self, tip: Option<Row>) -> Result<()>;

    /// Forgets the tree and all but the first `len` rows of the line, so that a new prompt can
    /// share a prefix with the last.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if the line is shorter.
    fn truncate(&mut self, len: usize) -> Result<()>;

    /// Bytes of a committed row as [`Lm::save_rows`] writes it.
    fn row_bytes(&self) -> usize {
        0
    }

    /// Appends what the cache holds of rows of the line to `out`, in a form that is the same on
    /// every device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the line has no such rows; [`Error::Unsupported`] if this model
    /// cannot do it; what the device reports.
    fn save_rows(&self, _rows: Range<usize>, _out: &mut Vec<u8>) -> Result<()> {
        Err(Error::unsupported("session", "this model's rows cannot be saved"))
    }

    /// Adds `count` rows to the line from what [`Lm::save_rows`] wrote, perhaps in another
    /// process, and forgets the tree.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bytes are not [`Lm::row_bytes`] for each row;
    /// [`Error::ContextFull`]; otherwise as [`Lm::save_rows`].
    fn load_rows(&mut self, _count: usize, _bytes: &[u8]) -> Result<()> {
        Err(Error::unsupported("session", "this model's rows cannot be restored"))
    }

    /// Keeps the first `count` rows of the line for lines of the same model to begin with:
    /// [`Lm::adopt_rows`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if the line is shorter; [`Error::Memory`]; [`Error::Unsupported`] if this
    /// model cannot do it; what the device reports.
    fn keep_rows(&self, _count: usize) -> Result<KeptRows> {
        Err(Error::unsupported("session", "this model's rows cannot be kept"))
    }

    /// Forgets tree and line, and begins a line with the first of some rows that were kept: as many
    /// as there are `tokens`, of which they are the rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are fewer rows, or they are of another model or in a cache of
    /// another type, and [`Error::ContextFull`]; nothing has changed then. [`Error::Unsupported`] if
    /// this model cannot do it; what the device reports.
    fn adopt_rows(&mut self, _kept: &KeptRows, _tokens: &[Token]) -> Result<()> {
        Err(Error::unsupported("session", "this model's rows cannot be taken up"))
    }
}

/// Evaluates `tokens` after the line and commits them, in pieces that fit the tree.
///
/// # Errors
/// As [`Lm::eval`].
pub fn extend(lm: &mut dyn Lm, tokens: &[Token]) -> Result<()> {
    lm.commit(None)?;
    for piece in tokens.chunks(MAX_TREE) {
        lm.eval(&Batch::chain(piece, None, Row(0), Want::Nothing))?;
        lm.commit(Some(Row(piece.len() as u32 - 1)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_those_of_a_full_sort() {
        let mut state = 1u32;
        let mut next = |n: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % n
        };
        let mut found = Vec::new();
        for case in 0..300 {
            let len = 1 + next(3000) as usize;
            // Few different values, so that there are ties; rising ones, the worst case.
            let values = 1 + next(200);
            let logits: Vec<f32> = (0..len)
                .map(|i| if case % 5 == 0 { i as f32 } else { next(values) as f32 - 50.0 })
                .collect();
            let k = next(100) as usize;
            largest(&logits, k, &mut found);
            let mut all: Vec<_> = (0..).zip(logits).collect();
            all.sort_by(largest_first);
            all.truncate(k);
            assert_eq!(found, all);
        }
        for nan in [f32::NAN, -f32::NAN] {
            largest(&[0.0, nan, 1.0], 1, &mut found);
            assert!(found[0].1.is_nan());
        }
    }

    #[test]
    fn a_log_sum_exp_comes_only_when_asked_for() {
        let mut outputs = Outputs::default();
        outputs.push(&Want::Top { k: 1, temperature: None }, &[0.0, 0.0]);
        outputs.push(&Want::Top { k: 3, temperature: Some(2.0) }, &[0.0, 0.0]);
        assert_eq!(outputs.get(0), Output::Top { top: &[(0, 0.0)], log_sum_exp: None });
        let Output::Top { top, log_sum_exp: Some(lse) } = outputs.get(1) else { panic!() };
        assert_eq!(top, [(0, 0.0), (1, 0.0)]);
        assert!((lse - 2.0f64.ln()).abs() < 1e-12);
    }
}
