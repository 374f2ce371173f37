// Sums over a whole row for norms, which have a workgroup of THREADS for each.

const THREADS = 256u;

var<workgroup> partial: array<f32, THREADS / 8u>;

// The sum over all threads, in one order.
fn total(index: u32, mine: vec4<f32>) -> f32 {
    let two = mine.xy + mine.zw;
    let sum = sum8(two.x + two.y, index);
    // (Nobody reads what the last sum left any more.)
    workgroupBarrier();
    if index % 8u == 0u {
        partial[index / 8u] = sum;
    }
    workgroupBarrier();
    var all = 0.0;
    for (var p = 0u; p < THREADS / 8u; p++) {
        all += partial[p];
    }
    return all;
}
