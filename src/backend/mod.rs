//! Where a model runs: the dozen verbs of a forward pass, and the devices that do them.
//!
//! An architecture's forward pass (in [`crate::model`]) is written once against [`Backend`] and
//! [`Pass`]. A backend owns its form of the weights (borrowed, repacked, on a device), its
//! activation buffers and its cache rows. A *pass* is one forward evaluation: on the CPU a team
//! of threads that meet at spinning barriers, on a GPU one encoder and one submission.
//!
//! A backend knows nothing of models, decoders or files beyond a tensor's view.

pub mod cpu;
pub mod gpu;
pub mod split;

use std::ops::Range;

use crate::error::{Error, Result};
use crate::gguf::SharedTensor;

/// The rows of one pass, and what each may attend to.
///
/// Row `i` is stored in cache slot `first_slot + i`. It sees the slots `0..line` and, of the
/// slots from `line` on, those whose bits are set in `paths[i]` (its ancestors in the tree and
/// itself: bit `r` is slot `line + r`). Slots of a path in ascending order are in order of
/// position, so row `i` has position `line + paths[i].count_ones() - 1`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The token of each row.
    pub tokens: &'a [u32],
    /// Committed rows in the cache.
    pub line: usize,
    /// The slot of the first row of this pass.
    pub first_slot: usize,
    /// For each row, the tree slots that it sees.
    pub paths: &'a [u128],
    /// For each row, cosine and sine of each rotated pair, `rotary_dims / 2` of them; none where a
    /// model rotates nothing.
    pub rotations: &'a [[f32; 2]],
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

    /// How many positions row `i` sees, its own included: its position plus one.
    pub fn seen(&self, i: usize) -> usize {
        self.line + self.paths[i].count_ones() as usize
    }
}

/// Which elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryPairs {
    /// (0, 1), (2, 3), ...: GGUF's `llama`.
    Interleaved,
    /// (0, d/2), (1, d/2 + 1), ...: GPT-NeoX and its heirs.
    Halves,
}

/// How cache rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheType {
    /// Half precision: the default.
    #[default]
    F16,
    /// Single precision.
    F32,
}

/// The shape of a model's cache.
#[derive(Debug, Clone, Copy)]
pub struct CacheShape {
    /// Layers with keys and values.
    pub layers: usize,
    /// Key/value heads in a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How rows are stored.
    pub cache_type: CacheType,
}

impl CacheType {
    /// Both types with the names that users know them by.
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

impl CacheShape {
    /// Elements of a row's keys, or of its values, in one layer.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of a row as [`Backend::save_rows`] writes it: keys and values of all layers.
    pub fn row_bytes(&self) -> usize {
        2 * self.layers * self.width() * self.cache_type.bytes()
    }
}

/// The largest numbers of some rows, as a device found them.
#[derive(Debug, Clone, Default)]
pub struct Largest {
    /// How many of each row.
    pub k: usize,
    /// Places and numbers, row by row: largest first, of equal ones the first.
    pub top: Vec<(u32, f32)>,
    /// For each row, ln sum exp(x / temperature).
    pub log_sum_exp: Vec<f64>,
}

/// A device that holds weights and evaluates passes.
pub trait Backend: Send + Sync + 'static {
    /// A matrix of weights in the backend's own form, with its bias if it has one.
    type Matrix: Send + Sync;
    /// A vector of weights, f32.
    type Vector: Send + Sync;
    /// A table whose rows are looked up by token.
    type Embedding: Send + Sync;
    /// Activations: as many rows of f32 as the pass that wrote them has.
    type Buffer: Send;
    /// Key and value rows of all layers.
    type Cache: Send;
    /// A forward evaluation under way.
    type Pass<'p>: Pass<Self>;

    /// What runs: device and instruction set, for people.
    fn describe(&self) -> String;

    /// Takes a weight matrix (`rows` outputs, `cols` inputs) and an optional bias of its outputs.
    ///
    /// # Errors
    /// The type is not supported (naming the tensor), or the device has no room.
    fn matrix(&self, weight: &SharedTensor, bias: Option<&SharedTensor>) -> Result<Self::Matrix>;

    /// Takes matrices that are always multiplied with the same rows, each with its bias, so that a
    /// device may keep them together; otherwise as [`Backend::matrix`].
    ///
    /// # Errors
    /// As [`Backend::matrix`].
    fn matrices(
        &self,
        weights: &[(SharedTensor, Option<SharedTensor>)],
    ) -> Result<Vec<Self::Matrix>> {
        weights.iter().map(|(weight, bias)| self.matrix(weight, bias.as_ref())).collect()
    }

    /// Takes a vector.
    ///
    /// # Errors
    /// As [`Backend::matrix`].
    fn vector(&self, weight: &SharedTensor) -> Result<Self::Vector>;

    /// Takes an embedding table.
    ///
    /// # Errors
    /// As [`Backend::matrix`].
    fn embedding(&self, weight: &SharedTensor) -> Result<Self::Embedding>;

    /// An activation buffer for rows of `width`.
    fn buffer(&self, width: usize) -> Self::Buffer;

    /// An empty cache; it grows on use.
    fn cache(&self, shape: CacheShape) -> Self::Cache;

    /// Copies cache rows from slot to slot, in the given order.
    ///
    /// # Errors
    /// What the device reports.
    fn move_rows(&self, cache: &mut Self::Cache, moves: &[(usize, usize)]) -> Result<()>;

    /// Appends cache rows to `out` in an order that is the same on every device: layer by layer the
    /// keys of all `slots`, then their values; of each slot head by head, element by element, as
    /// the cache stores them, little-endian. Keys are rotated already.
    ///
    /// # Errors
    /// What the device reports; [`Error::Unsupported`] if it cannot do it.
    fn save_rows(
        &self,
        _cache: &Self::Cache,
        _slots: Range<usize>,
        _out: &mut Vec<u8>,
    ) -> Result<()> {
        Err(Error::unsupported(
            self.describe(),
            "sessions cannot be saved or cloned on this device",
        ))
    }

    /// Writes rows that [`Backend::save_rows`] saved, perhaps on another device, to `slots`.
    ///
    /// # Errors
    /// As [`Backend::save_rows`].
    ///
    /// # Panics
    /// If the bytes are not [`CacheShape::row_bytes`] for each slot.
    fn load_rows(
        &self,
        _cache: &mut Self::Cache,
        _slots: Range<usize>,
        _bytes: &[u8],
    ) -> Result<()> {
        Err(Error::unsupported(self.describe(), "sessions cannot be restored on this device"))
    }

    /// Runs `record` as one pass over `rows`. `macs` is roughly how many multiplications a row
    /// costs; it decides how many threads are worth waking.
    ///
    /// # Errors
    /// What `record` or the device reports ([`crate::Error::DeviceLost`] if it went away).
    fn pass<R>(
        &self,
        rows: &Rows<'_>,
        macs: usize,
        record: impl FnOnce(&mut Self::Pass<'_>) -> Result<R>,
    ) -> Result<R>;

    /// The rows of a buffer after the pass that wrote it, one after the other; `copy` may be used
    /// to hold them.
    ///
    /// # Errors
    /// What the device reports.
    fn read<'a>(&self, buffer: &'a Self::Buffer, copy: &'a mut Vec<f32>) -> Result<&'a [f32]>;

    /// The `k` largest of each row of a buffer (which are as long as `k` at least), and their
    /// log-sum-exp at a temperature, where that is cheaper than to read the rows. False if it is
    /// not: the rows are to be read.
    ///
    /// # Errors
    /// What the device reports.
    fn read_largest(
        &self,
        _buffer: &Self::Buffer,
        _k: usize,
        _temperature: f32,
        _largest: &mut Largest,
    ) -> Result<bool> {
        Ok(false)
    }
}

/// The verbs of a forward pass. Shapes are `rows x width`; `rows` is the pass's unless a buffer
/// was written by [`Pass::gather`].
pub trait Pass<B: Backend + ?Sized> {
    /// out\[i\] = table\[tokens\[i\]\].
    fn embed(&mut self, table: &B::Embedding, out: &mut B::Buffer);

    /// x\[i\] += table\[position of row i\]: learned positions.
    fn add_positions(&mut self, table: &B::Embedding, x: &mut B::Buffer);

    /// out = `rows`, one after the other: hidden rows that another backend computed.
    fn write(&mut self, rows: &[f32], out: &mut B::Buffer);

    /// out = x / sqrt(mean(x^2) + epsilon) * weight, row by row (RMSNorm; Zhang and Sennrich
    /// 2019, eq. 4). If a product ([`Pass::linear`]) is the next to read it, `out` is for that product alone: a
    /// backend may make the norm a part of it.
    fn rms_norm(&mut self, x: &B::Buffer, weight: &B::Vector, epsilon: f32, out: &mut B::Buffer);

    /// out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, row by row (LayerNorm; Ba et
    /// al. 2016, eq. 4).
    fn layer_norm(
        &mut self,
        x: &B::Buffer,
        weight: &B::Vector,
        bias: &B::Vector,
        epsilon: f32,
        out: &mut B::Buffer,
    );

    /// Several products of the same input: each out = x W^T + bias.
    fn linear(&mut self, x: &B::Buffer, to: &mut [(&B::Matrix, &mut B::Buffer)]);

    /// out += x W^T + bias: a product with the residual fused.
    fn linear_add(&mut self, x: &B::Buffer, weight: &B::Matrix, out: &mut B::Buffer);

    /// Rotates queries and keys by the rows' rotations, and stores keys and values in the
    /// rows' slots of `layer`. What `k` holds afterwards is the backend's affair.
    fn rotate_and_store(
        &mut self,
        q: &mut B::Buffer,
        k: &mut B::Buffer,
        v: &B::Buffer,
        pairs: RotaryPairs,
        cache: &mut B::Cache,
        layer: usize,
    );

    /// Attention of each row over what it sees, or of that over the last `window` positions, its own
    /// included: out = softmax(q K^T / sqrt(head_dim)) V, head by head; query heads share
    /// key/value heads in groups. Accumulated in order of position.
    fn attend(
        &mut self,
        q: &B::Buffer,
        cache: &B::Cache,
        layer: usize,
        window: Option<usize>,
        out: &mut B::Buffer,
    );

    /// gate = silu(gate) * up (SwiGLU; Shazeer 2020, eq. 6), silu(x) = x / (1 + exp(-x)).
    fn swiglu(&mut self, gate: &mut B::Buffer, up: &B::Buffer);

    /// x = max(x, 0).
    fn relu(&mut self, x: &mut B::Buffer);

    /// out = the given rows of x.
    fn gather(&mut self, x: &B::Buffer, rows: &[u32], out: &mut B::Buffer);
}
