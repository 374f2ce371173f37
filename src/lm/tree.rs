//! Bookkeeping of a committed line and the tree of uncommitted rows on it.

use super::{Batch, MAX_TREE, Row};
use crate::error::{Error, Result};

/// A line of committed rows and a tree of uncommitted ones.
///
/// Row `r` of the tree is stored after the line, in slot `committed + r`. Its *path*, its
/// ancestors in the tree and itself, is a bit-set: what it may attend to beside the line.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    committed: usize,
    ancestors: Vec<u128>,
}

impl Tree {
    /// Rows in the line.
    pub fn committed(&self) -> usize {
        self.committed
    }

    /// Uncommitted rows.
    pub fn len(&self) -> usize {
        self.ancestors.len()
    }

    /// Whether every row is committed.
    pub fn is_empty(&self) -> bool {
        self.ancestors.is_empty()
    }

    /// The ancestors of a row in the tree, and itself.
    pub fn ancestors(&self, row: Row) -> u128 {
        self.ancestors[row.0 as usize]
    }

    /// A row's position in its text, from 0.
    pub fn position(&self, row: Row) -> usize {
        self.committed + self.ancestors(row).count_ones() as usize - 1
    }

    /// Adds the rows of a batch, if all of them fit; otherwise none.
    ///
    /// # Errors
    /// As [`super::Lm::eval`].
    pub fn append(&mut self, batch: &Batch<'_>, vocab_size: usize, capacity: usize) -> Result<()> {
        let before = self.ancestors.len();
        let added = self.try_append(batch, vocab_size, capacity);
        if added.is_err() {
            self.ancestors.truncate(before);
        }
        added
    }

    fn try_append(&mut self, batch: &Batch<'_>, vocab_size: usize, capacity: usize) -> Result<()> {
        assert!(
            batch.parents.len() == batch.len() && batch.wants.len() == batch.len(),
            "a batch has a parent and a want for each token"
        );
        if self.ancestors.len() + batch.len() > MAX_TREE {
            return Err(Error::invalid(format!(
                "{} uncommitted rows wanted; a tree holds {MAX_TREE}",
                self.ancestors.len() + batch.len()
            )));
        }
        for (&token, &parent) in batch.tokens.iter().zip(&batch.parents) {
            if token as usize >= vocab_size {
                return Err(Error::invalid(format!(
                    "token {token} is outside the vocabulary of {vocab_size}"
                )));
            }
            let row = self.ancestors.len();
            let above = match parent {
                None => 0,
                Some(Row(p)) => *self.ancestors.get(p as usize).ok_or_else(|| {
                    Error::invalid(format!("row {row} names the parent {p}, which is not there"))
                })?,
            };
            let path = above | 1 << row;
            let wanted = self.committed + path.count_ones() as usize;
            if wanted > capacity {
                return Err(Error::ContextFull { wanted, capacity });
            }
            self.ancestors.push(path);
        }
        Ok(())
    }

    /// Takes the last `count` rows back, as if they had never been added.
    pub fn pop(&mut self, count: usize) {
        self.ancestors.truncate(self.ancestors.len() - count);
    }

    /// Commits the path to `tip` and empties the tree. Returns the committed rows, from the line
    /// on: the i-th of them now is row `old line + i` of the line.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `tip` is not there.
    pub fn commit(&mut self, tip: Option<Row>) -> Result<Vec<Row>> {
        let path = match tip {
            None => 0,
            Some(Row(r)) => *self.ancestors.get(r as usize).ok_or_else(|| {
                Error::invalid(format!(
                    "row {r} cannot be kept: the tree has {}",
                    self.ancestors.len()
                ))
            })?,
        };
        let rows = rows_of(path).collect::<Vec<_>>();
        self.committed += rows.len();
        self.ancestors.clear();
        Ok(rows)
    }

    /// Empties the tree and adds `count` rows to the line, which were evaluated elsewhere.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if the line would be longer than `capacity`.
    pub fn grow(&mut self, count: usize, capacity: usize) -> Result<()> {
        let wanted = self.committed.saturating_add(count);
        if wanted > capacity {
            return Err(Error::ContextFull { wanted, capacity });
        }
        self.committed = wanted;
        self.ancestors.clear();
        Ok(())
    }

    /// Empties the tree and shortens the line.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the line is shorter than `len`.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.committed {
            return Err(Error::invalid(format!(
                "cannot shorten a line of {} rows to {len}",
                self.committed
            )));
        }
        self.committed = len;
        self.ancestors.clear();
        Ok(())
    }
}

/// The rows of a path, from the line on. Parents come before children, so order of number is
/// order of position.
pub fn rows_of(path: u128) -> impl Iterator<Item = Row> {
    (0..u128::BITS).filter(move |bit| path >> bit & 1 == 1).map(Row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::Want;

    fn grow(tree: &mut Tree, parents: &[Option<u32>]) -> Result<()> {
        let mut batch = Batch::new();
        for &p in parents {
            batch.push(0, p.map(Row), Want::Nothing);
        }
        tree.append(&batch, 1, 1000)
    }

    #[test]
    fn positions_and_ancestors_derive_from_parents() {
        let mut tree = Tree { committed: 10, ancestors: vec![] };
        grow(&mut tree, &[None, None, Some(0), Some(2)]).unwrap();
        grow(&mut tree, &[Some(1)]).unwrap();
        let positions: Vec<_> = (0..5).map(|r| tree.position(Row(r))).collect();
        assert_eq!(positions, [10, 10, 11, 12, 11]);
        assert_eq!(tree.ancestors(Row(3)), 0b1101);
        assert_eq!(tree.commit(Some(Row(3))).unwrap(), [Row(0), Row(2), Row(3)]);
        assert_eq!((tree.committed(), tree.len()), (13, 0));
    }

    #[test]
    fn a_refused_batch_leaves_no_trace() {
        let mut tree = Tree::default();
        grow(&mut tree, &[None]).unwrap();
        assert!(grow(&mut tree, &[Some(0), Some(7)]).is_err());
        assert_eq!(tree.len(), 1);
        assert!(tree.commit(Some(Row(1))).is_err());
        assert!(tree.truncate(1).is_err());
    }
}
