// gate = silu(gate) * up, element by element.

struct Params {
    // vec4s of a row.
    stride: u32,
}

@group(0) @binding(0) var<storage, read_write> gate: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> up: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) place: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let i = place.x * 64u + index;
    let at = place.y * params.stride + i;
    var values = vec4<f32>();
    if i < params.stride {
        values = swiglu(gate[at], up[at]);
        gate[at] = values;
    }
    round_block(place.y, params.stride, i, i < params.stride, values, index);
}
