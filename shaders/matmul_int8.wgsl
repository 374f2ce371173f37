// As matmul.wgsl, with activations in blocks of 32 signed bytes: products of bytes four at a time.

struct Params {
    cols: u32,
    chunks: u32,
    row_bytes: u32,
    rows: u32,
    columns: u32,
    // Blocks of a row of x.
    x_stride: u32,
    out_stride: u32,
    first: u32,
    has_bias: u32,
    add: u32,
}

@group(0) @binding(1) var<storage, read> bytes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) tile: vec3<u32>, thread: Thread) {
    let index = thread_index(thread);
    let lane = index % LANES;
    let group = index / LANES;
    let first_row = (tile.x * GROUPS + group) * ROWS;
    let first_column = tile.y * COLUMNS;

    var sums: array<array<f32, COLUMNS>, ROWS>;
    for (var c = lane; c < params.chunks; c += LANES) {
        var chunks: array<Chunk, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            chunks[r] = load(min(first_row + r, params.rows - 1u) * params.row_bytes, c);
        }
        for (var i = 0u; i < 8u; i += 2u) {
            // Two groups are neighbours, and in one block of x.
            let at = position(c, i);
            for (var n = 0u; n < COLUMNS; n++) {
                let row = min(first_column + n, params.columns - 1u) * params.x_stride;
                let low = bytes[row * 8u + at];
                let high = bytes[row * 8u + at + 1u];
                let scale = scales[row + (at >> 3u)];
                let sum_x = dot4I8Packed(0x01010101u, low) + dot4I8Packed(0x01010101u, high);
                for (var r = 0u; r < ROWS; r++) {
                    let dot = dot4I8Packed(chunks[r].q[i], low)
                        + dot4I8Packed(chunks[r].q[i + 1u], high);
                    let value = fma(f32(dot), chunks[r].scale[i >> 1u],
                                    f32(sum_x) * chunks[r].minimum[i >> 1u]);
                    sums[r][n] = fma(value, scale, sums[r][n]);
                }
            }
        }
    }
    finish(sums, tile, index);
}
