// Rotates queries in place, and stores rotated keys, and values, in the rows' slots of the cache.
// A thread has a pair of a query, or two neighbours of a key or a value. A dispatch has rows of one sequence.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // Rotated pairs of a head.
    pairs: u32,
    // f32s of a row of q, and of k and v.
    q_stride: u32,
    kv_stride: u32,
    // The first row of this dispatch, and its slot of the cache.
    first_row: u32,
    first_slot: u32,
    // Where the rows' (cosine, sine) are.
    rotations_at: u32,
    // Whether pairs are (i, i + pairs), not (2i, 2i + 1).
    halves: u32,
}

@group(0) @binding(0) var<storage, read_write> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read_write> keys: array<u32>;
@group(0) @binding(4) var<storage, read_write> values: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

// The elements of a pair, from the start of its head.
fn elements(pair: u32) -> vec2<u32> {
    if params.halves != 0u {
        return vec2<u32>(pair, pair + params.pairs);
    }
    return vec2<u32>(2u * pair, 2u * pair + 1u);
}

// Element e of a row's keys, rotated.
fn key(row: u32, e: u32) -> f32 {
    let d = e % params.head_dim;
    let head = row * params.kv_stride + e - d;
    if d >= 2u * params.pairs {
        return k[head + d];
    }
    let pair = select(d / 2u, d % params.pairs, params.halves != 0u);
    let at = elements(pair);
    let rotated = rotate(vec2<f32>(k[head + at.x], k[head + at.y]), rotation(row, pair));
    return select(rotated.y, rotated.x, d == at.x);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = params.first_row + id.y;
    let queries = params.heads * params.pairs;
    let words = params.kv_heads * params.head_dim / 2u;
    if id.x < queries {
        let pair = id.x % params.pairs;
        let head = row * params.q_stride + id.x / params.pairs * params.head_dim;
        let at = elements(pair);
        let rotated = rotate(vec2<f32>(q[head + at.x], q[head + at.y]), rotation(row, pair));
        q[head + at.x] = rotated.x;
        q[head + at.y] = rotated.y;
        return;
    }
    let to = (params.first_slot + id.y) * words;
    if id.x < queries + words {
        let i = id.x - queries;
        let pair = vec2<f32>(key(row, 2u * i), key(row, 2u * i + 1u));
        if CACHE_F16 {
            keys[to + i] = pack2x16float(pair);
        } else {
            keys[2u * (to + i)] = bitcast<u32>(pair.x);
            keys[2u * (to + i) + 1u] = bitcast<u32>(pair.y);
        }
    } else if id.x < queries + 2u * words {
        let i = id.x - queries - words;
        let at = row * params.kv_stride + 2u * i;
        if CACHE_F16 {
            values[to + i] = pack2x16float(vec2<f32>(v[at], v[at + 1u]));
        } else {
            values[2u * (to + i)] = bitcast<u32>(v[at]);
            values[2u * (to + i) + 1u] = bitcast<u32>(v[at + 1u]);
        }
    }
}
