//! Key and value rows of a sequence.
//!
//! Rows are stored in *chunks* of sixteen slots: for each key/value head, keys transposed
//! (`head_dim` x 16, so that a vector's lane is a slot) and then values (16 x `head_dim`, padded to
//! whole vectors, so that a lane is an element). Scores then need no sums across lanes.

use std::array::TryFromSliceError;
use std::ops::Range;

use super::simd::Simd;
use crate::error::{Error, Result};
use crate::exec::{CacheType, KvCache, row_bytes};
use crate::graph::{KvShape, RotaryPairs};

/// Slots of a chunk.
pub(super) const CHUNK: usize = 16;

/// Slots are made room for in whole tiles of so many, so that attention can load a tile without asking where the
/// line ends.
pub(super) const TILE: usize = 32;

/// How an element of the cache is stored.
pub(super) trait Element: Copy + Default + Send + Sync {
    /// Its bytes, little-endian.
    type Bytes: AsRef<[u8]> + for<'a> TryFrom<&'a [u8], Error = TryFromSliceError>;
    fn to_bytes(self) -> Self::Bytes;
    fn from_bytes(bytes: Self::Bytes) -> Self;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
    /// # Safety
    /// As [`Simd`]'s loads.
    unsafe fn load<S: Simd>(p: *const Self) -> S::F;
}

/// An f16, by its bits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Half(u16);

impl Element for Half {
    type Bytes = [u8; 2];
    fn to_bytes(self) -> [u8; 2] {
        self.0.to_le_bytes()
    }
    fn from_bytes(bytes: [u8; 2]) -> Self {
        Half(u16::from_le_bytes(bytes))
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Half(half::f16::from_f32(x).to_bits())
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        half::f16::from_bits(self.0).to_f32()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's; `Half` is a u16.
        unsafe { S::load_f16(p.cast()) }
    }
}

impl Element for f32 {
    type Bytes = [u8; 4];
    fn to_bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
    fn from_bytes(bytes: [u8; 4]) -> Self {
        f32::from_le_bytes(bytes)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load(p) }
    }
}

/// The rows of one sequence in some layers of a model: for each layer, chunks of slots.
#[derive(Debug)]
pub(super) struct Cache {
    shapes: Vec<KvShape>,
    cache_type: CacheType,
    pub layers: Layers,
}

/// The elements of each layer.
pub(super) enum Layers {
    F16(Vec<Vec<Half>>),
    F32(Vec<Vec<f32>>),
}

impl std::fmt::Debug for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layers::F16(_) => "f16",
            Layers::F32(_) => "f32",
        })
    }
}

/// Where things are in a layer.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub kv_heads: usize,
    pub head_dim: usize,
    /// `head_dim` rounded up to whole vectors.
    pub padded: usize,
}

impl Geometry {
    pub fn new(shape: &KvShape) -> Self {
        let padded = shape.head_dim.next_multiple_of(16);
        Geometry { kv_heads: shape.heads, head_dim: shape.head_dim, padded }
    }

    /// Elements of a chunk for one head: keys, then values.
    pub fn head_len(&self) -> usize {
        CHUNK * (self.head_dim + self.padded)
    }

    fn chunk_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }

    /// Where the keys of a head begin in the chunk of `slot`.
    pub fn keys(&self, slot: usize, head: usize) -> usize {
        slot / CHUNK * self.chunk_len() + head * self.head_len()
    }

    /// Element `d` of the key in `slot`.
    pub fn key(&self, slot: usize, head: usize, d: usize) -> usize {
        self.keys(slot, head) + d * CHUNK + slot % CHUNK
    }

    /// Visits the elements of a layer's keys, slot by slot, and then those of its values.
    fn each(&self, slots: Range<usize>, mut visit: impl FnMut(usize)) {
        for slot in slots.clone() {
            for head in 0..self.kv_heads {
                (0..self.head_dim).for_each(|d| visit(self.key(slot, head, d)));
            }
        }
        for slot in slots {
            for head in 0..self.kv_heads {
                let at = self.value(slot, head);
                (at..at + self.head_dim).for_each(&mut visit);
            }
        }
    }

    /// The first element of the value in `slot`.
    pub fn value(&self, slot: usize, head: usize) -> usize {
        self.keys(slot, head) + CHUNK * self.head_dim + slot % CHUNK * self.padded
    }
}

impl Cache {
    /// An empty cache for layers of these shapes.
    pub fn new(shapes: &[KvShape], cache_type: CacheType) -> Self {
        let layers = match cache_type {
            CacheType::F16 => Layers::F16(vec![Vec::new(); shapes.len()]),
            CacheType::F32 => Layers::F32(vec![Vec::new(); shapes.len()]),
        };
        Cache { shapes: shapes.to_vec(), cache_type, layers }
    }

    /// Where things are in a layer.
    pub fn geometry(&self, layer: usize) -> Geometry {
        Geometry::new(&self.shapes[layer])
    }

    /// Makes room for `slots` slots in every layer.
    ///
    /// # Errors
    /// There is no memory.
    pub fn reserve(&mut self, slots: usize) -> Result<()> {
        fn grow<E: Element>(layers: &mut [Vec<E>], shapes: &[KvShape], slots: usize) -> Result<()> {
            for (layer, shape) in layers.iter_mut().zip(shapes) {
                let len = slots.next_multiple_of(TILE) / CHUNK * Geometry::new(shape).chunk_len();
                if layer.len() < len {
                    let more = len - layer.len();
                    layer.try_reserve(more).map_err(|_| {
                        Error::no_memory("the cache of a session", (more * size_of::<E>()) as u64)
                    })?;
                    layer.resize(len, E::default());
                }
            }
            Ok(())
        }
        match &mut self.layers {
            Layers::F16(layers) => grow(layers, &self.shapes, slots),
            Layers::F32(layers) => grow(layers, &self.shapes, slots),
        }
    }

    /// Stores one row's keys and values in a layer.
    pub fn store(&mut self, layer: usize, slot: usize, k: &[f32], v: &[f32]) {
        let g = self.geometry(layer);
        match &mut self.layers {
            Layers::F16(layers) => store(g, &mut layers[layer], slot, k, v),
            Layers::F32(layers) => store(g, &mut layers[layer], slot, k, v),
        }
    }
}

impl KvCache for Cache {
    fn move_rows(&mut self, moves: &[(usize, usize)]) -> Result<()> {
        fn apply<E: Element>(g: Geometry, layer: &mut [E], moves: &[(usize, usize)]) {
            for &(from, to) in moves {
                for head in 0..g.kv_heads {
                    for d in 0..g.head_dim {
                        layer[g.key(to, head, d)] = layer[g.key(from, head, d)];
                    }
                    let from = g.value(from, head);
                    layer.copy_within(from..from + g.padded, g.value(to, head));
                }
            }
        }
        for (i, shape) in self.shapes.iter().enumerate() {
            let g = Geometry::new(shape);
            match &mut self.layers {
                Layers::F16(layers) => apply(g, &mut layers[i], moves),
                Layers::F32(layers) => apply(g, &mut layers[i], moves),
            }
        }
        Ok(())
    }

    fn save_rows(&self, slots: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        fn save<E: Element>(g: Geometry, layer: &[E], slots: Range<usize>, out: &mut Vec<u8>) {
            g.each(slots, |at| out.extend_from_slice(layer[at].to_bytes().as_ref()));
        }
        let bytes = slots.len() * self.row_bytes();
        out.try_reserve(bytes).map_err(|_| Error::no_memory("a saved session", bytes as u64))?;
        for (i, shape) in self.shapes.iter().enumerate() {
            let g = Geometry::new(shape);
            match &self.layers {
                Layers::F16(layers) => save(g, &layers[i], slots.clone(), out),
                Layers::F32(layers) => save(g, &layers[i], slots.clone(), out),
            }
        }
        Ok(())
    }

    fn load_rows(&mut self, slots: Range<usize>, bytes: &[u8]) -> Result<()> {
        fn load<E: Element>(g: Geometry, layer: &mut [E], slots: Range<usize>, bytes: &[u8]) {
            let mut elements = bytes.chunks_exact(size_of::<E>());
            g.each(slots, |at| {
                let bytes = elements.next().and_then(|bytes| bytes.try_into().ok());
                layer[at] = E::from_bytes(bytes.expect("the layer's bytes were counted"));
            });
        }
        assert_eq!(bytes.len(), slots.len() * self.row_bytes());
        if slots.is_empty() {
            return Ok(());
        }
        self.reserve(slots.end)?;
        let mut rest = bytes;
        for (i, shape) in self.shapes.iter().enumerate() {
            let (g, of_row) = (Geometry::new(shape), row_bytes(&[*shape], self.cache_type));
            let part;
            (part, rest) = rest.split_at(slots.len() * of_row);
            match &mut self.layers {
                Layers::F16(layers) => load(g, &mut layers[i], slots.clone(), part),
                Layers::F32(layers) => load(g, &mut layers[i], slots.clone(), part),
            }
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        row_bytes(&self.shapes, self.cache_type)
    }
}

/// Rotates the heads of one row in place: each pair (x, y) by its angle.
#[inline(always)]
pub(super) fn rotate(x: &mut [f32], head_dim: usize, rotations: &[[f32; 2]], pairs: RotaryPairs) {
    let half = rotations.len();
    for head in x.chunks_exact_mut(head_dim) {
        match pairs {
            RotaryPairs::Interleaved => {
                for (pair, &[cos, sin]) in head.chunks_exact_mut(2).zip(rotations) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * cos - b * sin;
                    pair[1] = a * sin + b * cos;
                }
            }
            RotaryPairs::Halves => {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for ((a, b), &[cos, sin]) in first.iter_mut().zip(second).zip(rotations) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }
}

#[inline(always)]
fn store<E: Element>(g: Geometry, layer: &mut [E], slot: usize, k: &[f32], v: &[f32]) {
    for head in 0..g.kv_heads {
        let at = g.key(slot, head, 0);
        for (d, &x) in k[head * g.head_dim..][..g.head_dim].iter().enumerate() {
            layer[at + d * CHUNK] = E::from_f32(x);
        }
        let at = g.value(slot, head);
        let values = &v[head * g.head_dim..][..g.head_dim];
        for (to, &x) in layer[at..].iter_mut().zip(values) {
            *to = E::from_f32(x);
        }
    }
}
