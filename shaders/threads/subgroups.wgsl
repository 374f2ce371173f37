// Sums across threads are exchanged in registers: subgroups have 8 threads at least, and larger ones
// are used as several of 8.

struct Thread {
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

// (By subgroups, not by `local_invocation_index`: how threads are dealt to subgroups is the device's
// affair.)
fn thread_index(thread: Thread) -> u32 {
    return thread.subgroup * thread.size + thread.lane;
}

// The sum of 8 neighbours; the same tree whatever the device's own sum would do.
fn sum8(x: f32, index: u32) -> f32 {
    var sum = x + subgroupShuffleXor(x, 4u);
    sum += subgroupShuffleXor(sum, 2u);
    return sum + subgroupShuffleXor(sum, 1u);
}

// The largest of 8 neighbours.
fn max8(x: f32, index: u32) -> f32 {
    var most = max(x, subgroupShuffleXor(x, 4u));
    most = max(most, subgroupShuffleXor(most, 2u));
    return max(most, subgroupShuffleXor(most, 1u));
}
