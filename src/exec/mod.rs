//! Where programs run: the CPU and GPUs.
//!
//! An [`Executor`] loads a range of a [`Program`]'s operations as a [`Stage`]: it takes the weights that they
//! use in its own form (borrowed, repacked, on a device). A stage makes caches, one for each sequence, and a
//! workspace, which has the activations of one pass. A pass runs a stage's operations over [`Rows`], which may
//! belong to several sequences: linear layers and norms see rows alone, attention and the storing of keys and
//! values go by [`Segment`].
//!
//! An executor knows nothing of sequences, decoders or files beyond a tensor's view.

pub mod cpu;
pub mod place;
#[cfg(feature = "gpu")]
pub mod wgpu;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::graph::{BufferId, KvShape, Program, RowSet};
use crate::lm::TopK;

/// Consecutive rows of a pass that belong to one sequence.
///
/// Its row `i` is stored in cache slot `first_slot + i`. It sees the slots `0..line` and, of the slots from
/// `line` on, those whose bits are set in its ancestors (bit `r` is slot `line + r`, its own included). Slots of
/// a path in ascending order are in order of position, so the row has position `line + ancestors.count_ones() - 1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The rows of the pass.
    pub rows: Range<usize>,
    /// Committed rows in the cache.
    pub line: usize,
    /// The slot of the first row.
    pub first_slot: usize,
}

/// The rows of one pass, and what each may attend to.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The token of each row.
    pub tokens: &'a [u32],
    /// The rows of each sequence, one behind another. Segment `i` has the `i`-th of the caches.
    pub segments: &'a [Segment],
    /// For each row, the slots from its segment's line on that it sees, its own included.
    pub ancestors: &'a [u128],
    /// For each table of rotations of the program, cosine and sine of each pair at each row's position.
    pub rotations: &'a [Vec<[f32; 2]>],
    /// The rows whose logits are wanted.
    pub wanted: &'a [u32],
}

impl Rows<'_> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How many rows a buffer of such rows has in this pass.
    pub fn count(&self, set: RowSet) -> usize {
        match set {
            RowSet::All => self.len(),
            RowSet::Wanted => self.wanted.len(),
        }
    }
}

impl Segment {
    /// The position of one of the pass's rows, which belongs to this segment.
    pub fn position(&self, row: usize, ancestors: &[u128]) -> usize {
        self.line + ancestors[row].count_ones() as usize - 1
    }
}

/// How cache rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CacheType {
    /// Half precision: the default.
    #[default]
    F16,
    /// Single precision.
    F32,
}

impl CacheType {
    /// All types with the names that users know them by.
    pub const ALL: [(CacheType, &'static str); 2] =
        [(CacheType::F16, "f16"), (CacheType::F32, "f32")];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F16 => "f16",
            CacheType::F32 => "f32",
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            CacheType::F16 => 2,
            CacheType::F32 => 4,
        }
    }
}

/// Bytes that one row takes in a saved session: keys and values of all layers, see [`KvCache::save_rows`].
pub fn row_bytes(layers: &[KvShape], cache_type: CacheType) -> usize {
    layers.iter().map(|layer| 2 * layer.width() * cache_type.bytes()).sum()
}

/// Told the bytes of each weight that was loaded; an error stops the loading.
pub type Loaded<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// A device that runs programs.
pub trait Executor: Send + Sync {
    /// What runs: device and instruction set, for people.
    fn describe(&self) -> String;

    /// Bytes of memory that [`Executor::load`] takes for the weights, beside the file's own pages.
    fn weight_memory(&self, program: &Program, ops: Range<usize>) -> u64;

    /// Takes the weights that the operations `ops` of a program use.
    ///
    /// # Errors
    /// A type is not supported (naming the tensor), or the device has no room; what `loaded` returns.
    fn load(
        self: Arc<Self>,
        program: &Arc<Program>,
        ops: Range<usize>,
        loaded: Loaded<'_>,
    ) -> Result<Box<dyn Stage>>;
}

/// Some operations of a program with their weights on one device.
pub trait Stage: Send + Sync {
    /// An empty cache for the layers of these operations; it grows on use.
    fn cache(&self, cache_type: CacheType) -> Box<dyn KvCache>;

    /// Room for the activations of a pass.
    fn workspace(&self) -> Box<dyn Workspace>;

    /// Runs the operations over `rows`; segment `i` uses `caches[i]`, which this stage made. Buffers that the
    /// stage before this one left are in the workspace already ([`Workspace::write`]).
    ///
    /// # Errors
    /// What the device reports ([`crate::Error::DeviceLost`] if it went away); there is no memory.
    fn run(
        &self,
        rows: &Rows<'_>,
        caches: &mut [&mut dyn KvCache],
        workspace: &mut dyn Workspace,
    ) -> Result<()>;
}

/// The activations of one pass at a time.
pub trait Workspace: Any + Send {
    /// Rows that another stage computed, one after the other, into a buffer.
    ///
    /// # Errors
    /// There is no memory; what the device reports.
    fn write(&mut self, buffer: BufferId, rows: &[f32]) -> Result<()>;

    /// Some rows of a buffer after the pass that wrote it, one after the other; `copy` may be used to hold
    /// them.
    ///
    /// # Errors
    /// What the device reports.
    fn read<'a>(
        &'a mut self,
        buffer: BufferId,
        rows: Range<usize>,
        copy: &'a mut Vec<f32>,
    ) -> Result<&'a [f32]>;

    /// The `k` largest of each of some rows of a buffer, and their log-sum-exp at a temperature, where that is
    /// cheaper than to read the rows. False if it is not: the rows are to be read.
    ///
    /// # Errors
    /// What the device reports.
    fn top_k(
        &mut self,
        _buffer: BufferId,
        _rows: Range<usize>,
        _k: usize,
        _temperature: f32,
        _into: &mut TopK,
    ) -> Result<bool> {
        Ok(false)
    }
}

/// Key and value rows of one sequence, in the layers of one stage.
pub trait KvCache: Any + Send + Sync {
    /// Copies rows from slot to slot, in the given order.
    ///
    /// # Errors
    /// What the device reports.
    fn move_rows(&mut self, moves: &[(usize, usize)]) -> Result<()>;

    /// Appends rows to `out` in an order that is the same on every device: layer by layer the keys of all
    /// `slots`, then their values; of each slot head by head, element by element, as the cache stores them,
    /// little-endian. Keys are rotated already.
    ///
    /// # Errors
    /// What the device reports.
    fn save_rows(&self, slots: Range<usize>, out: &mut Vec<u8>) -> Result<()>;

    /// Writes rows that [`KvCache::save_rows`] saved, perhaps on another device, to `slots`.
    ///
    /// # Errors
    /// As [`KvCache::save_rows`]; there is no memory.
    ///
    /// # Panics
    /// If the bytes are not those of as many slots.
    fn load_rows(&mut self, slots: Range<usize>, bytes: &[u8]) -> Result<()>;

    /// Another cache of the same stage that begins with the first `slots` slots of this one, of which each is to
    /// have been written to. What either is given later the other does not see. The CPU shares what neither has
    /// written to since, and copies nothing before that; a GPU copies, on the device.
    ///
    /// # Errors
    /// What the device reports; there is no memory.
    ///
    /// # Panics
    /// If there was never room for so many.
    fn fork(&self, slots: usize) -> Result<Box<dyn KvCache>>;

    /// Bytes that one row takes in [`KvCache::save_rows`].
    fn row_bytes(&self) -> usize;
}

/// A cache or workspace as what the stage that made it knows it to be.
///
/// # Panics
/// If another stage made it.
pub(crate) fn own<T: Any>(any: &mut dyn Any) -> &mut T {
    any.downcast_mut().expect("a stage is given what it made")
}
