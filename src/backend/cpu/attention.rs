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

use super::simd::{Simd, exp, max_lanes, sum_lanes};
use crate::backend::{CacheShape, CacheType, RotaryPairs, Rows};

/// Slots of a chunk.
const CHUNK: usize = 16;

/// Positions of a tile.
const TILE: usize = 32;

/// How an element of the cache is stored.
pub(super) trait Element: Copy + Default + Send + Sync {
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
    /// A tile's keys, head_dim x 32.
    keys: Vec<f32>,
    /// A tile's values, 32 x padded.
    values: Vec<f32>,
    /// For each (row, head of the group): largest score so far, sum of exponentials, padded sums.
    state: Vec<f32>,
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
    scratch.keys.resize(g.head_dim * TILE, 0.0);
    scratch.values.resize(TILE * g.padded, 0.0);
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
    let Scratch { keys, values, state } = scratch;
    let state_len = 2 + g.padded;
    state.clear();
    state.resize(a.rows.len() * heads.len() * state_len, 0.0);
    for s in state.chunks_exact_mut(state_len) {
        s[0] = f32::NEG_INFINITY;
    }
    let rest = a.rows.line % TILE;
    let base = a.rows.line - rest;

    // SAFETY (all blocks): slots below `reserve`d are in the layer; tiles are as large as keys
    // and values; queries and outputs have a head's elements at every row.

    // Whole tiles of the line: converted once, used by every row and head.
    for tile in (0..base).step_by(TILE) {
        // SAFETY: as above.
        unsafe {
            load_tile::<S, E>(g, layer, kv_head, tile, TILE, keys, values);
            let rows = 0..a.rows.len();
            rows_step::<S>(a, g, heads.clone(), rows, TILE, keys, values, state);
        }
    }
    // The line's rest is shared too; then each row goes on with its own path.
    let mut shared = false;
    for row in 0..a.rows.len() {
        if !shared {
            // SAFETY: as above.
            unsafe { load_tile::<S, E>(g, layer, kv_head, base, rest, keys, values) };
            shared = true;
        }
        let (mut count, mut path) = (rest, a.rows.paths[row]);
        while path != 0 {
            // SAFETY: as above.
            unsafe {
                if count == TILE {
                    rows_step::<S>(a, g, heads.clone(), row..row + 1, TILE, keys, values, state);
                    (count, shared) = (0, false);
                }
                let slot = a.rows.line + path.trailing_zeros() as usize;
                load_slot::<S, E>(g, layer, kv_head, slot, count, keys, values);
            }
            path &= path - 1;
            count += 1;
        }
        // SAFETY: as above.
        unsafe {
            rows_step::<S>(a, g, heads.clone(), row..row + 1, count, keys, values, state);
        }
    }

    for row in 0..a.rows.len() {
        for (i, head) in heads.clone().enumerate() {
            let s = &state[(row * heads.len() + i) * state_len..][..state_len];
            for d in 0..g.head_dim {
                // SAFETY: as above; this thread owns the head.
                unsafe { *a.out.add(row * a.stride + head * g.head_dim + d) = s[2 + d] / s[1] };
            }
        }
    }
}

/// Adds the first `count` positions of a tile to the states of some rows, for each of the heads.
///
/// Queries go four at a time: a vector of keys is loaded once for all, and their sums do not wait
/// for each other. What a query gets does not depend on its neighbours.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn rows_step<S: Simd>(
    a: &Attention<'_>,
    g: Geometry,
    heads: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
    count: usize,
    keys: &[f32],
    values: &[f32],
    state: &mut [f32],
) {
    let state_len = 2 + g.padded;
    let all = rows.start * heads.len()..rows.end * heads.len();
    let mut i = all.start;
    while i < all.end {
        let n = if i + 4 <= all.end { 4 } else { 1 };
        let mut q = [&[][..]; 4];
        for (j, q) in q[..n].iter_mut().enumerate() {
            let (row, head) = ((i + j) / heads.len(), heads.start + (i + j) % heads.len());
            *q = &a.q[row * a.stride + head * g.head_dim..][..g.head_dim];
        }
        let states = &mut state[i * state_len..(i + n) * state_len];
        // SAFETY: the caller's.
        unsafe {
            if n == 4 {
                tile_step::<S, 4>(&q, keys, values, g, count, states);
            } else {
                tile_step::<S, 1>(&[q[0]], keys, values, g, count, states);
            }
        }
        i += n;
    }
}

/// Widens the keys and values of the slots `first..first + count`; `first` is a tile's. Whole chunks
/// are loaded: what lies past `count` is overwritten or masked by who uses it.
#[inline(always)]
unsafe fn load_tile<S: Simd, E: Element>(
    g: Geometry,
    layer: &[E],
    head: usize,
    first: usize,
    count: usize,
    keys: &mut [f32],
    values: &mut [f32],
) {
    for at in (0..count).step_by(CHUNK) {
        let chunk = &layer[g.keys(first + at, head)..][..g.head_len()];
        let (k, v) = chunk.split_at(CHUNK * g.head_dim);
        // SAFETY: lanes stay inside the chunk, whose rows are whole vectors, and the tile.
        unsafe {
            for d in 0..g.head_dim {
                for lane in (0..CHUNK).step_by(S::LANES) {
                    let x = E::load::<S>(k.as_ptr().add(d * CHUNK + lane));
                    S::store(keys.as_mut_ptr().add(d * TILE + at + lane), x);
                }
            }
            for i in (0..v.len()).step_by(S::LANES) {
                let x = E::load::<S>(v.as_ptr().add(i));
                S::store(values.as_mut_ptr().add(at * g.padded + i), x);
            }
        }
    }
}

/// Widens one slot's key and value into position `at` of the tile.
#[inline(always)]
unsafe fn load_slot<S: Simd, E: Element>(
    g: Geometry,
    layer: &[E],
    head: usize,
    slot: usize,
    at: usize,
    keys: &mut [f32],
    values: &mut [f32],
) {
    let key = g.key(slot, head, 0);
    for d in 0..g.head_dim {
        keys[d * TILE + at] = layer[key + d * CHUNK].to_f32();
    }
    let v = &layer[g.value(slot, head)..][..g.padded];
    for i in (0..g.padded).step_by(S::LANES) {
        // SAFETY: rows of values are whole vectors.
        unsafe {
            let x = E::load::<S>(v.as_ptr().add(i));
            S::store(values[at * g.padded..][..g.padded].as_mut_ptr().add(i), x);
        }
    }
}

/// Adds the first `count` positions of a tile to the states of `N` queries.
#[inline(always)]
unsafe fn tile_step<S: Simd, const N: usize>(
    queries: &[&[f32]; N],
    keys: &[f32],
    values: &[f32],
    g: Geometry,
    count: usize,
    states: &mut [f32],
) {
    let vectors = TILE / S::LANES;
    // SAFETY: keys are head_dim x TILE, values TILE x padded, each state 2 + padded.
    unsafe {
        // No instruction set has vectors so short that a tile needs more than eight. Pairs of
        // them at a time, so that the sums of four queries stay in registers.
        let mut p = [[0f32; TILE]; N];
        let scale = S::f32(1.0 / (g.head_dim as f32).sqrt());
        for first in (0..vectors).step_by(2) {
            let mut scores = [[S::f32(0.0); 2]; N];
            for d in 0..g.head_dim {
                let at = keys.as_ptr().add(d * TILE + first * S::LANES);
                let (k0, k1) = (S::load(at), S::load(at.add(S::LANES)));
                for (scores, q) in scores.iter_mut().zip(queries) {
                    let x = S::f32(*q.get_unchecked(d));
                    scores[0] = S::fma(x, k0, scores[0]);
                    scores[1] = S::fma(x, k1, scores[1]);
                }
            }
            for (p, scores) in p.iter_mut().zip(scores) {
                let at = p.as_mut_ptr().add(first * S::LANES);
                S::store(at, S::mul(scores[0], scale));
                S::store(at.add(S::LANES), S::mul(scores[1], scale));
            }
        }
        for (p, state) in p.iter_mut().zip(states.chunks_exact_mut(2 + g.padded)) {
            softmax_step::<S>(p, count, state);
            let sums = state[2..].as_mut_ptr();
            let mut d = 0;
            while d < g.padded {
                // Four vectors at a time hide the latency of the additions.
                let n = ((g.padded - d) / S::LANES).min(4);
                let mut acc = [S::f32(0.0); 4];
                for (i, acc) in acc[..n].iter_mut().enumerate() {
                    *acc = S::load(sums.add(d + i * S::LANES));
                }
                for (j, &p) in p[..count].iter().enumerate() {
                    let row = values.as_ptr().add(j * g.padded + d);
                    let p = S::f32(p);
                    for (i, acc) in acc[..n].iter_mut().enumerate() {
                        *acc = S::fma(p, S::load(row.add(i * S::LANES)), *acc);
                    }
                }
                for (i, acc) in acc[..n].iter().enumerate() {
                    S::store(sums.add(d + i * S::LANES), *acc);
                }
                d += n * S::LANES;
            }
        }
    }
}

/// Turns a tile's scores into weights relative to the largest score so far, and brings the state
/// to that scale.
#[inline(always)]
unsafe fn softmax_step<S: Simd>(p: &mut [f32; TILE], count: usize, state: &mut [f32]) {
    p[count..].fill(f32::NEG_INFINITY);
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
        p[count..].fill(0.0);
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
