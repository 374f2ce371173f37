// x = result of x and y, element by element: four to a thread. What the result is says a file of functions/.

struct Params {
    // vec4s of a row.
    stride: u32,
    // Numbers of the function.
    alpha: f32,
    limit: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) place: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let i = place.x * 64u + index;
    let at = place.y * params.stride + i;
    var values = vec4<f32>();
    if i < params.stride {
        values = result(at);
        x[at] = values;
    }
    round_block(place.y, params.stride, i, i < params.stride, values, index);
}
