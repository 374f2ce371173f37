// Reads a buffer once: what memory can do at most.

struct Params {
    // vec4s of the buffer.
    count: u32,
    threads: u32,
}

@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var bits = vec4<u32>();
    for (var i = id.x; i < params.count; i += params.threads) {
        bits |= source[i];
    }
    // (The buffer is all zeros, which no compiler knows.)
    if any(bits != vec4<u32>()) {
        out[0] = bits;
    }
}
