// Activations in blocks of 32 signed bytes: the inner loop of matmul.wgsl. Products of bytes, four at a
// time; WORDS of a chunk's eight words share a scale, and are from one block of x. What weights are
// stored larger by, OFFSET, is taken off as a whole number: no compiler can round that otherwise.

@group(0) @binding(1) var<storage, read> x: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

fn accumulate(before: Sums, chunks: array<Chunk, ROWS>, c: u32, first_column: u32) -> Sums {
    var sums = before;
    for (var n = 0u; n < COLUMNS; n++) {
        let row = x_row(first_column + n);
        for (var s = 0u; s < 8u; s += WORDS) {
            var dots: array<i32, ROWS>;
            var sum_x = 0;
            // (Two words are always neighbours.)
            for (var i = 0u; i < WORDS; i += 2u) {
                let v = x[row * 4u + (position(c, s + i) >> 1u)];
                if MINIMA || OFFSET != 0 {
                    sum_x += dot4I8Packed(0x01010101u, v.x) + dot4I8Packed(0x01010101u, v.y);
                }
                for (var r = 0u; r < ROWS; r++) {
                    dots[r] += dot4I8Packed(chunks[r].q[s + i], v.x)
                        + dot4I8Packed(chunks[r].q[s + i + 1u], v.y);
                }
            }
            let scale = scales[row + (position(c, s) >> 3u)];
            for (var r = 0u; r < ROWS; r++) {
                var value = f32(dots[r] - OFFSET * sum_x) * chunks[r].scale[s >> 1u];
                if MINIMA {
                    value = fma(f32(sum_x), chunks[r].minimum[s >> 1u], value);
                }
                sums.total[r][n] = fma(value, scale, sums.total[r][n]);
            }
        }
    }
    return sums;
}

fn scaled(sum: f32, column: u32) -> f32 {
    return sum;
}
