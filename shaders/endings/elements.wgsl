// A product's elements go to out (matmul.wgsl): each is a thread's.

@group(0) @binding(4) var<storage, read_write> out: array<f32>;

fn store(row: u32, column: u32, value: f32) {
    if row >= params.rows || column >= params.columns {
        return;
    }
    if store_elsewhere(row, column, value) {
        return;
    }
    let at = column * params.out_stride + params.first + row;
    if params.add != 0u {
        out[at] += value;
    } else {
        out[at] = value;
    }
}
