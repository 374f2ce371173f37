//! Attention of the rows of one sequence over its cache.
//!
//! Attention goes through positions in tiles of 32 with an online softmax (Milakov and Gimelshein
//! 2018; Rabe and Staats 2021): no matrix of scores is kept. A tile is a range of *positions*,
//! whatever slots hold them, and sums run in order of position; so a row's result does not depend
//! on whether its ancestors were committed yet, nor on its neighbours in the batch.

use std::ops::Range;

use super::cache::{Block, CHUNK, Element, Geometry, TILE};
use super::simd::{Simd, exp, max_lanes, sum_lanes};

/// One attention: shapes and pointers, shared by the threads that split its heads.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    /// Committed rows in the cache.
    pub line: usize,
    /// For each row, the slots from the line on that it sees, its own included.
    pub ancestors: &'a [u128],
    pub geometry: Geometry,
    /// Scores are multiplied with it.
    pub scale: f32,
    /// Scores become cap * tanh(score / cap), or stay as they are where it is 0.
    pub soft_cap: f32,
    /// For each query head a score that has no value; empty for none.
    pub sinks: &'a [f32],
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

/// How many positions a row sees, its own included.
fn seen(line: usize, ancestors: u128) -> usize {
    line + ancestors.count_ones() as usize
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
    layer: &[Block<E>],
    heads: std::ops::Range<usize>,
    scratch: &mut Scratch,
) {
    let g = a.geometry;
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
    layer: &[Block<E>],
    kv_head: usize,
    heads: std::ops::Range<usize>,
    scratch: &mut Scratch,
) {
    let Scratch { tile, state, paths, starts, sharing } = scratch;
    let state_len = 2 + g.padded;
    let rows = a.ancestors.len();
    state.clear();
    state.resize(rows * heads.len() * state_len, 0.0);
    for s in state.chunks_exact_mut(state_len) {
        s[0] = f32::NEG_INFINITY;
    }
    let rest = a.line % TILE;
    let base = a.line - rest;

    // SAFETY (all blocks): slots below `reserve`d are in the layer; the tile is as large as its
    // keys and values; queries and outputs have a head's elements at every row.

    starts.clear();
    starts.extend((0..rows).map(|row| seen(a.line, a.ancestors[row]).saturating_sub(a.window)));
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
    paths.extend_from_slice(a.ancestors);
    let (mut first, mut line) = (base, rest);
    while paths.iter().any(|path| *path != 0) {
        // SAFETY: as above.
        unsafe { tile.load_line::<S, E>(g, layer, kv_head, base, line) };
        sharing.clear();
        for (row, path) in paths.iter_mut().enumerate().filter(|(_, path)| **path != 0) {
            let mut count = line;
            while *path != 0 && count < TILE {
                let slot = a.line + path.trailing_zeros() as usize;
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
            let s = &mut state[(row * heads.len() + i) * state_len..][..state_len];
            if let Some(&sink) = a.sinks.get(head) {
                // SAFETY: as above.
                unsafe { add_sink::<S>(s, sink) };
            }
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
                tile_step::<S, 4>(a, &queries, tile);
            } else {
                tile_step::<S, 1>(a, &[queries[0]], tile);
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
        layer: &[Block<E>],
        head: usize,
        first: usize,
        count: usize,
    ) {
        self.line = count;
        self.path.clear();
        for at in (0..count).step_by(CHUNK) {
            let block = &layer[(first + at) / TILE];
            let chunk = &block[g.keys(first + at, head)..][..g.head_len()];
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
        layer: &[Block<E>],
        head: usize,
        slot: usize,
    ) {
        let at = self.line + self.path.len();
        self.path.push(slot);
        let (block, key) = (&layer[slot / TILE], g.key(slot, head, 0));
        for d in 0..g.head_dim {
            self.keys[d * TILE + at] = block[key + d * CHUNK].to_f32();
        }
        let v = &block[g.value(slot, head)..][..g.padded];
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
/// The pointers of the queries are valid for what they say, the tile's vectors are as long as the geometry
/// has them, and the CPU has `S`.
#[inline(always)]
unsafe fn tile_step<S: Simd, const N: usize>(a: &Attention<'_>, queries: &[Query; N], tile: &Tile) {
    let g = a.geometry;
    // SAFETY: keys are head_dim x TILE, values TILE x padded, each state 2 + padded.
    unsafe {
        let mut p = [[0f32; TILE]; N];
        let scale = S::f32(a.scale);
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
        if a.soft_cap != 0.0 {
            for i in (0..N * TILE).step_by(S::LANES) {
                let at = p.as_flattened_mut().as_mut_ptr().add(i);
                S::store(at, soft_cap::<S>(S::load(at), a.soft_cap));
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

/// Adds a score that has no value to a finished softmax.
#[inline(always)]
unsafe fn add_sink<S: Simd>(state: &mut [f32], sink: f32) {
    let now = state[0].max(sink);
    let mut factors = [0f32; 16];
    // SAFETY: the caller's; the state is 2 and then whole vectors.
    unsafe {
        S::store(factors.as_mut_ptr(), exp::<S>(S::f32(state[0] - now)));
        let before = factors[0];
        S::store(factors.as_mut_ptr(), exp::<S>(S::f32(sink - now)));
        state[1] = state[1] * before + factors[0];
        state[2..].iter_mut().for_each(|x| *x *= before);
    }
}

/// cap * tanh(x / cap).
#[inline(always)]
pub(super) unsafe fn soft_cap<S: Simd>(x: S::F, cap: f32) -> S::F {
    // SAFETY: the caller's; no memory is touched.
    unsafe {
        // tanh(y) = 1 - 2 / (exp(2y) + 1).
        let e = exp::<S>(S::mul(x, S::f32(2.0 / cap)));
        let small = S::div(S::f32(2.0 * cap), S::add(e, S::f32(1.0)));
        S::sub(S::f32(cap), small)
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
