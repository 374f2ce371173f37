// The scales of the rows of x, which products have in halves.

var<workgroup> factors: array<f32, BATCH_ROWS>;

fn prepare(first_batch_row: u32, index: u32) {
    if index < BATCH_ROWS {
        factors[index] = scales[min(first_batch_row + index, params.batch_rows - 1u)];
    }
}

fn finished(sum: f32, n: u32, bias: f32) -> f32 {
    return fma(sum, factors[n], bias);
}
