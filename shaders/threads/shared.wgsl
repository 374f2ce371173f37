// Sums across threads go through workgroup memory alone.

struct Thread {
    @builtin(local_invocation_index) index: u32,
}

var<workgroup> exchanged: array<f32, 512>;

fn thread_index(thread: Thread) -> u32 {
    return thread.index;
}

// The sum of 8 neighbours, by the tree of subgroups.wgsl.
fn sum8(x: f32, index: u32) -> f32 {
    workgroupBarrier();
    exchanged[index] = x;
    workgroupBarrier();
    let at = index / 8u * 8u;
    let a = vec4<f32>(exchanged[at], exchanged[at + 1u], exchanged[at + 2u], exchanged[at + 3u]);
    let b = vec4<f32>(exchanged[at + 4u], exchanged[at + 5u], exchanged[at + 6u], exchanged[at + 7u]);
    let four = a + b;
    let two = four.xy + four.zw;
    return two.x + two.y;
}

// The largest of 8 neighbours.
fn max8(x: f32, index: u32) -> f32 {
    workgroupBarrier();
    exchanged[index] = x;
    workgroupBarrier();
    let at = index / 8u * 8u;
    let a = vec4<f32>(exchanged[at], exchanged[at + 1u], exchanged[at + 2u], exchanged[at + 3u]);
    let b = vec4<f32>(exchanged[at + 4u], exchanged[at + 5u], exchanged[at + 6u], exchanged[at + 7u]);
    let four = max(a, b);
    return max(max(four.x, four.y), max(four.z, four.w));
}
