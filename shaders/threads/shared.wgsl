// Sums across threads go through workgroup memory alone.
const SUBGROUP = 1u;

struct Thread {
    @builtin(local_invocation_index) index: u32,
}

fn thread_index(thread: Thread) -> u32 {
    return thread.index;
}

fn subgroup_sum(x: f32) -> f32 {
    return x;
}
