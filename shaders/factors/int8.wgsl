// The factors by which norms scale the rows of x, 1 / sqrt(mean(x^2) + epsilon), of the sums of the squares
// of x's blocks (rounded/squares.wgsl): products have them as bytes without. Eight threads have a row.

var<workgroup> of_lanes: array<f32, 8u * COLUMNS>;
var<workgroup> factors: array<f32, COLUMNS>;

// Done by all threads, eight for each column at least; there is a barrier before factors are used.
fn prepare(first_column: u32, index: u32) {
    if params.squares == 0u {
        if index < COLUMNS {
            factors[index] = 1.0;
        }
        return;
    }
    let n = index / 8u;
    if n < COLUMNS {
        let pairs = (params.x_stride + 1u) / 2u;
        let first = params.squares / 2u + min(first_column + n, params.columns - 1u) * pairs;
        var sum = vec2<f32>();
        for (var i = index % 8u; i < pairs; i += 8u) {
            sum += scales[first + i];
        }
        of_lanes[index] = sum.x + sum.y;
    }
    workgroupBarrier();
    if index < COLUMNS {
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
