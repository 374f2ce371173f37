// Merges the partial sums of attend.wgsl, in order of position, for rows that see more than one split.

struct Params {
    head_dim: u32,
    q_stride: u32,
    line: u32,
    paths_at: u32,
    first_row: u32,
    splits: u32,
    window: u32,
    sinks_at: u32,
}

@group(0) @binding(0) var<storage, read> partial: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) place: vec3<u32>,
    @builtin(num_workgroups) places: vec3<u32>,
    thread: Thread,
) {
    let index = thread_index(thread);
    let row = params.first_row + place.y;
    let seen = params.line + data[params.paths_at + row * PATH_WORDS];
    if seen <= SPLIT {
        return;
    }
    let splits = (seen + SPLIT - 1u) / SPLIT;
    // Splits that lie before the window were left out.
    let first = (seen - min(seen, params.window)) / SPLIT;
    let step = params.head_dim + 2u;
    let base = (place.y * places.x + place.x) * params.splits * step;
    var most = partial[base + first * step];
    for (var s = first + 1u; s < splits; s++) {
        most = max(most, partial[base + s * step]);
    }
    // Four elements to a thread: heads have 256 at most.
    let d = 4u * index;
    var total = 0.0;
    var sums = vec4<f32>();
    if d < params.head_dim {
        for (var s = first; s < splits; s++) {
            let at = base + s * step;
            let weight = exp(partial[at] - most);
            total = fma(weight, partial[at + 1u], total);
            for (var k = 0u; k < 4u; k++) {
                // (What is behind a short head is not used.)
                sums[k] = fma(weight, partial[at + 2u + min(d + k, params.head_dim - 1u)], sums[k]);
            }
        }
    }
    let values = sums / with_sink(total, most, place.x);
    let to = place.x * params.head_dim + d;
    for (var k = 0u; k < 4u; k++) {
        if d + k < params.head_dim {
            out[row * params.q_stride + to + k] = values[k];
        }
    }
    round_block(row, params.q_stride / 4u, to / 4u, d < params.head_dim, values, index);
}
