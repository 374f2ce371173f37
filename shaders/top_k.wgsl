// Of each slice of a row the k largest with their places, largest first (of equal ones the first), and the
// sum of exp((x - largest) / temperature): what a decoder wants of logits, without reading them all
// back. A workgroup has a slice of SORTED numbers; top_k_merge.wgsl makes one list of those of a row.

struct Params {
    cols: u32,
    stride: u32,
    k: u32,
    inverse_temperature: f32,
    // The first row of x.
    first_row: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
// Of each slice: the largest, the sum, then k times place and number.
@group(0) @binding(1) var<storage, read_write> lists: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) place: vec3<u32>,
    @builtin(num_workgroups) slices: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    for (var i = index; i < SORTED; i += THREADS) {
        let at = place.x * SORTED + i;
        let inside = at < params.cols;
        numbers[i] = x[(params.first_row + place.y) * params.stride + min(at, params.cols - 1u)];
        places[i] = select(NONE, at, inside);
    }
    sort(index);
    let most = numbers[0];
    var mine = 0.0;
    for (var i = index; i < SORTED; i += THREADS) {
        if places[i] != NONE {
            mine += exp((numbers[i] - most) * params.inverse_temperature);
        }
    }
    let sum = total(index, mine);
    let to = (place.y * slices.x + place.x) * (2u + 2u * params.k);
    if index == 0u {
        lists[to] = bitcast<u32>(most);
        lists[to + 1u] = bitcast<u32>(sum);
    }
    if index < params.k {
        lists[to + 2u + 2u * index] = places[index];
        lists[to + 3u + 2u * index] = bitcast<u32>(numbers[index]);
    }
}
