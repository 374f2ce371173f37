// Activations in f32: what matmul_tiled.wgsl shares, and its inner loop.

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

const X_AT = LANES * PIECE * W_STEP;
const MEMORY = X_AT + LANES * PIECE * X_STEP;

struct Sums {
    total: array<array<f32, EACH>, ROWS>,
}

fn share_weights(chunk: Chunk, i: u32, lane: u32, row: u32) {
    memory[lane * PIECE * W_STEP + row] = bitcast<vec4<u32>>(weights4(chunk, i));
    memory[(lane * PIECE + 1u) * W_STEP + row] = bitcast<vec4<u32>>(weights4(chunk, i + 1u));
}

fn share_x(mine: Activations, base: u32, c: u32, i: u32, lane: u32, batch_row: u32) {
    let to = X_AT + lane * PIECE * X_STEP + batch_row;
    memory[to] = bitcast<vec4<u32>>(x[base + position(c, i)]);
    memory[to + X_STEP] = bitcast<vec4<u32>>(x[base + position(c, i + 1u)]);
}

fn multiply(before: Sums, i: u32, lane: u32, row: u32, batch_row: u32) -> Sums {
    var sums = before;
    for (var g = lane * PIECE; g < (lane + 1u) * PIECE; g++) {
        var w: array<vec4<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = bitcast<vec4<f32>>(memory[g * W_STEP + row + 8u * r]);
        }
        for (var n = 0u; n < EACH; n++) {
            let v = bitcast<vec4<f32>>(memory[X_AT + g * X_STEP + batch_row + 4u * n]);
            for (var r = 0u; r < ROWS; r++) {
                var sum = fma(w[r].x, v.x, sums.total[r][n]);
                sum = fma(w[r].y, v.y, sum);
                sum = fma(w[r].z, v.z, sum);
                sums.total[r][n] = fma(w[r].w, v.w, sum);
            }
        }
    }
    return sums;
}

fn end_of_chunk(sums: Sums) -> Sums {
    return sums;
}
