// out = softmax(q K^T / sqrt(head_dim)) V over what a row sees: the line, then its path in the tree.
//
// A workgroup has one query head of one row and SPLIT positions, a thread to each. Scores are dot
// products of eight threads at a time, which read a key side by side; values are added up by groups of
// threads, of which group g of G has the positions g, g + G and so on. Splits are ranges of
// *positions*, and what is added in which order depends on positions alone, so the result depends
// neither on slots nor on other rows. A row that sees more than one split leaves partial sums, which
// combine.wgsl merges.

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
// Rows of the cache as they are read: PAIRS pairs of elements at a time (cache/).
@group(0) @binding(1) var<storage, read> keys: array<Cached>;
@group(0) @binding(2) var<storage, read> values: array<Cached>;
@group(0) @binding(3) var<storage, read_write> partial: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

// Threads that share a score, and scores that are made at once.
const LANES = 8u;
const AT_ONCE = SPLIT / LANES;
// Less than any score.
const LEAST = -3.0e38;

var<workgroup> query: array<vec2<f32>, MAX_HEAD / 2u>;
var<workgroup> scores: array<f32, SPLIT>;
var<workgroup> slots: array<u32, SPLIT>;
var<workgroup> largest: array<f32, 16>;
// Of each group of threads that adds up values: sums of all pairs of the head, and of the weights.
var<workgroup> group_sums: array<vec2<f32>, SPLIT * PAIRS>;
var<workgroup> group_weights: array<f32, SPLIT>;

fn slot(path: u32, position: u32) -> u32 {
    if position < params.line {
        return position;
    }
    let i = position - params.line;
    return params.line + ((data[path + 1u + (i >> 2u)] >> ((i & 3u) << 3u)) & 255u);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) place: vec3<u32>,
    @builtin(num_workgroups) places: vec3<u32>,
    thread: Thread,
) {
    let index = thread_index(thread);
    let head = place.x;
    let row = params.first_row + place.y;
    let path = params.paths_at + row * PATH_WORDS;
    let seen = params.line + data[path];
    let begin = place.z * SPLIT;
    let end = min(begin + SPLIT, seen);
    // The first position to attend to.
    let start = max(begin, seen - min(seen, params.window));
    if start >= end {
        return;
    }

    let pairs = params.head_dim / 2u;
    // Reads of a head, and of a row.
    let reads = pairs / PAIRS;
    let row_reads = params.kv_heads * reads;
    let head_read = head / params.group * reads;
    if index < MAX_HEAD / 2u {
        var pair = vec2<f32>();
        if index < pairs {
            let at = row * params.q_stride + head * params.head_dim + 2u * index;
            pair = vec2<f32>(q[at], q[at + 1u]) * params.scale;
        }
        query[index] = pair;
    }
    scores[index] = LEAST;
    // (Threads without a position of their own name one that is seen: it is read, and has no weight.)
    slots[index] = slot(path, clamp(begin + index, start, end - 1u));
    workgroupBarrier();

    // Several scores, and several reads of each, at a time, so that these need not wait for one another.
    let lane = index % LANES;
    for (var first = 0u; first < end - begin; first += SCORES * AT_ONCE) {
        var sums: array<f32, SCORES>;
        var places: array<u32, SCORES>;
        for (var k = 0u; k < SCORES; k++) {
            places[k] = slots[first + k * AT_ONCE + index / LANES] * row_reads + head_read;
        }
        for (var part = lane; part < reads; part += KEY_READS * LANES) {
            var read: array<array<Cached, SCORES>, KEY_READS>;
            for (var e = 0u; e < KEY_READS; e++) {
                for (var k = 0u; k < SCORES; k++) {
                    // (Beyond the head the query is zero.)
                    read[e][k] = keys[places[k] + min(part + e * LANES, reads - 1u)];
                }
            }
            for (var e = 0u; e < KEY_READS; e++) {
                for (var p = 0u; p < PAIRS; p++) {
                    let wanted = query[(part + e * LANES) * PAIRS + p];
                    for (var k = 0u; k < SCORES; k++) {
                        let key = pair_of(read[e][k], p);
                        sums[k] = fma(wanted.y, key.y, fma(wanted.x, key.x, sums[k]));
                    }
                }
            }
        }
        for (var k = 0u; k < SCORES; k++) {
            let score = sum8(sums[k], index);
            let i = first + k * AT_ONCE + index / LANES;
            if lane == 0u && begin + i >= start && begin + i < end {
                scores[i] = score;
            }
        }
    }
    workgroupBarrier();
    if index < 16u {
        var of_some = LEAST;
        for (var i = 0u; i < SPLIT / 16u; i++) {
            of_some = max(of_some, scores[index * (SPLIT / 16u) + i]);
        }
        largest[index] = of_some;
    }
    workgroupBarrier();
    var most = LEAST;
    for (var i = 0u; i < 16u; i++) {
        most = max(most, largest[i]);
    }
    scores[index] = exp(scores[index] - most);
    workgroupBarrier();

    // Group g has the positions g, g + groups, ...; a thread of it has what it reads at once, and reads that of
    // several positions at a time.
    let groups = SPLIT / reads;
    let group = index / reads;
    let part = index % reads;
    var sums: array<vec2<f32>, PAIRS>;
    var weight = 0.0;
    if group < groups {
        for (var i = group; i < end - begin; i += VALUES * groups) {
            var read: array<Cached, VALUES>;
            var weights: array<f32, VALUES>;
            for (var k = 0u; k < VALUES; k++) {
                let at = min(i + k * groups, SPLIT - 1u);
                read[k] = values[slots[at] * row_reads + head_read + part];
                weights[k] = select(0.0, scores[at], i + k * groups < SPLIT);
            }
            for (var k = 0u; k < VALUES; k++) {
                weight += weights[k];
                for (var p = 0u; p < PAIRS; p++) {
                    sums[p] = fma(vec2<f32>(weights[k]), pair_of(read[k], p), sums[p]);
                }
            }
        }
        group_weights[group] = weight;
    }
    for (var p = 0u; p < PAIRS; p++) {
        group_sums[index * PAIRS + p] = sums[p];
    }
    workgroupBarrier();
    var sum = vec3<f32>();
    if index < pairs {
        for (var g = 0u; g < groups; g++) {
            sum += vec3<f32>(group_sums[g * pairs + index], group_weights[g]);
        }
    }
    if seen <= SPLIT {
        // The sums of all become those of two pairs to a thread.
        workgroupBarrier();
        if index < pairs {
            group_sums[index] = sum.xy / sum.z;
        }
        workgroupBarrier();
        let first = head * params.head_dim + 4u * index;
        var four = vec4<f32>();
        for (var p = 0u; p < 2u; p++) {
            let mine = 2u * index + p;
            if mine < pairs {
                let two = group_sums[mine];
                four[2u * p] = two.x;
                four[2u * p + 1u] = two.y;
                out[row * params.q_stride + first + 2u * p] = two.x;
                out[row * params.q_stride + first + 2u * p + 1u] = two.y;
            }
        }
        round_block(row, params.q_stride / 4u, first / 4u, 2u * index < pairs, four, index);
        return;
    }
    if index >= pairs {
        return;
    }
    // Largest score, sum of exponentials, sums.
    let to = ((place.y * places.x + head) * params.splits + place.z) * (params.head_dim + 2u);
    if index == 0u {
        partial[to] = most;
        partial[to + 1u] = sum.z;
    }
    partial[to + 2u + 2u * index] = sum.x;
    partial[to + 3u + 2u * index] = sum.y;
}
