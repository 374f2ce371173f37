// Rows of x times the weights of a norm, as bytes, and the sums of x's squares: products that follow apply
// what else is of the norm (factors/int8.wgsl).

struct Params {
    // vec4s of a row.
    stride: u32,
    out_squares: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> norm: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) place: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let i = place.x * 64u + index;
    let inside = i < params.stride;
    var values = vec4<f32>();
    if inside {
        values = x[place.y * params.stride + i];
    }
    square_block(place.y, params.stride, i, inside, values, index);
    if inside {
        values *= norm[i];
    }
    round_block(place.y, params.stride, i, inside, values, index);
}
