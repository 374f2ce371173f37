// The factors by which norms scale the rows of x, 1 / sqrt(mean(x^2) + epsilon), of the sums of the squares
// of x's blocks (rounded/squares.wgsl): products have them as bytes without. Eight threads have a row.

var<workgroup> of_lanes: array<f32, 8u * BATCH_ROWS>;
var<workgroup> factors: array<f32, BATCH_ROWS>;

// Done by all threads, eight for each batch_row at least; there is a barrier before factors are used.
fn prepare(first_batch_row: u32, index: u32) {
    if params.squares == 0u {
        if index < BATCH_ROWS {
            factors[index] = 1.0;
        }
        return;
    }
    let n = index / 8u;
    if n < BATCH_ROWS {
        let pairs = (params.x_stride + 1u) / 2u;
        let first = params.squares / 2u + min(first_batch_row + n, params.batch_rows - 1u) * pairs;
        var sum = vec2<f32>();
        for (var i = index % 8u; i < pairs; i += 8u) {
            sum += scales[first + i];
        }
        of_lanes[index] = sum.x + sum.y;
    }
    workgroupBarrier();
    if index < BATCH_ROWS {
        var lanes: array<f32, 8>;
        for (var i = 0u; i < 8u; i++) {
            lanes[i] = of_lanes[8u * index + i];
        }
        let sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
        factors[index] = 1.0 / sqrt(fma(sum, params.inverse_width, params.epsilon));
    }
}

fn finished(sum: f32, n: u32, bias: f32) -> f32 {
    return fma(sum, factors[n], bias);
}
