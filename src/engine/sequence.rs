//! A sequence: one text's rows, apart from weights and activations; and the handle that decoders see of it.

use std::ops::Range;
use std::sync::Arc;

use super::memory::Reservation;
use super::scheduler::{Found, Post, Scheduler};
use crate::error::{Error, Result};
use crate::exec::{CacheType, KvCache};
use crate::lm::tree::Tree;
use crate::lm::{Batch, KeptRows, Lm, Outputs, Row, Token, Want};

/// The committed rows of a text with the tree on them, and their keys and values.
#[derive(Default)]
pub(super) struct Sequence {
    pub tree: Tree,
    /// One for each stage.
    pub caches: Vec<Box<dyn KvCache>>,
}

/// A sequence of a model, as an [`Lm`].
pub(super) struct Handle {
    scheduler: Arc<Scheduler>,
    /// The sequence, and what it asks of the next pass.
    post: Box<Post>,
    capacity: usize,
    cache_type: CacheType,
    outputs: Outputs,
    /// The memory of its cache: for all rows that it may have, whether it has them alone or not.
    taken: Reservation,
}

/// Rows that are kept. Their memory is taken from the model's budget as if no sequence shared it.
struct Kept {
    scheduler: Arc<Scheduler>,
    cache_type: CacheType,
    /// One for each stage.
    caches: Vec<Box<dyn KvCache>>,
    _taken: Reservation,
}

impl Handle {
    /// An empty sequence of at most `capacity` rows.
    pub fn new(
        scheduler: Arc<Scheduler>,
        capacity: usize,
        cache_type: CacheType,
        taken: Reservation,
    ) -> Self {
        let caches = scheduler.pipeline().caches(cache_type);
        let post = Post::of(Sequence { tree: Tree::default(), caches });
        Handle { scheduler, post, capacity, cache_type, outputs: Outputs::default(), taken }
    }

    fn tree(&self) -> &Tree {
        &self.post.sequence.tree
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<()> {
        let post = &mut self.post;
        post.tokens.clone_from(&batch.tokens);
        post.wanted.clear();
        let wanting = batch.wants.iter().enumerate().filter(|(_, want)| **want != Want::Nothing);
        post.wanted.extend(wanting.map(|(i, _)| i as u32));
        post.top = only_top(&batch.wants);
        let vocab_size = self.scheduler.pipeline().program().vocab_size;
        let outputs = &mut self.outputs;
        outputs.clear();
        self.scheduler.evaluate(&mut self.post, &mut |found| match found {
            Found::Logits(logits) => outputs.from_logits(&batch.wants, logits, vocab_size),
            Found::Top(top) => outputs.push_top_k(&batch.wants, top),
        })
    }
}

/// How many of the largest logits do for all rows, and the temperature of their sums, if the rows
/// want nothing else.
fn only_top(wants: &[Want<'_>]) -> Option<(usize, f32)> {
    let (mut most, mut common) = (0, None);
    for want in wants {
        match *want {
            Want::Nothing => {}
            Want::Top { k, temperature } => {
                most = most.max(k);
                match (common, temperature) {
                    (Some(a), Some(b)) if a != b => return None,
                    (None, Some(_)) => common = temperature,
                    _ => {}
                }
            }
            _ => return None,
        }
    }
    (most > 0).then_some((most, common.unwrap_or(1.0)))
}

impl Lm for Handle {
    fn vocab_size(&self) -> usize {
        self.scheduler.pipeline().program().vocab_size
    }

    fn committed(&self) -> usize {
        self.tree().committed()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs> {
        let vocab_size = self.vocab_size();
        self.post.sequence.tree.append(batch, vocab_size, self.capacity)?;
        if batch.is_empty() {
            self.outputs.clear();
        } else if let Err(error) = self.forward(batch) {
            self.post.sequence.tree.pop(batch.len());
            return Err(error);
        }
        Ok(&self.outputs)
    }

    fn commit(&mut self, tip: Option<Row>) -> Result<()> {
        let Sequence { tree, caches } = &mut self.post.sequence;
        let line = tree.committed();
        let path = tree.commit(tip)?;
        // Row r lies in slot line + r and moves down to its place in the line. Going up the path,
        // no target is a slot that is still to be moved.
        let moves: Vec<_> = path
            .iter()
            .enumerate()
            .map(|(i, row)| (line + row.0 as usize, line + i))
            .filter(|(from, to)| from != to)
            .collect();
        if moves.is_empty() {
            return Ok(());
        }
        caches.iter_mut().try_for_each(|cache| cache.move_rows(&moves))
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.post.sequence.tree.truncate(len)
    }

    fn row_bytes(&self) -> usize {
        self.post.sequence.caches.iter().map(|cache| cache.row_bytes()).sum()
    }

    fn save_rows(&self, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        let committed = self.committed();
        if rows.start > rows.end || rows.end > committed {
            return Err(Error::invalid(format!(
                "rows {rows:?} cannot be saved: the line has {committed}"
            )));
        }
        // Layer by layer: those of the first stage come first.
        let mut caches = self.post.sequence.caches.iter();
        caches.try_for_each(|cache| cache.save_rows(rows.clone(), out))
    }

    fn load_rows(&mut self, count: usize, bytes: &[u8]) -> Result<()> {
        let row_bytes = self.row_bytes();
        if count.checked_mul(row_bytes) != Some(bytes.len()) {
            return Err(Error::invalid(format!(
                "{count} rows of {row_bytes} bytes wanted, not {} bytes",
                bytes.len()
            )));
        }
        let Sequence { tree, caches } = &mut self.post.sequence;
        let line = tree.committed();
        tree.grow(count, self.capacity)?;
        let mut rest = bytes;
        for cache in caches {
            let part;
            (part, rest) = rest.split_at(count * cache.row_bytes());
            if let Err(error) = cache.load_rows(line..line + count, part) {
                return tree.truncate(line).and(Err(error));
            }
        }
        Ok(())
    }
    fn keep_rows(&self, count: usize) -> Result<KeptRows> {
        let committed = self.committed();
        if count > committed {
            return Err(Error::invalid(format!(
                "{count} rows cannot be kept: the line has {committed}"
            )));
        }
        let bytes = count as u64 * self.row_bytes() as u64;
        let what = format!("{count} rows that are kept");
        let taken = self.taken.budget().take(&[(&what, bytes)])?;
        let kept = Kept {
            scheduler: self.scheduler.clone(),
            cache_type: self.cache_type,
            caches: forks(&self.post.sequence.caches, count)?,
            _taken: taken,
        };
        Ok(KeptRows::new(count, bytes, kept))
    }

    fn adopt_rows(&mut self, kept: &KeptRows, tokens: &[Token]) -> Result<()> {
        let own = |kept: &&Kept| Arc::ptr_eq(&kept.scheduler, &self.scheduler);
        let Some(rows) = kept.held::<Kept>().filter(own) else {
            return Err(Error::invalid("the rows that were kept are of another model"));
        };
        if rows.cache_type != self.cache_type {
            return Err(Error::invalid(format!(
                "the rows that were kept are of a cache of type {}, not {}",
                rows.cache_type.name(),
                self.cache_type.name()
            )));
        }
        kept.check(tokens.len(), self.capacity)?;
        let mut tree = Tree::default();
        tree.grow(tokens.len(), self.capacity)?;
        let caches = forks(&rows.caches, tokens.len())?;
        self.post.sequence = Sequence { tree, caches };
        Ok(())
    }
}

/// The first slots of a sequence's caches.
fn forks(caches: &[Box<dyn KvCache>], slots: usize) -> Result<Vec<Box<dyn KvCache>>> {
    caches.iter().map(|cache| cache.fork(slots)).collect()
}
