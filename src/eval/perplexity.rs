//! Perplexity of a text, as llama.cpp's `llama-perplexity` defines it.
//!
//! The tokens of the text are cut into chunks that do not overlap, each evaluated on its own; a
//! rest that fills no chunk is left out. Where the vocabulary begins texts with a token of its own,
//! that takes the place of a chunk's first token. Only the second half of a chunk is scored, so
//! that every scored token has at least half a chunk before it.

use std::time::Instant;

use crate::decode::Pieces;
use crate::error::{Error, Result, TARGET};
use crate::lm::{Batch, Lm, Output, Row, Token, Want};

/// Rows that are evaluated at a time while nothing is known of their speed.
const FIRST_ROWS: usize = 16;

/// What was found.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Tokens that were scored.
    pub scored: u64,
    /// Chunks that they come from.
    pub chunks: usize,
    sum: f64,
    squares: f64,
}

impl Perplexity {
    fn add(&mut self, log_prob: f64) -> Result<()> {
        if !log_prob.is_finite() {
            return Err(Error::NotFinite { model: TARGET.to_owned() });
        }
        self.scored += 1;
        self.sum -= log_prob;
        self.squares += log_prob * log_prob;
        Ok(())
    }

    /// Mean -ln p of a token.
    pub fn mean(&self) -> f64 {
        self.sum / self.scored as f64
    }

    /// exp of that.
    pub fn value(&self) -> f64 {
        self.mean().exp()
    }

    /// Its standard error, tokens taken as independent.
    pub fn standard_error(&self) -> f64 {
        let n = self.scored as f64;
        let variance = self.squares / n - self.mean() * self.mean();
        (variance.max(0.0) / (n - 1.0)).sqrt() * self.value()
    }
}

/// Scores `tokens` in chunks of `chunk` tokens, at most `most` chunks.
///
/// `tokens` begin with `bos`, if there is one, which begins each chunk. `progress` is told the
/// result so far and the number of chunks after each of them; returning false stops there. So does
/// a model that returns [`Error::Cancelled`] ([`crate::decode::Interruptible`]) within a chunk, of
/// which nothing counts then.
///
/// # Errors
/// A chunk of fewer than 4 tokens or more than the context holds; fewer than two chunks of text, as
/// llama.cpp asks for; logits that are no finite numbers; what the model reports;
/// [`Error::Cancelled`] before the first chunk is done.
pub fn perplexity(
    lm: &mut dyn Lm,
    tokens: &[Token],
    bos: Option<Token>,
    chunk: usize,
    most: Option<usize>,
    progress: &mut dyn FnMut(&Perplexity, usize) -> bool,
) -> Result<Perplexity> {
    if chunk < 4 {
        return Err(Error::invalid(format!("a chunk has at least 4 tokens, not {chunk}")));
    }
    if chunk > lm.capacity() {
        return Err(Error::ContextFull { wanted: chunk, capacity: lm.capacity() });
    }
    if tokens.len() < 2 * chunk {
        return Err(Error::invalid(format!(
            "the text has {} tokens; two chunks of {chunk} are needed at least: give more text or smaller chunks",
            tokens.len()
        )));
    }
    let chunks = (tokens.len() / chunk).min(most.unwrap_or(usize::MAX));
    let mut found = Perplexity::default();
    let mut pieces = Pieces::new(FIRST_ROWS);
    for piece in tokens.chunks_exact(chunk).take(chunks) {
        if !progress(&found, chunks) {
            break;
        }
        let mut with_this = found;
        match score_chunk(lm, piece, bos, &mut with_this, &mut pieces) {
            Ok(()) => found = with_this,
            Err(Error::Cancelled) => break,
            Err(error) => return Err(error),
        }
        found.chunks += 1;
    }
    progress(&found, chunks);
    if found.scored == 0 { Err(Error::Cancelled) } else { Ok(found) }
}

fn score_chunk(
    lm: &mut dyn Lm,
    chunk: &[Token],
    bos: Option<Token>,
    found: &mut Perplexity,
    pieces: &mut Pieces,
) -> Result<()> {
    lm.truncate(0)?;
    let first = chunk.len() / 2;
    let mut start = 0;
    while start < chunk.len() {
        let end = start + pieces.next(chunk.len() - start);
        let clock = Instant::now();
        let mut batch = Batch::new();
        for i in start..end {
            let token = if i == 0 { bos.unwrap_or(chunk[0]) } else { chunk[i] };
            let want = match chunk.get(i + 1..i + 2) {
                Some(tokens) if i >= first => Want::LogProbs { tokens, temperature: 1.0 },
                _ => Want::Nothing,
            };
            batch.push(token, (i > start).then(|| Row((i - start) as u32 - 1)), want);
        }
        let outputs = lm.eval(&batch)?;
        for i in 0..end - start {
            if let Output::LogProbs(log_probs) = outputs.get(i) {
                log_probs.iter().try_for_each(|&log_prob| found.add(log_prob))?;
            }
        }
        lm.commit(Some(Row((end - start) as u32 - 1)))?;
        pieces.took(end - start, clock.elapsed());
        start = end;
    }
    Ok(())
}
