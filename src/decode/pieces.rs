//! Long runs of tokens in pieces small enough that one who wants to stop does not wait.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::lm::{Batch, KeptRows, Lm, MAX_TREE, Outputs, Row, Token, Want};

/// Fewer rows than this are hardly faster: a pass reads all weights anyway.
const LEAST: usize = 8;

/// How many rows to evaluate at a time: as many as took no longer than they should so far, and at
/// most a tree full. What is computed does not depend on it (see [`Lm`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pieces {
    rows: usize,
    longest: Duration,
}

impl Pieces {
    /// How long a piece should take where nobody waits but the one who may stop it.
    pub const LONGEST: Duration = Duration::from_millis(400);

    /// `first` rows at first, while nothing is known of their speed.
    pub fn new(first: usize) -> Self {
        Pieces { rows: first.clamp(LEAST, MAX_TREE), longest: Self::LONGEST }
    }

    /// For a model that multiplies `macs` weights for each row: pieces that take a slow machine
    /// no longer than they should.
    pub fn of_model(macs: usize, longest: Duration) -> Self {
        /// Multiplications per second that any machine for which a model of billions of weights is
        /// meant can do.
        const SLOW: f64 = 150e9;
        let first = (SLOW * longest.as_secs_f64() / macs.max(1) as f64) as usize;
        Pieces { longest, ..Self::new(first) }
    }

    /// How many of `left` rows come next.
    pub fn next(&self, left: usize) -> usize {
        left.min(self.rows)
    }

    /// Learns how long `rows` rows took.
    pub fn took(&mut self, rows: usize, time: Duration) {
        let fit = rows as f64 * self.longest.as_secs_f64() / time.as_secs_f64().max(1e-9);
        // A short piece says little of a long one.
        self.rows = (fit as usize).min(8 * rows.max(LEAST)).clamp(LEAST, MAX_TREE);
    }
}

/// Evaluates and commits what of `tokens` is not in the line.
///
/// # Errors
/// What the model reports; [`Error::Cancelled`] if `stop` is set before it is done: the line is a
/// prefix of `tokens` then.
pub(super) fn fill(
    lm: &mut dyn Lm,
    tokens: &[Token],
    mut pieces: Pieces,
    stop: &AtomicBool,
) -> Result<()> {
    lm.commit(None)?;
    loop {
        let left = &tokens[lm.committed()..];
        if left.is_empty() {
            return Ok(());
        }
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let piece = &left[..pieces.next(left.len())];
        let start = Instant::now();
        lm.eval(&Batch::chain(piece, None, Row(0), Want::Nothing))?;
        lm.commit(Some(Row(piece.len() as u32 - 1)))?;
        pieces.took(piece.len(), start.elapsed());
    }
}

/// A model that evaluates nothing more once it is told to stop: [`Lm::eval`] then returns
/// [`Error::Cancelled`].
pub struct Interruptible<'a> {
    lm: &'a mut dyn Lm,
    stop: &'a AtomicBool,
}

impl<'a> Interruptible<'a> {
    /// `lm` until `stop` is set.
    pub fn new(lm: &'a mut dyn Lm, stop: &'a AtomicBool) -> Self {
        Interruptible { lm, stop }
    }
}

impl Lm for Interruptible<'_> {
    fn vocab_size(&self) -> usize {
        self.lm.vocab_size()
    }

    fn committed(&self) -> usize {
        self.lm.committed()
    }

    fn capacity(&self) -> usize {
        self.lm.capacity()
    }

    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Cancelled),
            false => self.lm.eval(batch),
        }
    }

    fn commit(&mut self, tip: Option<Row>) -> Result<()> {
        self.lm.commit(tip)
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.lm.truncate(len)
    }

    fn row_bytes(&self) -> usize {
        self.lm.row_bytes()
    }

    fn save_rows(&self, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        self.lm.save_rows(rows, out)
    }

    fn load_rows(&mut self, count: usize, bytes: &[u8]) -> Result<()> {
        self.lm.load_rows(count, bytes)
    }

    fn keep_rows(&self, count: usize) -> Result<KeptRows> {
        self.lm.keep_rows(count)
    }

    fn adopt_rows(&mut self, kept: &KeptRows, tokens: &[Token]) -> Result<()> {
        self.lm.adopt_rows(kept, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_the_speed() {
        let mut pieces = Pieces::of_model(6_600_000_000, Pieces::LONGEST);
        assert_eq!(pieces.next(1000), 9);
        // Fast after all.
        pieces.took(9, Duration::from_millis(1));
        assert_eq!(pieces.next(1000), 72);
        pieces.took(72, Duration::from_millis(8));
        assert_eq!((pieces.next(1000), pieces.next(5)), (MAX_TREE, 5));
        // 40 rows a second, then hardly any.
        pieces.took(128, Duration::from_millis(3200));
        assert_eq!(pieces.next(1000), 16);
        pieces.took(16, Duration::from_secs(60));
        assert_eq!(pieces.next(1000), LEAST);
        // A small model is not cut at all.
        assert_eq!(Pieces::of_model(10_000_000, Pieces::LONGEST).next(1000), MAX_TREE);
        assert_eq!(Pieces::of_model(0, Pieces::LONGEST).next(1000), MAX_TREE);
    }
}
