// Sums over a whole row for norms, which have a workgroup of THREADS for each.

const THREADS = 256u;

// Groups of four that a thread reads at a time, so that reads need not wait for one another.
const AT_ONCE = NORMED * THREADS;

var<workgroup> partial: array<vec4<f32>, THREADS / 32u>;

// The sum over all threads, in one order.
fn total(index: u32, mine: vec4<f32>) -> f32 {
    let two = mine.xy + mine.zw;
    let sum = sum8(two.x + two.y, index);
    // (Nobody reads what the last sum left any more.)
    workgroupBarrier();
    if index % 8u == 0u {
        partial[index / 32u][index / 8u % 4u] = sum;
    }
    workgroupBarrier();
    var all = vec4<f32>();
    for (var p = 0u; p < 8u; p++) {
        all += partial[p];
    }
    return (all.x + all.z) + (all.y + all.w);
}
