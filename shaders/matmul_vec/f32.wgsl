// Activations in f32: the inner loop of matmul_vec.wgsl.

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

fn accumulate(before: Sums, chunks: array<Chunk, ROWS>, c: u32, first_batch_row: u32) -> Sums {
    var sums = before;
    for (var i = 0u; i < 8u; i++) {
        var w: array<vec4<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = weights4(chunks[r], i);
        }
        let at = position(c, i);
        for (var n = 0u; n < BATCH_ROWS; n++) {
            let v = x[x_at(first_batch_row + n) + at];
            for (var r = 0u; r < ROWS; r++) {
                // Written out, so that no compiler chooses an order of its own.
                var sum = fma(w[r].x, v.x, sums.total[r][n]);
                sum = fma(w[r].y, v.y, sum);
                sum = fma(w[r].z, v.z, sum);
                sums.total[r][n] = fma(w[r].w, v.w, sum);
            }
        }
    }
    return sums;
}
