// Activations in blocks of 32 signed bytes: what tiled.wgsl shares, and its inner loop. A piece is four words
// of weights with their scale and minimum, and of activations with their scale and sum.

@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<vec2<f32>>;

const X_AT = LANES * W_STEP;
// (At the end of a range four lanes have their sums here.)
const MEMORY = max(X_AT + LANES * X_STEP, LANES / 2u * EACH * TILE_ROWS);

var<workgroup> w_scales: array<vec2<f32>, LANES * W_STEP>;
var<workgroup> x_scales: array<vec2<f32>, LANES * X_STEP>;

struct Sums {
    total: array<array<f32, EACH>, ROWS>,
    // Of the words that share a scale.
    dots: array<array<i32, EACH>, ROWS>,
    sum_x: array<i32, EACH>,
}

fn share_weights(chunk: Chunk, i: u32, lane: u32, row: u32) {
    let at = lane * W_STEP + row;
    memory[at] = vec4<u32>(chunk.q[i], chunk.q[i + 1u], chunk.q[i + 2u], chunk.q[i + 3u]);
    w_scales[at] = vec2<f32>(chunk.scale[i >> 2u], chunk.minimum[i >> 2u]);
}

fn share_x(base: u32, c: u32, i: u32, lane: u32, column: u32) {
    let at = position(c, i);
    let to = lane * X_STEP + column;
    memory[X_AT + to] = x[base * 2u + (byte_group(params.x_stride, at) >> 2u)];
    let scale = scales[base + (at >> 3u)];
    let halves = half_sums(scale.y);
    x_scales[to] = vec2<f32>(scale.x, f32(select(halves.x, halves.y, (at & 4u) != 0u)));
}

fn multiply(before: Sums, i: u32, lane: u32, row: u32, column: u32) -> Sums {
    var sums = before;
    var w: array<vec4<u32>, ROWS>;
    var w_scale: array<vec2<f32>, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        w[r] = memory[lane * W_STEP + row + 8u * r];
        w_scale[r] = w_scales[lane * W_STEP + row + 8u * r];
    }
    // Whether these are the last words that share a scale.
    let ends = (i + 4u) % WORDS == 0u;
    for (var n = 0u; n < EACH; n++) {
        let v = memory[X_AT + lane * X_STEP + column + 4u * n];
        let x_scale = x_scales[lane * X_STEP + column + 4u * n];
        sums.sum_x[n] += i32(x_scale.y);
        for (var r = 0u; r < ROWS; r++) {
            sums.dots[r][n] += dot4I8Packed(w[r].x, v.x) + dot4I8Packed(w[r].y, v.y)
                + dot4I8Packed(w[r].z, v.z) + dot4I8Packed(w[r].w, v.w);
            if ends {
                var value = f32(sums.dots[r][n] - OFFSET * sums.sum_x[n]) * w_scale[r].x;
                if MINIMA {
                    value = fma(f32(sums.sum_x[n]), w_scale[r].y, value);
                }
                sums.total[r][n] = fma(value, x_scale.x, sums.total[r][n]);
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
