// Activations in blocks of 32 signed bytes: the inner loop of matmul_vec.wgsl. Products of bytes, four at a
// time; WORDS of a chunk's eight words share a scale, and are of one block of x. What weights are
// stored larger by, OFFSET, is taken off as a whole number: no compiler can round that otherwise.

@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<vec2<f32>>;

fn accumulate(before: Sums, chunks: array<Chunk, ROWS>, c: u32, first_batch_row: u32) -> Sums {
    var sums = before;
    for (var first = 0u; first < BATCH_ROWS; first += FETCHED) {
        // (What FETCHED batch rows have is on its way at once.)
        var words: array<array<vec4<u32>, 2>, FETCHED>;
        var x_scales: array<array<vec2<f32>, SHARED>, FETCHED>;
        for (var b = 0u; b < FETCHED; b++) {
            let row = x_at(first_batch_row + first + b);
            for (var h = 0u; h < 2u; h++) {
                words[b][h] = x[row * 2u + (byte_group(params.x_stride, position(c, 4u * h)) >> 2u)];
            }
            for (var s = 0u; s < SHARED; s++) {
                x_scales[b][s] = scales[row + (position(c, 4u * s) >> 3u)];
            }
        }
        for (var b = 0u; b < FETCHED; b++) {
            for (var s = 0u; s < 8u; s += WORDS) {
                var dots: array<i32, ROWS>;
                for (var i = 0u; i < WORDS; i += 4u) {
                    let v = words[b][(s + i) / 4u];
                    for (var r = 0u; r < ROWS; r++) {
                        dots[r] += dot4I8Packed(chunks[r].q[s + i], v.x)
                            + dot4I8Packed(chunks[r].q[s + i + 1u], v.y)
                            + dot4I8Packed(chunks[r].q[s + i + 2u], v.z)
                            + dot4I8Packed(chunks[r].q[s + i + 3u], v.w);
                    }
                }
                let scale = x_scales[b][s / WORDS];
                var sum_x = 0;
                if MINIMA || OFFSET != 0 {
                    sum_x = sum_of_words(scale.y, position(c, s));
                }
                for (var r = 0u; r < ROWS; r++) {
                    var value = f32(dots[r] - OFFSET * sum_x) * chunks[r].scale[s >> 2u];
                    if MINIMA {
                        value = fma(f32(sum_x), chunks[r].minimum[s >> 2u], value);
                    }
                    sums.total[r][first + b] = fma(value, scale.x, sums.total[r][first + b]);
                }
            }
        }
    }
    return sums;
}
