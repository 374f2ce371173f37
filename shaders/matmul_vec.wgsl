// A product with BATCH_ROWS rows of x at a time, so that a block of weights is read and unpacked once for
// all of them. GROUPS groups of threads have ROWS rows of W each: eight lanes in each range. Weights go
// to registers from where they lie. What becomes of the sums is said by a file of epilogues/.

const THREADS = LANES * RANGES * GROUPS;
const GROUP_ROWS = GROUPS * ROWS;
const OUTPUTS = GROUP_ROWS * BATCH_ROWS;

struct Sums {
    total: array<array<f32, BATCH_ROWS>, ROWS>,
}

// Sums over lanes: of each range, of each batch_row, those of all rows.
var<workgroup> partial: array<f32, RANGES * OUTPUTS>;

// The element of row v of a workgroup and batch_row n.
fn element(tile: u32, v: u32, n: u32) -> f32 {
    var sum = 0.0;
    for (var t = 0u; t < RANGES; t++) {
        sum += partial[t * OUTPUTS + n * GROUP_ROWS + v];
    }
    return finished(sum, n, bias_of(source_row(tile, v)));
}

// Those of four rows.
fn four(tile: u32, v: u32, n: u32) -> vec4<f32> {
    return vec4<f32>(element(tile, v, n), element(tile, v + 1u, n), element(tile, v + 2u, n),
                     element(tile, v + 3u, n));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) tile: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let lane = index % LANES;
    let range = index / LANES % RANGES;
    let group = index / (LANES * RANGES);
    let first_batch_row = tile.y * BATCH_ROWS;

    var bases: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        bases[r] = w_row(source_row(tile.x, group * ROWS + r));
    }
    var sums: Sums;
    let end = range_end(range);
    for (var c = range_begin(range) + lane; c < end; c += AHEAD * LANES) {
        // (All are on their way before the first is waited for; one behind the end is read again.)
        var chunks: array<array<Chunk, ROWS>, AHEAD>;
        for (var a = 0u; a < AHEAD; a++) {
            for (var r = 0u; r < ROWS; r++) {
                chunks[a][r] = load(bases[r], min(c + a * LANES, params.chunks - 1u));
            }
        }
        for (var a = 0u; a < AHEAD; a++) {
            if c + a * LANES < end {
                sums = accumulate(sums, chunks[a], c + a * LANES, first_batch_row);
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        for (var n = 0u; n < BATCH_ROWS; n++) {
            let sum = sum8(sums.total[r][n], index);
            if lane == 0u {
                partial[range * OUTPUTS + n * GROUP_ROWS + group * ROWS + r] = sum;
            }
        }
    }
    prepare(first_batch_row, index);
    workgroupBarrier();
    end_of_product(tile.x, first_batch_row, index);
}
