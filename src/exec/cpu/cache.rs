//! Key and value rows of a sequence.
//!
//! Rows are stored in *chunks* of sixteen slots: for each key/value head, keys transposed
//! (`head_dim` x 16, so that a vector's lane is a slot) and then values (16 x `head_dim`, padded to
//! whole vectors, so that a lane is an element). Scores then need no sums across lanes.
//!
//! Two chunks are a *block*, and a layer is a list of blocks. Caches whose texts begin alike share the
//! blocks of what they have in common; one that writes to a block which others have too clones it first.

use std::array::TryFromSliceError;
use std::ops::Range;
use std::sync::Arc;

use super::simd::Simd;
use crate::error::{Error, Result};
use crate::exec::{CacheType, KvCache, row_bytes};
use crate::graph::{KvShape, RotaryPairs};

/// Slots of a chunk.
pub(super) const CHUNK: usize = 16;

/// Slots of a tile, which is what attention loads at a time, and of a block: so a tile has one place in memory, and
/// can be loaded without asking where the line ends.
pub(super) const TILE: usize = 32;

/// The elements of [`TILE`] slots in a layer. (Behind the count of its owners there is a vector, because that can be
/// refused memory.)
pub(super) type Block<E> = Arc<Vec<E>>;

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

/// The rows of one sequence in some layers of a model.
#[derive(Debug)]
pub(super) struct Cache {
    shapes: Vec<KvShape>,
    cache_type: CacheType,
    pub layers: Layers,
}

/// The blocks of each layer.
pub(super) enum Layers {
    F16(Vec<Vec<Block<Half>>>),
    F32(Vec<Vec<Block<f32>>>),
}

impl std::fmt::Debug for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layers::F16(_) => "f16",
            Layers::F32(_) => "f32",
        })
    }
}

/// Where the elements of a slot are in the block that it belongs to.
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
        slot % TILE / CHUNK * self.chunk_len() + head * self.head_len()
    }

    /// Element `d` of the key in `slot`.
    pub fn key(&self, slot: usize, head: usize, d: usize) -> usize {
        self.keys(slot, head) + d * CHUNK + slot % CHUNK
    }

    /// Visits the elements of a layer's keys, slot by slot, and then those of its values: each by its slot, and its
    /// place in the slot's block.
    fn each(&self, slots: Range<usize>, mut visit: impl FnMut(usize, usize)) {
        for slot in slots.clone() {
            for head in 0..self.kv_heads {
                (0..self.head_dim).for_each(|d| visit(slot, self.key(slot, head, d)));
            }
        }
        for slot in slots {
            for head in 0..self.kv_heads {
                let at = self.value(slot, head);
                (at..at + self.head_dim).for_each(|at| visit(slot, at));
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

    /// Where things are in the blocks of a layer.
    pub fn geometry(&self, layer: usize) -> Geometry {
        Geometry::new(&self.shapes[layer])
    }

    /// Makes room for the slots up to the last of `slots` in every layer, and the blocks of `slots` the cache's own,
    /// so that they can be written to: those that other caches have too are cloned.
    ///
    /// # Errors
    /// There is no memory.
    pub fn reserve(&mut self, slots: Range<usize>) -> Result<()> {
        for (i, shape) in self.shapes.iter().enumerate() {
            let g = Geometry::new(shape);
            match &mut self.layers {
                Layers::F16(layers) => reserve(g, &mut layers[i], slots.clone())?,
                Layers::F32(layers) => reserve(g, &mut layers[i], slots.clone())?,
            }
        }
        Ok(())
    }

    /// Stores one row's keys and values in a layer, in a slot that was reserved.
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
        fn apply<E: Element>(g: Geometry, layer: &mut [Block<E>], moves: &[(usize, usize)]) {
            let mut row = Vec::with_capacity(2 * g.kv_heads * g.head_dim);
            for &(from, to) in moves {
                row.clear();
                let block = &layer[from / TILE];
                g.each(from..from + 1, |_, at| row.push(block[at]));
                let block = own_block(&mut layer[to / TILE]);
                let mut elements = row.iter();
                g.each(to..to + 1, |_, at| {
                    block[at] = *elements.next().expect("rows are of one length");
                });
            }
        }
        moves.iter().try_for_each(|&(_, to)| self.reserve(to..to + 1))?;
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
        fn save<E: Element>(
            g: Geometry,
            layer: &[Block<E>],
            slots: Range<usize>,
            out: &mut Vec<u8>,
        ) {
            g.each(slots, |slot, at| {
                out.extend_from_slice(layer[slot / TILE][at].to_bytes().as_ref());
            });
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
        fn load<E: Element>(
            g: Geometry,
            layer: &mut [Block<E>],
            slots: Range<usize>,
            bytes: &[u8],
        ) {
            let first = slots.start / TILE;
            let written = &mut layer[first..slots.end.div_ceil(TILE)];
            let mut blocks: Vec<_> = written.iter_mut().map(own_block).collect();
            let mut elements = bytes.chunks_exact(size_of::<E>());
            g.each(slots, |slot, at| {
                let bytes = elements.next().and_then(|bytes| bytes.try_into().ok());
                let element = E::from_bytes(bytes.expect("the layer's bytes were counted"));
                blocks[slot / TILE - first][at] = element;
            });
        }
        assert_eq!(bytes.len(), slots.len() * self.row_bytes());
        if slots.is_empty() {
            return Ok(());
        }
        self.reserve(slots.clone())?;
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

    fn fork(&self, slots: usize) -> Result<Box<dyn KvCache>> {
        fn first<E>(layers: &[Vec<Block<E>>], blocks: usize) -> Vec<Vec<Block<E>>> {
            layers.iter().map(|layer| layer[..blocks].to_vec()).collect()
        }
        let blocks = slots.div_ceil(TILE);
        let layers = match &self.layers {
            Layers::F16(layers) => Layers::F16(first(layers, blocks)),
            Layers::F32(layers) => Layers::F32(first(layers, blocks)),
        };
        let (shapes, cache_type) = (self.shapes.clone(), self.cache_type);
        Ok(Box::new(Cache { shapes, cache_type, layers }))
    }

    fn row_bytes(&self) -> usize {
        row_bytes(&self.shapes, self.cache_type)
    }
}

/// [`Cache::reserve`] in one layer.
fn reserve<E: Element>(g: Geometry, layer: &mut Vec<Block<E>>, slots: Range<usize>) -> Result<()> {
    let len = TILE / CHUNK * g.chunk_len();
    let room = || {
        let mut block = Vec::new();
        let bytes = (len * size_of::<E>()) as u64;
        let none = |_| Error::no_memory("the cache of a session", bytes);
        block.try_reserve_exact(len).map_err(none)?;
        Ok(block)
    };
    while layer.len() * TILE < slots.end {
        let mut block = room()?;
        block.resize(len, E::default());
        layer.push(Arc::new(block));
    }
    for block in &mut layer[slots.start / TILE..slots.end.div_ceil(TILE)] {
        if Arc::get_mut(block).is_none() {
            let mut clone = room()?;
            clone.extend_from_slice(block);
            *block = Arc::new(clone);
        }
    }
    Ok(())
}

/// A block to write to, which [`Cache::reserve`] made the cache's own: only who has the cache can share it again.
fn own_block<E>(block: &mut Block<E>) -> &mut [E] {
    Arc::get_mut(block).expect("slots are reserved before they are written to")
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
fn store<E: Element>(g: Geometry, layer: &mut [Block<E>], slot: usize, k: &[f32], v: &[f32]) {
    let block = own_block(&mut layer[slot / TILE]);
    for head in 0..g.kv_heads {
        let at = g.key(slot, head, 0);
        for (d, &x) in k[head * g.head_dim..][..g.head_dim].iter().enumerate() {
            block[at + d * CHUNK] = E::from_f32(x);
        }
        let at = g.value(slot, head);
        let values = &v[head * g.head_dim..][..g.head_dim];
        for (to, &x) in block[at..].iter_mut().zip(values) {
            *to = E::from_f32(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;

    use super::*;

    const SHAPES: [KvShape; 2] =
        [KvShape { heads: 2, head_dim: 5 }, KvShape { heads: 1, head_dim: 16 }];

    /// Writes rows of numbers that follow from slot, layer and `salt`.
    fn fill(cache: &mut Cache, slots: Range<usize>, salt: usize) {
        cache.reserve(slots.clone()).unwrap();
        for slot in slots {
            for (layer, shape) in SHAPES.iter().enumerate() {
                let row: Vec<f32> = (0..shape.width())
                    .map(|i| (100 * slot + 20 * layer + i + salt) as f32)
                    .collect();
                let negative: Vec<f32> = row.iter().map(|x| -x).collect();
                cache.store(layer, slot, &row, &negative);
            }
        }
    }

    fn fork(cache: &Cache, slots: usize) -> Cache {
        let fork: Box<dyn Any> = cache.fork(slots).unwrap();
        *fork.downcast().unwrap()
    }

    fn saved(cache: &Cache, slots: Range<usize>) -> Vec<u8> {
        let mut out = Vec::new();
        cache.save_rows(slots, &mut out).unwrap();
        out
    }

    /// Which blocks two caches share, of each layer.
    fn shared(a: &Cache, b: &Cache) -> Vec<Vec<bool>> {
        fn of<E>(a: &[Vec<Block<E>>], b: &[Vec<Block<E>>]) -> Vec<Vec<bool>> {
            let layers = a.iter().zip(b);
            layers.map(|(a, b)| a.iter().zip(b).map(|(a, b)| Arc::ptr_eq(a, b)).collect()).collect()
        }
        match (&a.layers, &b.layers) {
            (Layers::F16(a), Layers::F16(b)) => of(a, b),
            (Layers::F32(a), Layers::F32(b)) => of(a, b),
            _ => panic!("of different types"),
        }
    }

    #[test]
    fn forks_share_blocks_until_one_of_them_writes() {
        for (cache_type, _) in CacheType::ALL {
            let mut first = Cache::new(&SHAPES, cache_type);
            fill(&mut first, 0..70, 0);
            let before = saved(&first, 0..70);
            let mut second = fork(&first, 40);
            // Two blocks hold 40 slots.
            assert_eq!(shared(&first, &second), [[true, true], [true, true]]);
            assert!(saved(&second, 0..40) == saved(&first, 0..40));
            // What follows in the second block is the fork's own affair.
            fill(&mut second, 40..75, 1);
            assert_eq!(shared(&first, &second), [[true, false, false], [true, false, false]]);
            assert!(saved(&first, 0..70) == before);
            assert!(saved(&second, 0..40) == saved(&first, 0..40));
            assert!(saved(&second, 40..70) != saved(&first, 40..70));
            // A fork's fork, written to by each of the ways; and by the one that it came from.
            let written = saved(&second, 0..75);
            for write in 0..3 {
                let mut third = fork(&second, 70);
                assert_eq!(shared(&second, &third), [[true; 3], [true; 3]]);
                match write {
                    0 => third.move_rows(&[(69, 3), (3, 68)]).unwrap(),
                    1 => third.load_rows(30..35, &saved(&first, 50..55)).unwrap(),
                    _ => fill(&mut second, 64..65, 1),
                }
                let expected = [[false, true, false], [false, false, true], [true, true, false]];
                assert_eq!(shared(&second, &third), [expected[write]; 2]);
                assert!(saved(&second, 0..75) == written);
                match write {
                    0 => assert!(saved(&third, 68..69) == saved(&second, 69..70)),
                    1 => assert!(saved(&third, 30..35) == saved(&first, 50..55)),
                    _ => assert!(saved(&third, 0..70) == saved(&second, 0..70)),
                }
            }
            // Whoever is left alone writes in place.
            let at = |cache: &Cache| match &cache.layers {
                Layers::F16(layers) => layers[0][0].as_ptr().addr(),
                Layers::F32(layers) => layers[0][0].as_ptr().addr(),
            };
            let place = at(&second);
            drop(first);
            fill(&mut second, 0..10, 1);
            assert_eq!(at(&second), place);
            assert_eq!(shared(&fork(&second, 0), &second), [[true; 0]; 2]);
        }
    }
}
