// The scales of the rows of x, which products have in halves.

var<workgroup> factors: array<f32, COLUMNS>;

fn prepare(first_column: u32, index: u32) {
    if index < COLUMNS {
        factors[index] = scales[min(first_column + index, params.columns - 1u)];
    }
}

fn finished(sum: f32, n: u32, bias: f32) -> f32 {
    return fma(sum, factors[n], bias);
}
