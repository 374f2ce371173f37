// A product's elements go to out (matmul_vec.wgsl): each is a thread's.

@group(0) @binding(4) var<storage, read_write> out: array<f32>;

fn store(row: u32, batch_row: u32, value: f32) {
    if row >= params.rows || batch_row >= params.batch_rows {
        return;
    }
    if store_elsewhere(row, batch_row, value) {
        return;
    }
    let at = batch_row * params.out_stride + params.first + row;
    if params.add != 0u {
        out[at] += value;
    } else {
        out[at] = value;
    }
}
