// Copies cache rows from slot to slot, in order: a thread moves one word of every row, so what is
// copied later sees what was copied before.

struct Params {
    // Words of a row.
    words: u32,
    // Moves, and where their (from, to) are.
    count: u32,
    moves_at: u32,
}

@group(0) @binding(0) var<storage, read_write> keys: array<u32>;
@group(0) @binding(1) var<storage, read_write> values: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.words {
        return;
    }
    for (var i = 0u; i < params.count; i++) {
        let source = data[params.moves_at + 2u * i] * params.words + id.x;
        let place = data[params.moves_at + 2u * i + 1u] * params.words + id.x;
        keys[place] = keys[source];
        values[place] = values[source];
    }
}
