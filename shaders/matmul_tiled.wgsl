// A product for many rows of x: a workgroup has 32 rows of W and BATCH_ROWS rows of x, reads each block of
// W once and unpacks it into memory that it shares, as it does x.
//
// Its 256 threads are 8 lanes of 32: each lane has sums for all elements of the tile, of the chunks
// that are that lane's (see matmul.wgsl), ROWS x EACH to a thread; at the end of a range lanes are
// added. A chunk is shared in pieces of PIECE groups, while the next one is on its way.

const TILE_ROWS = 32u;
// Places of a group are further apart than there are rows, so that lanes that write at once write to
// different banks.
const W_STEP = TILE_ROWS + 1u;
const X_STEP = BATCH_ROWS + 1u;

var<workgroup> memory: array<vec4<u32>, MEMORY>;
// Sums over ranges: those of the threads of lane 0, four rows of each.
var<workgroup> totals: array<vec4<f32>, EACH * TILE_ROWS>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) tile: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    // (Neighbouring workgroups have the same weights.)
    let first_row = tile.y * TILE_ROWS;
    let first_batch_row = tile.x * BATCH_ROWS;
    // What it fetches: a row of the tile, and one of 8 chunks that lie side by side.
    let fetched = index / LANES;
    let fetched_lane = index % LANES;
    let base = w_row(first_row + fetched);
    let x_base = x_at(first_batch_row + fetched);
    // What it multiplies: rows `row + 8 r` and batch rows `batch_row + 4 n` of the tile.
    let lane = index / TILE_ROWS;
    let row = index % 8u;
    let batch_row = index % TILE_ROWS / 8u;

    if lane == 0u {
        for (var n = 0u; n < EACH; n++) {
            totals[n * TILE_ROWS + index] = vec4<f32>();
        }
    }
    // (Where a range ends, the next begins.)
    var chunk = load(base, min(fetched_lane, params.chunks - 1u));
    var mine = load_x(x_base, min(fetched_lane, params.chunks - 1u));
    for (var range = 0u; range < RANGES; range++) {
        var sums: Sums;
        let end = range_end(range);
        for (var first = range_begin(range); first < end; first += LANES) {
            let c = min(first + fetched_lane, params.chunks - 1u);
            let next_c = min(c + LANES, params.chunks - 1u);
            let next = load(base, next_c);
            let next_mine = load_x(x_base, next_c);
            // (Each piece has its number as a constant: then the chunk stays in registers.)
            for (var i = 0u; i < 8u; i += PIECE) {
                workgroupBarrier();
                share_weights(chunk, i, fetched_lane, fetched);
                if fetched < BATCH_ROWS {
                    share_x(mine, x_base, c, i, fetched_lane, fetched);
                }
                workgroupBarrier();
                // (A lane may have no chunk any more.)
                if first + lane < end {
                    sums = multiply(sums, i, lane, row, batch_row);
                }
            }
            if first + lane < end {
                sums = end_of_chunk(sums);
            }
            chunk = next;
            mine = next_mine;
        }

        for (var distance = LANES / 2u; distance > 0u; distance >>= 1u) {
            workgroupBarrier();
            if lane >= distance && lane < 2u * distance {
                for (var n = 0u; n < EACH; n++) {
                    let four = vec4<f32>(sums.total[0][n], sums.total[1][n],
                                         sums.total[2][n], sums.total[3][n]);
                    let at = ((lane - distance) * EACH + n) * TILE_ROWS + index % TILE_ROWS;
                    memory[at] = bitcast<vec4<u32>>(four);
                }
            }
            workgroupBarrier();
            if lane < distance {
                for (var n = 0u; n < EACH; n++) {
                    let at = (lane * EACH + n) * TILE_ROWS + index % TILE_ROWS;
                    let other = bitcast<vec4<f32>>(memory[at]);
                    for (var r = 0u; r < ROWS; r++) {
                        sums.total[r][n] += other[r];
                    }
                }
            }
        }
        if lane == 0u {
            for (var n = 0u; n < EACH; n++) {
                totals[n * TILE_ROWS + index] += vec4<f32>(sums.total[0][n], sums.total[1][n],
                                                           sums.total[2][n], sums.total[3][n]);
            }
        }
    }
    prepare(first_batch_row, index);
    workgroupBarrier();
    if lane == 0u {
        for (var n = 0u; n < EACH; n++) {
            let four = totals[n * TILE_ROWS + index];
            for (var r = 0u; r < ROWS; r++) {
                let to = first_row + row + 8u * r;
                store(to, first_batch_row + batch_row + 4u * n, finished(four[r], batch_row + 4u * n, bias_of(to)));
            }
        }
    }
}
