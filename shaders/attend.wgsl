// out = softmax(scale q K^T) V over what a row sees: the line, then its path in the tree. A dispatch has rows of
// one sequence.
//
// A workgroup has one query head of QUERIES rows and SPLIT positions, a thread to each. Where these are
// several rows, each sees what the one before it does and more, so that keys and values are read once for
// all of them. Scores are dot products of eight threads at a time, which read a key side by side; values
// are added up by groups of threads, of which group g of G has the positions g, g + G and so on. Splits
// are ranges of *positions*, and what is added in which order depends on positions alone, so the result
// depends neither on slots nor on other rows. A row that sees more than one split leaves partial sums,
// which attend_reduce.wgsl merges.

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
    // The rows of this dispatch; splits of the row that sees most.
    first_row: u32,
    end_row: u32,
    splits: u32,
    // The most positions that a row attends to: the last of those that it sees.
    window: u32,
    // If not zero: scores become cap * tanh(score / cap).
    soft_cap: f32,
    // Where the heads' sinks are (sink.wgsl), or NO_SINKS.
    sinks_at: u32,
}

@group(0) @binding(0) var<storage, read> q: array<f32>;
// Rows of the cache as they are read: PAIRS pairs of elements at a time (cached/).
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

// Of each row: its query, and a score, then a weight, for each position.
const QUERY = MAX_HEAD / 2u;
var<workgroup> query: array<vec2<f32>, QUERIES * QUERY>;
var<workgroup> scores: array<f32, QUERIES * SPLIT>;
var<workgroup> largest: array<f32, 16u * QUERIES>;
var<workgroup> slots: array<u32, SPLIT>;
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

// (The argument is bounded: tanh of large numbers is not a number on some devices.)
fn capped(score: f32) -> f32 {
    if params.soft_cap == 0.0 {
        return score;
    }
    return params.soft_cap * tanh(clamp(score / params.soft_cap, -16.0, 16.0));
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) place: vec3<u32>,
    @builtin(num_workgroups) places: vec3<u32>,
    thread: Thread,
) {
    let index = thread_index(thread);
    let head = place.x;
    let first_row = params.first_row + place.y * QUERIES;
    let begin = place.z * SPLIT;
    // Of each row: how many positions it sees, and which of this split, from its first to its end.
    var seen: array<u32, QUERIES>;
    var start: array<u32, QUERIES>;
    var end: array<u32, QUERIES>;
    // Those of any row, and the path of the row that sees most.
    var from_any = begin + SPLIT;
    var end_any = begin;
    var deepest = 0u;
    for (var r = 0u; r < QUERIES; r++) {
        let row = min(first_row + r, params.end_row - 1u);
        let path = params.paths_at + row * PATH_WORDS;
        seen[r] = params.line + data[path];
        start[r] = max(begin, seen[r] - min(seen[r], params.window));
        end[r] = min(begin + SPLIT, seen[r]);
        if start[r] < end[r] {
            from_any = min(from_any, start[r]);
            end_any = max(end_any, end[r]);
        }
        deepest = path;
    }
    if from_any >= end_any {
        return;
    }

    let pairs = params.head_dim / 2u;
    // Reads of a head, and of a row.
    let reads = pairs / PAIRS;
    let row_reads = params.kv_heads * reads;
    let head_read = head / params.group * reads;
    for (var r = 0u; r < QUERIES; r++) {
        let row = min(first_row + r, params.end_row - 1u);
        if index < QUERY {
            var pair = vec2<f32>();
            if index < pairs {
                let at = row * params.q_stride + head * params.head_dim + 2u * index;
                pair = vec2<f32>(q[at], q[at + 1u]) * params.scale;
            }
            query[r * QUERY + index] = pair;
        }
        scores[r * SPLIT + index] = LEAST;
    }
    // (Threads without a position of their own name one that is seen: it is read, and has no weight.)
    slots[index] = slot(deepest, clamp(begin + index, from_any, end_any - 1u));
    workgroupBarrier();

    // Several scores, and several reads of each, at a time, so that these need not wait for one another.
    let lane = index % LANES;
    for (var first = 0u; first < end_any - begin; first += SCORES * AT_ONCE) {
        var sums: array<array<f32, QUERIES>, SCORES>;
        var slot_at: array<u32, SCORES>;
        for (var k = 0u; k < SCORES; k++) {
            slot_at[k] = slots[first + k * AT_ONCE + index / LANES] * row_reads + head_read;
        }
        for (var part = lane; part < reads; part += KEY_READS * LANES) {
            var read: array<array<Cached, SCORES>, KEY_READS>;
            for (var e = 0u; e < KEY_READS; e++) {
                for (var k = 0u; k < SCORES; k++) {
                    // (Beyond the head the query is zero.)
                    read[e][k] = keys[slot_at[k] + min(part + e * LANES, reads - 1u)];
                }
            }
            for (var e = 0u; e < KEY_READS; e++) {
                for (var p = 0u; p < PAIRS; p++) {
                    for (var r = 0u; r < QUERIES; r++) {
                        let wanted = query[r * QUERY + (part + e * LANES) * PAIRS + p];
                        for (var k = 0u; k < SCORES; k++) {
                            let key = pair_of(read[e][k], p);
                            sums[k][r] = fma(wanted.y, key.y, fma(wanted.x, key.x, sums[k][r]));
                        }
                    }
                }
            }
        }
        for (var k = 0u; k < SCORES; k++) {
            let i = first + k * AT_ONCE + index / LANES;
            for (var r = 0u; r < QUERIES; r++) {
                let score = sum8(sums[k][r], index);
                if lane == 0u && begin + i >= start[r] && begin + i < end[r] {
                    scores[r * SPLIT + i] = capped(score);
                }
            }
        }
    }
    workgroupBarrier();
    if index < 16u * QUERIES {
        var of_some = LEAST;
        for (var i = 0u; i < SPLIT / 16u; i++) {
            of_some = max(of_some, scores[index * (SPLIT / 16u) + i]);
        }
        largest[index] = of_some;
    }
    workgroupBarrier();
    var most: array<f32, QUERIES>;
    for (var r = 0u; r < QUERIES; r++) {
        most[r] = LEAST;
        for (var i = 0u; i < 16u; i++) {
            most[r] = max(most[r], largest[16u * r + i]);
        }
        scores[r * SPLIT + index] = exp(scores[r * SPLIT + index] - most[r]);
    }
    workgroupBarrier();

    // Group g has the positions g, g + groups, ...; a thread of it has what it reads at once, and reads that of
    // several positions at a time.
    let groups = SPLIT / reads;
    let group = index / reads;
    let part = index % reads;
    var sums: array<array<vec2<f32>, PAIRS>, QUERIES>;
    var weight: array<f32, QUERIES>;
    if group < groups {
        for (var i = group; i < end_any - begin; i += VALUES * groups) {
            var read: array<Cached, VALUES>;
            for (var k = 0u; k < VALUES; k++) {
                read[k] = values[slots[min(i + k * groups, SPLIT - 1u)] * row_reads + head_read + part];
            }
            for (var k = 0u; k < VALUES; k++) {
                let at = min(i + k * groups, SPLIT - 1u);
                for (var r = 0u; r < QUERIES; r++) {
                    let mine = select(0.0, scores[r * SPLIT + at], i + k * groups < SPLIT);
                    weight[r] += mine;
                    for (var p = 0u; p < PAIRS; p++) {
                        sums[r][p] = fma(vec2<f32>(mine), pair_of(read[k], p), sums[r][p]);
                    }
                }
            }
        }
    }
    for (var r = 0u; r < QUERIES; r++) {
        // (Of the row before, everything has been read.)
        workgroupBarrier();
        if group < groups {
            group_weights[group] = weight[r];
        }
        for (var p = 0u; p < PAIRS; p++) {
            group_sums[index * PAIRS + p] = sums[r][p];
        }
        workgroupBarrier();
        var sum = vec3<f32>();
        if index < pairs {
            for (var g = 0u; g < groups; g++) {
                sum += vec3<f32>(group_sums[g * pairs + index], group_weights[g]);
            }
        }
        let row = first_row + r;
        let is_here = row < params.end_row && start[r] < end[r];
        if seen[r] > SPLIT {
            // Largest score, sum of exponentials, sums.
            let list = (place.y * QUERIES + r) * places.x + head;
            let at = (list * params.splits + place.z) * (params.head_dim + 2u);
            if is_here && index == 0u {
                partial[at] = most[r];
                partial[at + 1u] = sum.z;
            }
            if is_here && index < pairs {
                partial[at + 2u + 2u * index] = sum.x;
                partial[at + 3u + 2u * index] = sum.y;
            }
        } else {
            // The sums of all become those of two pairs to a thread.
            workgroupBarrier();
            if index < pairs {
                group_sums[index] = sum.xy / with_sink(sum.z, most[r], head);
            }
            workgroupBarrier();
            let first = head * params.head_dim + 4u * index;
            var four = vec4<f32>();
            for (var p = 0u; p < 2u; p++) {
                let mine = 2u * index + p;
                if is_here && mine < pairs {
                    let two = group_sums[mine];
                    four[2u * p] = two.x;
                    four[2u * p + 1u] = two.y;
                    out[row * params.q_stride + first + 2u * p] = two.x;
                    out[row * params.q_stride + first + 2u * p + 1u] = two.y;
                }
            }
            round_block(row, params.q_stride / 4u, first / 4u, is_here && 2u * index < pairs, four, index);
        }
    }
}
