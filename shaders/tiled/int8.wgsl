// Activations in blocks of 32 signed bytes: what tiled.wgsl shares, and its inner loop. Two groups of
// four bytes have one place in memory: the bytes, then what they are scaled by.

@group(0) @binding(1) var<storage, read> x: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

const X_AT = LANES * W_STEP;
// (At the end of a range four lanes have their sums here.)
const MEMORY = max(X_AT + LANES * X_STEP, LANES / 2u * EACH * TILE_ROWS);

struct Sums {
    total: array<array<f32, EACH>, ROWS>,
    // Of the words that share a scale.
    dots: array<array<i32, EACH>, ROWS>,
    sum_x: array<i32, EACH>,
}

fn share_weights(chunk: Chunk, i: u32, lane: u32, row: u32) {
    memory[lane * W_STEP + row] = vec4<u32>(
        chunk.q[i], chunk.q[i + 1u],
        bitcast<u32>(chunk.scale[i >> 1u]), bitcast<u32>(chunk.minimum[i >> 1u]));
}

fn share_x(base: u32, c: u32, i: u32, lane: u32, column: u32) {
    let at = position(c, i);
    let v = x[base * 4u + (at >> 1u)];
    var sum = 0;
    if MINIMA || OFFSET != 0 {
        sum = dot4I8Packed(0x01010101u, v.x) + dot4I8Packed(0x01010101u, v.y);
    }
    memory[X_AT + lane * X_STEP + column] =
        vec4<u32>(v, bitcast<u32>(scales[base + (at >> 3u)]), bitcast<u32>(sum));
}

fn multiply(before: Sums, i: u32, lane: u32, row: u32, column: u32) -> Sums {
    var sums = before;
    var w: array<vec4<u32>, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        w[r] = memory[lane * W_STEP + row + 8u * r];
    }
    // Whether these are the last words that share a scale.
    let ends = (i + 2u) % WORDS == 0u;
    for (var n = 0u; n < EACH; n++) {
        let v = memory[X_AT + lane * X_STEP + column + 4u * n];
        sums.sum_x[n] += bitcast<i32>(v.w);
        for (var r = 0u; r < ROWS; r++) {
            sums.dots[r][n] += dot4I8Packed(w[r].x, v.x) + dot4I8Packed(w[r].y, v.y);
            if ends {
                var value = f32(sums.dots[r][n] - OFFSET * sums.sum_x[n]) * bitcast<f32>(w[r].z);
                if MINIMA {
                    value = fma(f32(sums.sum_x[n]), bitcast<f32>(w[r].w), value);
                }
                sums.total[r][n] = fma(value, bitcast<f32>(v.z), sums.total[r][n]);
                sums.dots[r][n] = 0;
            }
        }
        if ends {
            sums.sum_x[n] = 0;
        }
    }
    return sums;
}

fn end_of_chunk(sums: Sums) -> Sums {
    return sums;
}

fn scaled(sum: f32, column: u32) -> f32 {
    return sum;
}
