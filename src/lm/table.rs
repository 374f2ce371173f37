//! A language model that is a table: the next token's logits depend on the last token alone.
//!
//! It has no weights and an exact distribution, so decoders can be tested against theory.

use super::tree::Tree;
use super::{Batch, Lm, Outputs, Row, Token};
use crate::error::{Error, Result};

/// A bigram model: row `t` of the table holds the logits of what follows token `t`.
#[derive(Debug)]
pub struct TableLm {
    rows: Vec<Vec<f32>>,
    tree: Tree,
    outputs: Outputs,
    capacity: usize,
}

impl TableLm {
    /// A model over `rows.len()` tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the table is empty or not square.
    pub fn new(rows: Vec<Vec<f32>>) -> Result<Self> {
        if rows.is_empty() || rows.iter().any(|row| row.len() != rows.len()) {
            return Err(Error::invalid(
                "a table model needs as many logits in each row as it has rows",
            ));
        }
        Ok(TableLm {
            rows,
            tree: Tree::default(),
            outputs: Outputs::default(),
            capacity: usize::MAX,
        })
    }

    /// Limits the context to `capacity` rows.
    pub fn with_capacity(mut self, capacity: usize) -> Self {
        self.capacity = capacity;
        self
    }

    /// The logits of what follows `token`.
    pub fn logits_after(&self, token: Token) -> &[f32] {
        &self.rows[token as usize]
    }
}

impl Lm for TableLm {
    fn vocab_size(&self) -> usize {
        self.rows.len()
    }

    fn committed(&self) -> usize {
        self.tree.committed()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs> {
        self.tree.append(batch, self.rows.len(), self.capacity)?;
        self.outputs.clear();
        for (&token, want) in batch.tokens.iter().zip(&batch.wants) {
            self.outputs.push(want, &self.rows[token as usize]);
        }
        Ok(&self.outputs)
    }

    fn commit(&mut self, tip: Option<Row>) -> Result<()> {
        self.tree.commit(tip).map(drop)
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.tree.truncate(len)
    }
}
