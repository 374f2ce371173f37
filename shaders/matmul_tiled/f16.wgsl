// Activations in f16, each row with a scale: what matmul_tiled.wgsl shares, and its inner loop.

@group(0) @binding(1) var<storage, read> x: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

const X_AT = LANES * PIECE * W_STEP;
// (Sums of four lanes, at the end of a range.)
const MEMORY = LANES / 2u * EACH * TILE_ROWS;

var<workgroup> halves: array<vec4<f16>, X_AT + LANES * PIECE * X_STEP>;

struct Sums {
    total: array<array<f32, EACH>, ROWS>,
    // Of the chunk at hand.
    parts: array<array<vec2<f16>, EACH>, ROWS>,
}

fn share_weights(chunk: Chunk, i: u32, lane: u32, row: u32) {
    halves[lane * PIECE * W_STEP + row] = halves4(chunk, i);
    halves[(lane * PIECE + 1u) * W_STEP + row] = halves4(chunk, i + 1u);
}

fn share_x(mine: Activations, base: u32, c: u32, i: u32, lane: u32, batch_row: u32) {
    let to = X_AT + lane * PIECE * X_STEP + batch_row;
    halves[to] = x[base + position(c, i)];
    halves[to + X_STEP] = x[base + position(c, i + 1u)];
}

fn multiply(before: Sums, i: u32, lane: u32, row: u32, batch_row: u32) -> Sums {
    var sums = before;
    for (var g = lane * PIECE; g < (lane + 1u) * PIECE; g++) {
        var w: array<vec4<f16>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = halves[g * W_STEP + row + 8u * r];
        }
        for (var n = 0u; n < EACH; n++) {
            let v = halves[X_AT + g * X_STEP + batch_row + 4u * n];
            for (var r = 0u; r < ROWS; r++) {
                sums.parts[r][n] = fma(w[r].zw, v.zw, fma(w[r].xy, v.xy, sums.parts[r][n]));
            }
        }
    }
    return sums;
}

fn end_of_chunk(before: Sums) -> Sums {
    var sums = before;
    for (var r = 0u; r < ROWS; r++) {
        for (var n = 0u; n < EACH; n++) {
            sums.total[r][n] += f32(sums.parts[r][n].x) + f32(sums.parts[r][n].y);
            sums.parts[r][n] = vec2<f16>();
        }
    }
    return sums;
}
