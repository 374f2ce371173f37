// out = softmax(q K^T / sqrt(head_dim)) V over what a row sees: the line, then its path in the tree.
//
// A workgroup has one query head of one row and SPLIT positions; they are taken in tiles of 64 with an
// online softmax (Milakov and Gimelshein 2018). Tiles and splits are ranges of *positions* and sums run
// in order of position, so the result depends neither on slots nor on other rows. A row that sees more
// than one split leaves partial sums, which combine.wgsl merges.

struct Params {
    // Query heads that share a key/value head.
    group: u32,
    kv_heads: u32,
    head_dim: u32,
    q_stride: u32,
    // Committed rows: position p < line is in slot p.
    line: u32,
    // Where each row's count of tree rows and their places in the tree are.
    paths_at: u32,
    scale: f32,
    // The first row of this dispatch; splits of the row that sees most.
    first_row: u32,
    splits: u32,
    // The most positions that a row attends to: the last of those that it sees.
    window: u32,
}

@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read> values: array<u32>;
@group(0) @binding(3) var<storage, read_write> partial: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

const TILE = 64u;

var<workgroup> query: array<f32, MAX_HEAD>;
var<workgroup> scores: array<f32, TILE>;
var<workgroup> slots: array<u32, TILE>;

fn slot(path: u32, position: u32) -> u32 {
    if position < params.line {
        return position;
    }
    let i = position - params.line;
    return params.line + ((data[path + 1u + (i >> 2u)] >> ((i & 3u) << 3u)) & 255u);
}

// Elements 2i and 2i + 1 of the cache.
fn key_pair(i: u32) -> vec2<f32> {
    if CACHE_F16 {
        return unpack2x16float(keys[i]);
    }
    return vec2<f32>(bitcast<f32>(keys[2u * i]), bitcast<f32>(keys[2u * i + 1u]));
}

fn value_pair(i: u32) -> vec2<f32> {
    if CACHE_F16 {
        return unpack2x16float(values[i]);
    }
    return vec2<f32>(bitcast<f32>(values[2u * i]), bitcast<f32>(values[2u * i + 1u]));
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) place: vec3<u32>,
    @builtin(num_workgroups) places: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let head = place.x;
    let row = params.first_row + place.y;
    let path = params.paths_at + row * PATH_WORDS;
    let seen = params.line + data[path];
    let begin = place.z * SPLIT;
    let end = min(begin + SPLIT, seen);
    // The first position to attend to, and where its tile begins.
    let start = max(begin, seen - min(seen, params.window));
    let first = begin + (start - begin) / TILE * TILE;

    let pairs = params.head_dim / 2u;
    let row_pairs = params.kv_heads * pairs;
    let head_pair = head / params.group * pairs;
    for (var d = index; d < params.head_dim; d += TILE) {
        query[d] = q[row * params.q_stride + head * params.head_dim + d] * params.scale;
    }
    // Pairs index and index + 64 of the output.
    var low = vec2<f32>();
    var high = vec2<f32>();
    var most = -3.0e38;
    var total = 0.0;
    for (var tile = first; tile < end; tile += TILE) {
        let count = min(TILE, end - tile);
        let skip = max(start, tile) - tile;
        workgroupBarrier();
        if index >= skip && index < count {
            let place = slot(path, tile + index);
            let at = place * row_pairs + head_pair;
            var score = 0.0;
            for (var i = 0u; i < pairs; i++) {
                let pair = key_pair(at + i);
                score = fma(query[2u * i], pair.x, score);
                score = fma(query[2u * i + 1u], pair.y, score);
            }
            slots[index] = place;
            scores[index] = score;
        }
        workgroupBarrier();
        var larger = most;
        for (var i = skip; i < count; i++) {
            larger = max(larger, scores[i]);
        }
        workgroupBarrier();
        if index >= skip && index < count {
            scores[index] = exp(scores[index] - larger);
        }
        let fade = exp(most - larger);
        most = larger;
        total *= fade;
        low *= fade;
        high *= fade;
        workgroupBarrier();
        for (var i = skip; i < count; i++) {
            let weight = scores[i];
            let at = slots[i] * row_pairs + head_pair;
            total += weight;
            if index < pairs {
                low = fma(vec2<f32>(weight), value_pair(at + index), low);
            }
            if index + TILE < pairs {
                high = fma(vec2<f32>(weight), value_pair(at + index + TILE), high);
            }
        }
    }

    if start >= end {
        return;
    }
    if seen <= SPLIT {
        let to = row * params.q_stride + head * params.head_dim + 2u * index;
        if index < pairs {
            out[to] = low.x / total;
            out[to + 1u] = low.y / total;
        }
        if index + TILE < pairs {
            out[to + 2u * TILE] = high.x / total;
            out[to + 2u * TILE + 1u] = high.y / total;
        }
        return;
    }
    // Largest score, sum of exponentials, sums.
    let to = ((place.y * places.x + head) * params.splits + place.z) * (params.head_dim + 2u);
    if index == 0u {
        partial[to] = most;
        partial[to + 1u] = total;
    }
    if index < pairs {
        partial[to + 2u + 2u * index] = low.x;
        partial[to + 3u + 2u * index] = low.y;
    }
    if index + TILE < pairs {
        partial[to + 2u + 2u * (index + TILE)] = high.x;
        partial[to + 3u + 2u * (index + TILE)] = high.y;
    }
}
