//! A session: one user's cache over shared weights, as an [`Lm`].

use std::ops::Range;
use std::sync::Arc;

use super::lm::{Batch, Lm, Outputs, Row, Want};
use super::tree::Tree;
use crate::backend::{Backend, CacheShape, Largest, Rows};
use crate::error::{Error, Result};

/// What an architecture says of itself.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Positions that it was trained for.
    pub context: usize,
    /// Multiplications with weights for one row, logits included.
    pub macs: usize,
    /// Bytes of the weights that every pass reads: all matrices, as the file stores them.
    pub weight_bytes: usize,
    /// The most positions that it has any notion of, if there is a limit: learned ones.
    pub position_limit: Option<usize>,
    /// Radians per position of each rotated pair; none if it rotates nothing.
    pub rotary_frequencies: Vec<f64>,
    /// What rotated queries and keys are multiplied with; 1 for most.
    pub rotary_magnitude: f64,
    /// What it keeps for each row.
    pub cache: CacheShape,
}

/// The forward pass of a family of models over a backend's verbs.
pub trait Architecture<B: Backend>: Send + Sync + 'static {
    /// The buffers of one evaluation.
    type Activations: Send;

    /// Its figures.
    fn shape(&self) -> &Shape;

    /// Buffers for a session.
    fn activations(&self, backend: &B) -> Self::Activations;

    /// Evaluates the rows of a pass; computes logits for the rows `wanted`, in that order.
    fn forward(
        &self,
        pass: &mut B::Pass<'_>,
        cache: &mut B::Cache,
        activations: &mut Self::Activations,
        wanted: &[u32],
    );

    /// The buffer in which [`Architecture::forward`] left the logits.
    fn logits<'a>(&self, activations: &'a Self::Activations) -> &'a B::Buffer;
}

/// One session of a model.
pub struct Session<B: Backend, A: Architecture<B>> {
    backend: Arc<B>,
    model: Arc<A>,
    cache: B::Cache,
    cache_shape: CacheShape,
    activations: A::Activations,
    tree: Tree,
    capacity: usize,
    /// Cosine and sine of every pair at every position so far.
    rotations: Vec<[f32; 2]>,
    row_rotations: Vec<[f32; 2]>,
    paths: Vec<u128>,
    wanted: Vec<u32>,
    readback: Vec<f32>,
    largest: Largest,
    outputs: Outputs,
}

impl<B: Backend, A: Architecture<B>> Session<B, A> {
    /// A session of at most `capacity` rows, whose cache is stored as `cache_shape` says.
    pub fn new(backend: Arc<B>, model: Arc<A>, capacity: usize, cache_shape: CacheShape) -> Self {
        let cache = backend.cache(cache_shape);
        let activations = model.activations(&backend);
        Session {
            backend,
            model,
            cache,
            cache_shape,
            activations,
            tree: Tree::default(),
            capacity,
            rotations: Vec::new(),
            row_rotations: Vec::new(),
            paths: Vec::new(),
            wanted: Vec::new(),
            readback: Vec::new(),
            largest: Largest::default(),
            outputs: Outputs::default(),
        }
    }

    /// Collects the rotations and paths of the rows from `first` on.
    fn place(&mut self, first: usize) {
        let Shape { rotary_frequencies, rotary_magnitude, .. } = self.model.shape();
        let pairs = rotary_frequencies.len();
        self.row_rotations.clear();
        self.paths.clear();
        for row in (first..self.tree.len()).map(|r| Row(r as u32)) {
            let position = self.tree.position(row);
            while self.rotations.len() < (position + 1) * pairs {
                let p = (self.rotations.len() / pairs) as f64;
                let rotation = |f: &f64| {
                    let (sin, cos) = (p * f).sin_cos();
                    [(rotary_magnitude * cos) as f32, (rotary_magnitude * sin) as f32]
                };
                self.rotations.extend(rotary_frequencies.iter().map(rotation));
            }
            self.row_rotations.extend_from_slice(&self.rotations[position * pairs..][..pairs]);
            self.paths.push(self.tree.path(row));
        }
    }

    fn forward(&mut self, batch: &Batch<'_>, first: usize) -> Result<()> {
        let wants_logits = |(_, want): &(usize, &Want<'_>)| !matches!(want, Want::Nothing);
        self.wanted.clear();
        let rows = batch.wants.iter().enumerate().filter(wants_logits).map(|(i, _)| i as u32);
        self.wanted.extend(rows);
        self.place(first);
        let rows = Rows {
            tokens: &batch.tokens,
            line: self.tree.line(),
            first_slot: self.tree.line() + first,
            paths: &self.paths,
            rotations: &self.row_rotations,
        };
        let (model, cache, activations) = (&self.model, &mut self.cache, &mut self.activations);
        self.backend.pass(&rows, model.shape().macs, |pass| {
            model.forward(pass, cache, activations, &self.wanted);
            Ok(())
        })?;
        self.outputs.clear();
        if self.wanted.is_empty() {
            batch.wants.iter().for_each(|_| self.outputs.push_nothing());
            return Ok(());
        }
        let logits = model.logits(&self.activations);
        if let Some((k, temperature)) = only_largest(&batch.wants)
            && self.backend.read_largest(logits, k, temperature, &mut self.largest)?
        {
            self.outputs.push_largest(&batch.wants, &self.largest);
            return Ok(());
        }
        let logits = self.backend.read(logits, &mut self.readback)?;
        self.outputs.from_logits(&batch.wants, logits, model.shape().vocab_size);
        Ok(())
    }
}

/// How many of the largest logits do for all rows, and the temperature of their sums, if the rows
/// want nothing else.
fn only_largest(wants: &[Want<'_>]) -> Option<(usize, f32)> {
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

impl<B: Backend, A: Architecture<B>> Lm for Session<B, A> {
    fn vocab_size(&self) -> usize {
        self.model.shape().vocab_size
    }

    fn committed(&self) -> usize {
        self.tree.line()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs> {
        let first = self.tree.len();
        self.tree.append(batch, self.vocab_size(), self.capacity)?;
        if batch.is_empty() {
            self.outputs.clear();
        } else if let Err(error) = self.forward(batch, first) {
            self.tree.pop(batch.len());
            return Err(error);
        }
        Ok(&self.outputs)
    }

    fn keep(&mut self, tip: Option<Row>) -> Result<()> {
        let line = self.tree.line();
        let path = self.tree.keep(tip)?;
        // Row r lies in slot line + r and moves down to its place in the line. Going up the path,
        // no target is a slot that is still to be moved.
        let moves: Vec<_> = path
            .iter()
            .enumerate()
            .map(|(i, row)| (line + row.0 as usize, line + i))
            .filter(|(from, to)| from != to)
            .collect();
        if moves.is_empty() { Ok(()) } else { self.backend.move_rows(&mut self.cache, &moves) }
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.tree.truncate(len)
    }

    fn row_bytes(&self) -> usize {
        self.cache_shape.row_bytes()
    }

    fn save_rows(&self, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        if rows.start > rows.end || rows.end > self.tree.line() {
            return Err(Error::invalid(format!(
                "rows {rows:?} cannot be saved: the line has {}",
                self.tree.line()
            )));
        }
        self.backend.save_rows(&self.cache, rows, out)
    }

    fn load_rows(&mut self, count: usize, bytes: &[u8]) -> Result<()> {
        if count.checked_mul(self.row_bytes()) != Some(bytes.len()) {
            return Err(Error::invalid(format!(
                "{count} rows of {} bytes wanted, not {} bytes",
                self.row_bytes(),
                bytes.len()
            )));
        }
        let line = self.tree.line();
        self.tree.grow(count, self.capacity)?;
        let loaded = self.backend.load_rows(&mut self.cache, line..line + count, bytes);
        loaded.or_else(|error| self.tree.truncate(line).and(Err(error)))
    }
}
