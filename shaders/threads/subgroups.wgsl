// Sums across SUBGROUP threads are exchanged in registers. SUBGROUP is the least size of a subgroup
// that the device has, 32 at most: larger subgroups are used as several of that size.

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

// The same tree whatever the device's own sum would do.
fn subgroup_sum(x: f32) -> f32 {
    var sum = x;
    for (var distance = 1u; distance < SUBGROUP; distance <<= 1u) {
        sum += subgroupShuffleXor(sum, distance);
    }
    return sum;
}
