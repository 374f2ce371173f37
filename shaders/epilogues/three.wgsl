// A product has up to three outputs: results of later rows of W go to the other two.

@group(0) @binding(5) var<storage, read_write> second_out: array<f32>;
@group(0) @binding(6) var<storage, read_write> third_out: array<f32>;

fn store_elsewhere(row: u32, batch_row: u32, sum: f32) -> bool {
    if row < params.second {
        return false;
    }
    if row < params.third {
        second_out[batch_row * params.second_stride + row - params.second] = sum;
    } else {
        third_out[batch_row * params.third_stride + row - params.third] = sum;
    }
    return true;
}
