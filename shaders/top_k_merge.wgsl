// The k largest of each row, and its sum of exp((x - largest) / temperature), of the lists that
// top_k.wgsl made of its slices.

struct Params {
    slices: u32,
    k: u32,
    inverse_temperature: f32,
}

@group(0) @binding(0) var<storage, read> lists: array<u32>;
// Of each row: the sum, then k times place and number.
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) row: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let step = 2u + 2u * params.k;
    let base = row.x * params.slices * step;
    let entries = params.slices * params.k;
    if index < params.k {
        places[index] = NONE;
    }
    // The largest so far are the first k; as many entries as there is room for come behind them.
    for (var first = 0u; first < entries; first += SORTED - params.k) {
        for (var i = params.k + index; i < SORTED; i += THREADS) {
            let entry = first + i - params.k;
            places[i] = NONE;
            if entry < entries {
                let at = base + entry / params.k * step + 2u + 2u * (entry % params.k);
                places[i] = lists[at];
                numbers[i] = bitcast<f32>(lists[at + 1u]);
            }
        }
        sort(index);
    }
    let most = numbers[0];
    var mine = 0.0;
    for (var s = index; s < params.slices; s += THREADS) {
        let of_slice = vec2<f32>(bitcast<f32>(lists[base + s * step]), bitcast<f32>(lists[base + s * step + 1u]));
        mine += of_slice.y * exp((of_slice.x - most) * params.inverse_temperature);
    }
    let sum = total(index, mine);
    let to = row.x * (1u + 2u * params.k);
    if index == 0u {
        out[to] = bitcast<u32>(sum);
    }
    if index < params.k {
        out[to + 1u + 2u * index] = places[index];
        out[to + 2u + 2u * index] = bitcast<u32>(numbers[index]);
    }
}
