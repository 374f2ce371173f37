// Activations in f16, each row with a scale: the inner loop of matmul_vec.wgsl. A chunk's 32 products are
// added in f16, two sums side by side; chunks are added in f32.

@group(0) @binding(1) var<storage, read> x: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

fn accumulate(before: Sums, chunks: array<Chunk, ROWS>, c: u32, first_batch_row: u32) -> Sums {
    var sums = before;
    var parts: array<array<vec2<f16>, BATCH_ROWS>, ROWS>;
    for (var i = 0u; i < 8u; i++) {
        var w: array<vec4<f16>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = halves4(chunks[r], i);
        }
        let at = position(c, i);
        for (var n = 0u; n < BATCH_ROWS; n++) {
            let v = x[x_at(first_batch_row + n) + at];
            for (var r = 0u; r < ROWS; r++) {
                parts[r][n] = fma(w[r].zw, v.zw, fma(w[r].xy, v.xy, parts[r][n]));
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        for (var n = 0u; n < BATCH_ROWS; n++) {
            sums.total[r][n] += f32(parts[r][n].x) + f32(parts[r][n].y);
        }
    }
    return sums;
}
