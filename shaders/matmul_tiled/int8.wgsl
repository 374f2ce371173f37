// Activations in blocks of 32 signed bytes: what matmul_tiled.wgsl shares, and its inner loop. A piece is a whole chunk:
// its words, of weights and of activations, in two groups of four, with their scales, minima and sums.

@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<vec2<f32>>;

const W_SECOND = LANES * W_STEP;
const X_AT = 2u * W_SECOND;
const X_SECOND = LANES * X_STEP;
// (At the end of a range four lanes have their sums here.)
const MEMORY = max(X_AT + 2u * X_SECOND, LANES / 2u * EACH * TILE_ROWS);

// Scale and minimum of weights, scale and sum of activations: of all eight words of a chunk, or of four and
// four (SHARED).
var<workgroup> w_scales: array<array<vec2<f32>, SHARED>, LANES * W_STEP>;
var<workgroup> x_scales: array<array<vec2<f32>, SHARED>, LANES * X_STEP>;

struct Sums {
    total: array<array<f32, EACH>, ROWS>,
}

fn share_weights(chunk: Chunk, i: u32, lane: u32, row: u32) {
    let at = lane * W_STEP + row;
    memory[at] = vec4<u32>(chunk.q[0], chunk.q[1], chunk.q[2], chunk.q[3]);
    memory[W_SECOND + at] = vec4<u32>(chunk.q[4], chunk.q[5], chunk.q[6], chunk.q[7]);
    for (var s = 0u; s < SHARED; s++) {
        w_scales[at][s] = vec2<f32>(chunk.scale[s], chunk.minimum[s]);
    }
}

// Of a row of x what a chunk of weights is multiplied with, as it lies there.
struct Activations {
    words: array<vec4<u32>, 2>,
    scales: array<vec2<f32>, SHARED>,
}

fn load_x(base: u32, c: u32) -> Activations {
    var out: Activations;
    for (var h = 0u; h < 2u; h++) {
        out.words[h] = x[base * 2u + (byte_group(params.x_stride, position(c, 4u * h)) >> 2u)];
    }
    for (var s = 0u; s < SHARED; s++) {
        out.scales[s] = scales[base + (position(c, 4u * s) >> 3u)];
    }
    return out;
}

fn share_x(mine: Activations, base: u32, c: u32, i: u32, lane: u32, batch_row: u32) {
    let to = lane * X_STEP + batch_row;
    memory[X_AT + to] = mine.words[0];
    memory[X_AT + X_SECOND + to] = mine.words[1];
    for (var s = 0u; s < SHARED; s++) {
        x_scales[to][s] = vec2<f32>(mine.scales[s].x, f32(sum_of_words(mine.scales[s].y, position(c, 4u * s))));
    }
}

fn dot16(dots: i32, w: vec4<u32>, v: vec4<u32>) -> i32 {
    return dots + dot4I8Packed(w.x, v.x) + dot4I8Packed(w.y, v.y) + dot4I8Packed(w.z, v.z)
        + dot4I8Packed(w.w, v.w);
}

fn multiply(before: Sums, i: u32, lane: u32, row: u32, batch_row: u32) -> Sums {
    var sums = before;
    var w: array<array<vec4<u32>, 2>, ROWS>;
    var w_scale: array<array<vec2<f32>, SHARED>, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let at = lane * W_STEP + row + 8u * r;
        w[r] = array<vec4<u32>, 2>(memory[at], memory[W_SECOND + at]);
        w_scale[r] = w_scales[at];
    }
    for (var n = 0u; n < EACH; n++) {
        let at = lane * X_STEP + batch_row + 4u * n;
        let v = array<vec4<u32>, 2>(memory[X_AT + at], memory[X_AT + X_SECOND + at]);
        for (var s = 0u; s < SHARED; s++) {
            let x_scale = x_scales[at][s];
            for (var r = 0u; r < ROWS; r++) {
                var dots = dot16(0, w[r][s], v[s]);
                if SHARED == 1u {
                    dots = dot16(dots, w[r][1], v[1]);
                }
                var value = f32(dots - OFFSET * i32(x_scale.y)) * w_scale[r][s].x;
                if MINIMA {
                    value = fma(x_scale.y, w_scale[r][s].y, value);
                }
                sums.total[r][n] = fma(value, x_scale.x, sums.total[r][n]);
            }
        }
    }
    return sums;
}

fn end_of_chunk(sums: Sums) -> Sums {
    return sums;
}
