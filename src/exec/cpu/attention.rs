//! Key and value rows, and attention over them.
//!
//! Rows are stored in *chunks* of sixteen slots: for each key/value head, keys transposed
//! (`head_dim` x 16, so that a vector's lane is a slot) and then values (16 x `head_dim`, padded to
//! whole vectors, so that a lane is an element). Scores then need no sums across lanes.
//!
//! Attention goes through positions in tiles of 32 with an online softmax (Milakov and Gimelshein
//! 2018; Rabe and Staats 2021): no matrix of scores is kept. A tile is a range of *positions*,
//! whatever slots hold them, and sums run in order of position; so a row's result does not depend
//! on whether its ancestors were committed yet, nor on its neighbours in the batch.

use std::array::TryFromSliceError;
use std::ops::Range;

use super::simd::{Simd, exp, max_lanes, sum_lanes};
use crate::backend::{CacheShape, CacheType, RotaryPairs, Rows};

/// Slots of a chunk.
const CHUNK: usize = 16;

/// Positions of a tile.
const TILE: usize = 32;

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

/// The cache of a session: for each layer, chunks of slots.
#[derive(Debug)]
pub struct Cache {
    pub(super) shape: CacheShape,
    pub(super) layers: Layers,
}

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

/// `head_dim` rounded up to whole vectors.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Where things are in a layer.
#[derive(Clone, Copy)]
struct Geometry {
    kv_heads: usize,
    head_dim: usize,
    padded: usize,
}

impl Geometry {
    fn new(shape: &CacheShape) -> Self {
        Geometry {
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            padded: padded(shape.head_dim),
        }
    }

    /// Elements of a chunk for one head: keys, then values.
    fn head_len(&self) -> usize {
        CHUNK * (self.head_dim + self.padded)
    }

    fn chunk_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }

    /// Where the keys of a head begin in the chunk of `slot`.
    fn keys(&self, slot: usize, head: usize) -> usize {
        slot / CHUNK * self.chunk_len() + head * self.head_len()
    }

    /// Element `d` of the key in `slot`.
    fn key(&self, slot: usize, head: usize, d: usize) -> usize {
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
    fn value(&self, slot: usize, head: usize) -> usize {
        self.keys(slot, head) + CHUNK * self.head_dim + slot % CHUNK * self.padded
    }
}

impl Cache {
    pub(super) fn new(shape: CacheShape) -> Self {
        let layers = match shape.cache_type {
            CacheType::F16 => Layers::F16(vec![Vec::new(); shape.layers]),
            CacheType::F32 => Layers::F32(vec![Vec::new(); shape.layers]),
        };
        Cache { shape, layers }
    }

    /// Makes room in `layer` for `slots` slots.
    pub(super) fn reserve(&mut self, layer: usize, slots: usize) {
        // Whole tiles, so that a tile can be loaded without asking where the line ends.
        let len = slots.next_multiple_of(TILE) / CHUNK * Geometry::new(&self.shape).chunk_len();
        fn grow<E: Element>(layer: &mut Vec<E>, len: usize) {
            if layer.len() < len {
                layer.resize(len, E::default());
            }
        }
        match &mut self.layers {
            Layers::F16(layers) => grow(&mut layers[layer], len),
            Layers::F32(layers) => grow(&mut layers[layer], len),
        }
    }

    pub(super) fn move_rows(&mut self, moves: &[(usize, usize)]) {
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
        let g = Geometry::new(&self.shape);
        match &mut self.layers {
            Layers::F16(layers) => layers.iter_mut().for_each(|layer| apply(g, layer, moves)),
            Layers::F32(layers) => layers.iter_mut().for_each(|layer| apply(g, layer, moves)),
        }
    }
}

impl Cache {
    /// Appends rows to `out`, as [`crate::backend::Backend::save_rows`] orders them.
    pub(super) fn save_rows(&self, slots: Range<usize>, out: &mut Vec<u8>) {
        fn save<E: Element>(g: Geometry, layer: &[E], slots: Range<usize>, out: &mut Vec<u8>) {
            g.each(slots, |at| out.extend_from_slice(layer[at].to_bytes().as_ref()));
        }
        let g = Geometry::new(&self.shape);
        out.reserve(slots.len() * self.shape.row_bytes());
        match &self.layers {
            Layers::F16(layers) => layers.iter().for_each(|l| save(g, l, slots.clone(), out)),
            Layers::F32(layers) => layers.iter().for_each(|l| save(g, l, slots.clone(), out)),
        }
    }

    /// Writes rows that were saved.
    pub(super) fn load_rows(&mut self, slots: Range<usize>, bytes: &[u8]) {
        fn load<E: Element>(g: Geometry, layer: &mut [E], slots: Range<usize>, bytes: &[u8]) {
            let mut elements = bytes.chunks_exact(size_of::<E>());
            g.each(slots, |at| {
                let bytes = elements.next().and_then(|bytes| bytes.try_into().ok());
                layer[at] = E::from_bytes(bytes.expect("the layer's bytes were counted"));
            });
        }
        assert_eq!(bytes.len(), slots.len() * self.shape.row_bytes());
        if slots.is_empty() {
            return;
        }
        (0..self.shape.layers).for_each(|layer| self.reserve(layer, slots.end));
        let g = Geometry::new(&self.shape);
        let parts = bytes.chunks_exact(bytes.len() / self.shape.layers);
        match &mut self.layers {
            Layers::F16(layers) => {
                layers.iter_mut().zip(parts).for_each(|(l, part)| load(g, l, slots.clone(), part));
            }
            Layers::F32(layers) => {
                layers.iter_mut().zip(parts).for_each(|(l, part)| load(g, l, slots.clone(), part));
            }
        }
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

/// Stores one row's keys and values.
#[inline(always)]
pub(super) fn store<E: Element>(
    shape: &CacheShape,
    layer: &mut [E],
    slot: usize,
    k: &[f32],
    v: &[f32],
) {
    let g = Geometry::new(shape);
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

/// One attention: shapes and pointers, shared by the threads that split its heads.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    pub rows: Rows<'a>,
    pub shape: &'a CacheShape,
    /// How many positions a row attends to at most; `usize::MAX` for all that it sees. (A number,
    /// because what an optimizer makes of an option in the loops reads the number that `None` does
    /// not have, which is harmless and looks to memory checkers as if it were not.)
    pub window: usize,
    /// Query heads that share a key/value head.
    pub group: usize,
    /// Queries, `stride` f32s a row; heads side by side.
    pub q: &'a [f32],
    /// Outputs, laid out as the queries. Each head is written by one thread.
    pub out: *mut f32,
    pub stride: usize,
}

// SAFETY: threads write disjoint heads of `out`, which nobody else uses during the call.
unsafe impl Sync for Attention<'_> {}

/// What a thread needs beside its arguments; grows once.
#[derive(Default)]
pub(super) struct Scratch {
    tile: Tile,
    /// For each (row, head of the group): largest score so far, sum of exponentials, padded sums.
    state: Vec<f32>,
    /// For each row, the part of its path that is still to be attended to.
    paths: Vec<u128>,
    /// For each row, the first position that it attends to.
    starts: Vec<usize>,
    /// Rows that share what the tile holds, and which part of it each attends to.
    sharing: Vec<Sharing>,
}

/// A row, and the positions of a tile that it attends to: from `skip` on, below `count`.
#[derive(Clone, Copy)]
struct Sharing {
    row: usize,
    skip: usize,
    count: usize,
}

/// Keys and values of up to 32 consecutive positions of one head, widened to f32.
#[derive(Default)]
struct Tile {
    /// head_dim x 32.
    keys: Vec<f32>,
    /// 32 x padded.
    values: Vec<f32>,
    /// Positions that the line fills, from the first on.
    line: usize,
    /// The slots of the positions after those.
    path: Vec<usize>,
}

/// Attends with some of the query heads.
///
/// # Safety
/// The CPU has `S`; `layer` is reserved for every slot that the rows see; `a.out` is valid for
/// rows x stride f32s.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Element>(
    a: &Attention<'_>,
    layer: &[E],
    heads: std::ops::Range<usize>,
    scratch: &mut Scratch,
) {
    let g = Geometry::new(a.shape);
    scratch.tile.keys.resize(g.head_dim * TILE, 0.0);
    scratch.tile.values.resize(TILE * g.padded, 0.0);
    let mut first = heads.start;
    while first < heads.end {
        let kv_head = first / a.group;
        let end = heads.end.min((kv_head + 1) * a.group);
        // SAFETY: the caller's.
        unsafe { attend_group::<S, E>(a, g, layer, kv_head, first..end, scratch) };
        first = end;
    }
}

/// The query heads `heads`, all of which share `kv_head`.
#[inline(always)]
unsafe fn attend_group<S: Simd, E: Element>(
    a: &Attention<'_>,
    g: Geometry,
    layer: &[E],
    kv_head: usize,
    heads: std::ops::Range<usize>,
    scratch: &mut Scratch,
) {
    let Scratch { tile, state, paths, starts, sharing } = scratch;
    let state_len = 2 + g.padded;
    let rows = a.rows.len();
    state.clear();
    state.resize(rows * heads.len() * state_len, 0.0);
    for s in state.chunks_exact_mut(state_len) {
        s[0] = f32::NEG_INFINITY;
    }
    let rest = a.rows.line % TILE;
    let base = a.rows.line - rest;

    // SAFETY (all blocks): slots below `reserve`d are in the layer; the tile is as large as its
    // keys and values; queries and outputs have a head's elements at every row.

    starts.clear();
    starts.extend((0..rows).map(|row| a.rows.seen(row).saturating_sub(a.window)));
    let earliest = starts.iter().copied().min().unwrap_or(0);

    // Whole tiles of the line, which every row sees.
    for first in (earliest / TILE * TILE..base).step_by(TILE) {
        sharing.clear();
        let end = first + TILE;
        let attending = starts.iter().enumerate().filter(|(_, start)| **start < end);
        sharing.extend(attending.map(|(row, start)| Sharing {
            row,
            skip: start.saturating_sub(first),
            count: TILE,
        }));
        // SAFETY: as above.
        unsafe {
            tile.load_line::<S, E>(g, layer, kv_head, first, TILE);
            rows_step::<S>(a, g, heads.clone(), sharing, tile, state);
        }
    }
    // The line's rest, behind which each row goes on with its own path. Rows whose paths begin
    // alike, as those of a chain do, share what is loaded.
    paths.clear();
    paths.extend_from_slice(a.rows.paths);
    let (mut first, mut line) = (base, rest);
    while paths.iter().any(|path| *path != 0) {
        // SAFETY: as above.
        unsafe { tile.load_line::<S, E>(g, layer, kv_head, base, line) };
        sharing.clear();
        for (row, path) in paths.iter_mut().enumerate().filter(|(_, path)| **path != 0) {
            let mut count = line;
            while *path != 0 && count < TILE {
                let slot = a.rows.line + path.trailing_zeros() as usize;
                if tile.path.get(count - line) != Some(&slot) {
                    // SAFETY: as above.
                    unsafe {
                        if count - line < tile.path.len() {
                            rows_step::<S>(a, g, heads.clone(), sharing, tile, state);
                            sharing.clear();
                            tile.path.truncate(count - line);
                        }
                        tile.push_slot::<S, E>(g, layer, kv_head, slot);
                    }
                }
                *path &= *path - 1;
                count += 1;
            }
            let skip = starts[row].saturating_sub(first);
            if skip < count {
                sharing.push(Sharing { row, skip, count });
            }
        }
        // SAFETY: as above.
        unsafe { rows_step::<S>(a, g, heads.clone(), sharing, tile, state) };
        (first, line) = (first + TILE, 0);
    }

    for row in 0..rows {
        for (i, head) in heads.clone().enumerate() {
            let s = &state[(row * heads.len() + i) * state_len..][..state_len];
            let whole = g.head_dim / S::LANES * S::LANES;
            // SAFETY: as above; this thread owns the head.
            unsafe {
                let out = a.out.add(row * a.stride + head * g.head_dim);
                for d in (0..whole).step_by(S::LANES) {
                    let sums = S::load(s.as_ptr().add(2 + d));
                    S::store(out.add(d), S::div(sums, S::f32(s[1])));
                }
                for d in whole..g.head_dim {
                    *out.add(d) = s[2 + d] / s[1];
                }
            }
        }
    }
}

/// Adds to the state of each row, for each of the heads, the positions of the tile that it attends to.
///
/// Queries go four at a time: a vector of the tile is loaded once for all, and their sums do not
/// wait for each other. What a query gets does not depend on its neighbours.
#[inline(always)]
unsafe fn rows_step<S: Simd>(
    a: &Attention<'_>,
    g: Geometry,
    heads: std::ops::Range<usize>,
    rows: &[Sharing],
    tile: &Tile,
    state: &mut [f32],
) {
    let (count, state_len) = (rows.len() * heads.len(), 2 + g.padded);
    let mut i = 0;
    while i < count {
        let n = if i + 4 <= count { 4 } else { 1 };
        let none = Query { q: std::ptr::null(), state: std::ptr::null_mut(), skip: 0, count: 0 };
        let mut queries = [none; 4];
        for (j, query) in queries[..n].iter_mut().enumerate() {
            let Sharing { row, skip, count } = rows[(i + j) / heads.len()];
            let head = (i + j) % heads.len();
            let at = (row * heads.len() + head) * state_len;
            *query = Query {
                q: a.q[row * a.stride + (heads.start + head) * g.head_dim..][..g.head_dim].as_ptr(),
                state: state[at..][..state_len].as_mut_ptr(),
                skip,
                count,
            };
        }
        // SAFETY: the caller's; the states of different queries do not overlap.
        unsafe {
            if n == 4 {
                tile_step::<S, 4>(&queries, tile, g);
            } else {
                tile_step::<S, 1>(&[queries[0]], tile, g);
            }
        }
        i += n;
    }
}

impl Tile {
    /// Starts a tile with the slots `first..first + count` of the line; `first` is a tile's. Whole
    /// chunks are loaded: what lies past `count` is overwritten or not looked at.
    #[inline(always)]
    unsafe fn load_line<S: Simd, E: Element>(
        &mut self,
        g: Geometry,
        layer: &[E],
        head: usize,
        first: usize,
        count: usize,
    ) {
        self.line = count;
        self.path.clear();
        for at in (0..count).step_by(CHUNK) {
            let chunk = &layer[g.keys(first + at, head)..][..g.head_len()];
            let (k, v) = chunk.split_at(CHUNK * g.head_dim);
            // SAFETY: lanes stay inside the chunk, whose rows are whole vectors, and the tile.
            unsafe {
                for d in 0..g.head_dim {
                    for lane in (0..CHUNK).step_by(S::LANES) {
                        let x = E::load::<S>(k.as_ptr().add(d * CHUNK + lane));
                        S::store(self.keys.as_mut_ptr().add(d * TILE + at + lane), x);
                    }
                }
                for i in (0..v.len()).step_by(S::LANES) {
                    let x = E::load::<S>(v.as_ptr().add(i));
                    S::store(self.values.as_mut_ptr().add(at * g.padded + i), x);
                }
            }
        }
    }

    /// Adds the next position, which is in `slot`.
    #[inline(always)]
    unsafe fn push_slot<S: Simd, E: Element>(
        &mut self,
        g: Geometry,
        layer: &[E],
        head: usize,
        slot: usize,
    ) {
        let at = self.line + self.path.len();
        self.path.push(slot);
        let key = g.key(slot, head, 0);
        for d in 0..g.head_dim {
            self.keys[d * TILE + at] = layer[key + d * CHUNK].to_f32();
        }
        let v = &layer[g.value(slot, head)..][..g.padded];
        let to = &mut self.values[at * g.padded..][..g.padded];
        for i in (0..g.padded).step_by(S::LANES) {
            // SAFETY: rows of values are whole vectors.
            unsafe { S::store(to.as_mut_ptr().add(i), E::load::<S>(v.as_ptr().add(i))) };
        }
    }
}

/// One query head of one row.
#[derive(Clone, Copy)]
struct Query {
    /// head_dim elements.
    q: *const f32,
    /// 2 + padded elements, see [`Scratch`].
    state: *mut f32,
    /// Positions of the tile that it attends to: from `skip` on, below `count`.
    skip: usize,
    count: usize,
}

/// Adds a tile to the states of `N` queries.
///
/// # Safety
/// The pointers of the queries are valid for what they say, the tile's vectors are as long as `g`
/// has them, and the CPU has `S`.
#[inline(always)]
unsafe fn tile_step<S: Simd, const N: usize>(queries: &[Query; N], tile: &Tile, g: Geometry) {
    // SAFETY: keys are head_dim x TILE, values TILE x padded, each state 2 + padded.
    unsafe {
        let mut p = [[0f32; TILE]; N];
        let scale = S::f32(1.0 / (g.head_dim as f32).sqrt());
        // Two vectors at a time, so that the sums of four queries stay in registers.
        for first in (0..TILE).step_by(2 * S::LANES) {
            let mut scores = [[S::f32(0.0); 2]; N];
            for d in 0..g.head_dim {
                let at = tile.keys.as_ptr().add(d * TILE + first);
                let (k0, k1) = (S::load(at), S::load(at.add(S::LANES)));
                for (scores, query) in scores.iter_mut().zip(queries) {
                    let x = S::f32(*query.q.add(d));
                    scores[0] = S::fma(x, k0, scores[0]);
                    scores[1] = S::fma(x, k1, scores[1]);
                }
            }
            for (p, scores) in p.iter_mut().zip(scores) {
                let at = p.as_mut_ptr().add(first);
                S::store(at, S::mul(scores[0], scale));
                S::store(at.add(S::LANES), S::mul(scores[1], scale));
            }
        }
        for (p, query) in p.iter_mut().zip(queries) {
            let state = std::slice::from_raw_parts_mut(query.state, 2 + g.padded);
            softmax_step::<S>(p, query.skip..query.count, state);
        }
        let mut d = 0;
        while d < g.padded {
            // As many sums as the registers hold.
            d += match (g.padded - d) / S::LANES {
                4.. if S::TILE >= 8 => weigh::<S, N, 4>(queries, &p, tile, g, d),
                2.. => weigh::<S, N, 2>(queries, &p, tile, g, d),
                _ => weigh::<S, N, 1>(queries, &p, tile, g, d),
            };
        }
    }
}

/// Adds the tile's values, by their weights `p`, to `V` vectors of the sums of `N` queries, from
/// element `d` on; returns the elements done.
///
/// # Safety
/// As [`tile_step`]'s; `d` and the elements done are within `padded`.
#[inline(always)]
unsafe fn weigh<S: Simd, const N: usize, const V: usize>(
    queries: &[Query; N],
    p: &[[f32; TILE]; N],
    tile: &Tile,
    g: Geometry,
    d: usize,
) -> usize {
    // SAFETY: the caller's; counts are at most TILE.
    unsafe {
        let values = tile.values.as_ptr().add(d);
        let mut sums = [[S::f32(0.0); V]; N];
        // What all of them attend to.
        let (mut skip, mut common) = (0, TILE);
        for (sums, query) in sums.iter_mut().zip(queries) {
            (skip, common) = (skip.max(query.skip), common.min(query.count));
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(query.state.add(2 + d + v * S::LANES));
            }
        }
        // (Weights of 0 for what a query does not attend to would not do: a value may be infinite.)
        for ((sums, p), query) in sums.iter_mut().zip(p).zip(queries) {
            let before = query.skip..skip.min(query.count);
            add_rows::<S, V>(sums, p, before, values, g);
        }
        for j in skip..common {
            let row = values.add(j * g.padded);
            let mut x = [S::f32(0.0); V];
            for (v, x) in x.iter_mut().enumerate() {
                *x = S::load(row.add(v * S::LANES));
            }
            for (sums, p) in sums.iter_mut().zip(p) {
                let p = S::f32(*p.get_unchecked(j));
                for (sum, x) in sums.iter_mut().zip(&x) {
                    *sum = S::fma(p, *x, *sum);
                }
            }
        }
        for ((sums, p), query) in sums.iter_mut().zip(p).zip(queries) {
            add_rows::<S, V>(sums, p, common.max(skip)..query.count, values, g);
            for (v, sum) in sums.iter().enumerate() {
                S::store(query.state.add(2 + d + v * S::LANES), *sum);
            }
        }
        V * S::LANES
    }
}

/// Adds some of a tile's values, by their weights `p`, to one query's sums.
///
/// # Safety
/// As [`weigh`]'s; `positions` are below [`TILE`].
#[inline(always)]
unsafe fn add_rows<S: Simd, const V: usize>(
    sums: &mut [S::F; V],
    p: &[f32; TILE],
    positions: Range<usize>,
    values: *const f32,
    g: Geometry,
) {
    for j in positions {
        // SAFETY: the caller's.
        unsafe {
            let row = values.add(j * g.padded);
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(S::f32(p[j]), S::load(row.add(v * S::LANES)), *sum);
            }
        }
    }
}

/// Turns a tile's scores into weights relative to the largest score so far, and brings the state
/// to that scale.
#[inline(always)]
unsafe fn softmax_step<S: Simd>(p: &mut [f32; TILE], within: Range<usize>, state: &mut [f32]) {
    let Range { start, end } = within;
    p[..start].fill(f32::NEG_INFINITY);
    p[end..].fill(f32::NEG_INFINITY);
    // SAFETY: `p` is TILE long, the state 2 and then whole vectors.
    unsafe {
        let at = p.as_mut_ptr();
        let mut largest = S::load(at);
        for j in (S::LANES..TILE).step_by(S::LANES) {
            largest = S::max(largest, S::load(at.add(j)));
        }
        let before = state[0];
        let now = before.max(max_lanes::<S>(largest));
        for j in (0..TILE).step_by(S::LANES) {
            S::store(at.add(j), exp::<S>(S::sub(S::load(at.add(j)), S::f32(now))));
        }
        // The exponential of minus infinity is a small number, not 0.
        p[..start].fill(0.0);
        p[end..].fill(0.0);
        let at = p.as_mut_ptr();
        let mut sum = S::load(at);
        for j in (S::LANES..TILE).step_by(S::LANES) {
            sum = S::add(sum, S::load(at.add(j)));
        }
        let sum = sum_lanes::<S>(sum);
        if now == before {
            state[1] += sum;
            return;
        }
        let mut correction = [0f32; 16];
        S::store(correction.as_mut_ptr(), exp::<S>(S::f32(before - now)));
        state[0] = now;
        state[1] = state[1] * correction[0] + sum;
        let sums = state[2..].as_mut_ptr();
        for d in (0..state.len() - 2).step_by(S::LANES) {
            S::store(sums.add(d), S::mul(S::load(sums.add(d)), S::f32(correction[0])));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::cpu::noise::Noise;
    use crate::backend::cpu::{Buffer, Cpu, Isa};
    use crate::backend::{Backend, CacheShape, CacheType, Pass, RotaryPairs, Rows};

    fn buffer(cpu: &Cpu, width: usize, rows: &[Vec<f32>]) -> Buffer {
        let mut out = cpu.buffer(width);
        out.set_rows(rows.len());
        for (i, row) in rows.iter().enumerate() {
            out.row_mut(i)[..width].copy_from_slice(row);
        }
        out
    }

    /// Keys, values and queries of slots `0..line + tree`, and the paths of the tree's slots.
    struct Case {
        shape: CacheShape,
        group: usize,
        line: usize,
        window: Option<usize>,
        k: Vec<Vec<f32>>,
        v: Vec<Vec<f32>>,
        q: Vec<Vec<f32>>,
        paths: Vec<u128>,
    }

    impl Case {
        fn new(
            shape: CacheShape,
            group: usize,
            line: usize,
            tree: usize,
            window: Option<usize>,
            noise: &mut Noise,
        ) -> Self {
            let (slots, width) = (line + tree, shape.kv_heads * shape.head_dim);
            let mut rows = |n: usize, width| (0..n).map(|_| noise.floats(width)).collect();
            let (k, v, q) = (rows(slots, width), rows(slots, width), rows(slots, width * group));
            // Long chains with a few branches.
            let mut paths: Vec<u128> = Vec::new();
            for i in 0..tree {
                let parent = match noise.below(4) {
                    0 => noise.below(i + 1).checked_sub(1),
                    _ => i.checked_sub(1),
                };
                paths.push(parent.map_or(0, |p| paths[p]) | 1 << i);
            }
            Case { shape, group, line, window, k, v, q, paths }
        }

        /// Stores everything, and attends with the rows `rows` of the tree.
        fn run(&self, cpu: &Cpu, rows: std::ops::Range<usize>) -> Vec<Vec<f32>> {
            let width = self.shape.kv_heads * self.shape.head_dim;
            let mut cache = cpu.cache(self.shape);
            let mut pass = |line: usize, range: std::ops::Range<usize>, paths: &[u128]| {
                if range.is_empty() {
                    return Vec::new();
                }
                let tokens = vec![0; range.len()];
                let rotations = vec![[1.0, 0.0]; range.len()];
                let first_slot = range.start;
                let rows = Rows { tokens: &tokens, line, first_slot, paths, rotations: &rotations };
                let mut q = buffer(cpu, width * self.group, &self.q[range.clone()]);
                let mut k = buffer(cpu, width, &self.k[range.clone()]);
                let v = buffer(cpu, width, &self.v[range.clone()]);
                let mut out = cpu.buffer(width * self.group);
                // (So many multiplications that all threads are called.)
                cpu.pass(&rows, usize::MAX, |pass| {
                    let pairs = RotaryPairs::Interleaved;
                    pass.rotate_and_store(&mut q, &mut k, &v, pairs, &mut cache, 0);
                    pass.attend(&q, &cache, 0, self.window, &mut out);
                    Ok(())
                })
                .unwrap();
                (0..range.len()).map(|i| out.row(i)[..width * self.group].to_vec()).collect()
            };
            for slot in 0..self.line {
                pass(slot, slot..slot + 1, &[1]);
            }
            let (line, tree) = (self.line, self.paths.len());
            pass(line, line..line + rows.start, &self.paths[..rows.start]);
            let out = pass(line, line + rows.start..line + rows.end, &self.paths[rows.clone()]);
            pass(line, line + rows.end..line + tree, &self.paths[rows.end..]);
            out
        }

        /// Head by head in double precision.
        fn exact(&self, row: usize) -> Vec<f64> {
            let (d, path) = (self.shape.head_dim, self.paths[row]);
            let tree = (0..self.paths.len()).filter(|r| path >> r & 1 == 1).map(|r| self.line + r);
            let seen: Vec<usize> = (0..self.line).chain(tree).collect();
            let window = self.window.unwrap_or(seen.len());
            let seen = &seen[seen.len().saturating_sub(window)..];
            let mut out = Vec::new();
            for head in 0..self.shape.kv_heads * self.group {
                let q = &self.q[self.line + row][head * d..][..d];
                let at = head / self.group * d;
                let dot = |k: &[f32]| -> f64 {
                    q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
                };
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|&slot| (dot(&self.k[slot][at..][..d]) / (d as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..d).map(|i| {
                    let value = |(&slot, w): (&usize, &f64)| w * f64::from(self.v[slot][at + i]);
                    seen.iter().zip(&weights).map(value).sum::<f64>() / total
                }));
            }
            out
        }
    }

    #[test]
    fn attention_is_exact_and_a_row_gets_the_same_bits_alone_and_among_others() {
        let mut noise = Noise(3);
        let cases = [
            (64, 2, 4, 70, 13, None),
            (80, 1, 1, 31, 40, None),
            (8, 2, 3, 0, 66, None),
            (16, 1, 5, 64, 1, None),
            // Windows that end within a tile, a path, one position, and before the first.
            (64, 2, 2, 101, 20, Some(50)),
            (16, 1, 3, 33, 60, Some(7)),
            (8, 1, 1, 40, 9, Some(1)),
            (8, 1, 2, 64, 9, Some(1000)),
        ];
        for (head_dim, kv_heads, group, line, tree, window) in cases {
            let cache_type = CacheType::F32;
            let shape = CacheShape { layers: 1, kv_heads, head_dim, cache_type };
            let case = Case::new(shape, group, line, tree, window, &mut noise);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let cpu = Cpu::with_isa(2, isa).unwrap();
                let together = case.run(&cpu, 0..tree);
                for row in (0..tree).step_by(7) {
                    let alone = &case.run(&cpu, row..row + 1)[0];
                    assert!(*alone == together[row], "{isa}: row {row} is not the same alone");
                    for (x, exact) in together[row].iter().zip(case.exact(row)) {
                        assert!((f64::from(*x) - exact).abs() < 1e-5, "{isa} {row}: {x} {exact}");
                    }
                }
            }
        }
    }
}
