//! Rows that outlive the line that they are from.

use std::any::Any;

use crate::error::{Error, Result};

/// The first rows of a line, kept for other lines of the same model to begin with: see
/// [`super::Lm::keep_rows`] and [`super::Lm::adopt_rows`].
///
/// What holds them is the model's own affair. They stay what they are whatever becomes of the lines
/// that they are from and of those that took them up.
pub struct KeptRows {
    count: usize,
    bytes: u64,
    held: Box<dyn Any + Send + Sync>,
}

impl KeptRows {
    /// `count` rows that take `bytes` bytes, in what their model knows them by.
    pub fn new(count: usize, bytes: u64, held: impl Any + Send + Sync) -> Self {
        KeptRows { count, bytes, held: Box::new(held) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their bytes. Where lines and other rows that are kept share some of them, all together take less
    /// memory than the sum.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a line that holds `capacity` rows can begin with `rows` of them.
    ///
    /// # Errors
    /// As [`super::Lm::adopt_rows`].
    pub(crate) fn check(&self, rows: usize, capacity: usize) -> Result<()> {
        if rows > self.count {
            let count = self.count;
            return Err(Error::invalid(format!("{rows} rows wanted, and {count} were kept")));
        }
        match rows > capacity {
            true => Err(Error::ContextFull { wanted: rows, capacity }),
            false => Ok(()),
        }
    }

    /// What holds them, if it is of this kind.
    pub fn held<T: Any>(&self) -> Option<&T> {
        self.held.downcast_ref()
    }
}

impl std::fmt::Debug for KeptRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptRows")
            .field("count", &self.count)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
