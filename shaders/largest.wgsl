// The k largest of each row with their places, largest first (of equal ones the first), and the sum of
// exp((x - largest) / temperature): what a decoder wants of logits, without reading them all back.

struct Params {
    cols: u32,
    stride: u32,
    k: u32,
    inverse_temperature: f32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

const THREADS = 128u;
const NONE = 0xFFFFFFFFu;

var<workgroup> values: array<f32, THREADS>;
var<workgroup> places: array<u32, THREADS>;

// Whether (a, i) comes before (b, j).
fn before(a: f32, i: u32, b: f32, j: u32) -> bool {
    return i != NONE && (j == NONE || a > b || (a == b && i < j));
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) row: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let base = row.x * params.stride;
    let to = row.x * (1u + 2u * params.k);
    var most = 0.0;
    var last = 0.0;
    var last_place = NONE;
    for (var rank = 0u; rank < params.k; rank++) {
        // The first of those that come after the last one found.
        var best = 0.0;
        var place = NONE;
        for (var i = index; i < params.cols; i += THREADS) {
            let v = x[base + i];
            let is_left = last_place == NONE || before(last, last_place, v, i);
            if is_left && before(v, i, best, place) {
                best = v;
                place = i;
            }
        }
        values[index] = best;
        places[index] = place;
        workgroupBarrier();
        for (var t = 0u; t < THREADS; t++) {
            if before(values[t], places[t], best, place) {
                best = values[t];
                place = places[t];
            }
        }
        workgroupBarrier();
        last = best;
        last_place = place;
        if rank == 0u {
            most = best;
        }
        if index == 0u {
            out[to + 1u + 2u * rank] = place;
            out[to + 2u + 2u * rank] = bitcast<u32>(best);
        }
    }
    var sum = 0.0;
    for (var i = index; i < params.cols; i += THREADS) {
        sum += exp((x[base + i] - most) * params.inverse_temperature);
    }
    values[index] = sum;
    workgroupBarrier();
    if index == 0u {
        for (var t = 1u; t < THREADS; t++) {
            sum += values[t];
        }
        out[to] = bitcast<u32>(sum);
    }
}
