// The end of a product: what the 32 threads of a row of W summed is added up and written.

const LANES = 32u;
const GROUPS = 4u;
const PIECES = LANES / SUBGROUP;
const OUTPUTS = GROUPS * ROWS * COLUMNS;

var<workgroup> partial: array<f32, OUTPUTS * PIECES>;

fn finish(sums: array<array<f32, COLUMNS>, ROWS>, tile: vec3<u32>, index: u32) {
    let lane = index % LANES;
    let group = index / LANES;
    for (var r = 0u; r < ROWS; r++) {
        for (var n = 0u; n < COLUMNS; n++) {
            let sum = subgroup_sum(sums[r][n]);
            if lane % SUBGROUP == 0u {
                partial[((r * COLUMNS + n) * GROUPS + group) * PIECES + lane / SUBGROUP] = sum;
            }
        }
    }
    workgroupBarrier();
    for (var o = index; o < OUTPUTS; o += LANES * GROUPS) {
        let row = (tile.x * GROUPS + o % GROUPS) * ROWS + o / GROUPS / COLUMNS;
        let column = tile.y * COLUMNS + o / GROUPS % COLUMNS;
        if row < params.rows && column < params.columns {
            var sum = partial[o * PIECES];
            for (var p = 1u; p < PIECES; p++) {
                sum += partial[o * PIECES + p];
            }
            if params.has_bias != 0u {
                sum += bias[params.first + row];
            }
            let at = column * params.out_stride + params.first + row;
            if params.add != 0u {
                sum += out[at];
            }
            out[at] = sum;
        }
    }
}
