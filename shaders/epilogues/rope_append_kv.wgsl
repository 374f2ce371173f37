// Queries, keys and values: those of W's rows are queries, keys behind them and values behind those. Queries are
// rotated, keys too, and keys and values go to the rows' slots of the cache (rope_append_kv.wgsl). A
// thread has four rows of W and with them two rotated pairs: rows are taken in the order of pairs.

@group(0) @binding(4) var<storage, read_write> q: array<f32>;
@group(0) @binding(5) var<storage, read_write> keys: array<u32>;
@group(0) @binding(6) var<storage, read_write> values: array<u32>;

// Elements of a head that are rotated: twice the pairs, a multiple of four.
fn rotated() -> u32 {
    return 2u * params.pairs;
}

fn source_row(tile: u32, v: u32) -> u32 {
    let i = tile * GROUP_ROWS + v;
    let d = (params.above + i) % params.head_dim;
    if params.halves == 0u || params.above + i >= params.third || d >= rotated() {
        return i;
    }
    return i - d + d / 2u + (d & 1u) * params.pairs;
}

// Two neighbours of a row of the cache.
fn cached(is_key: bool, i: u32, two: vec2<f32>) {
    var words = array<u32, 2>(pack2x16float(two), 0u);
    if !CACHE_F16 {
        words = array<u32, 2>(bitcast<u32>(two.x), bitcast<u32>(two.y));
    }
    for (var k = 0u; k < CACHE_WORDS; k++) {
        if is_key {
            keys[i * CACHE_WORDS + k] = words[k];
        } else {
            values[i * CACHE_WORDS + k] = words[k];
        }
    }
}

fn end_of_product(tile: u32, first_batch_row: u32, index: u32) {
    let fours = GROUP_ROWS / 4u;
    let n = index / fours;
    let batch_row = first_batch_row + n;
    let v = 4u * (index % fours);
    let row = tile * GROUP_ROWS + v;
    if n >= BATCH_ROWS || batch_row >= params.batch_rows || row >= params.rows {
        return;
    }
    var mine = four(tile, v, n);
    let i = params.above + row;
    // Where the first two and the last two go, in pairs of elements.
    let slot = (params.first_slot + batch_row) * params.kv_pairs;
    if i >= params.third {
        let to = slot + (i - params.third) / 2u;
        cached(false, to, mine.xy);
        cached(false, to + 1u, mine.zw);
        return;
    }
    let d = i % params.head_dim;
    var places = vec2<u32>(d, d + 2u);
    if d < rotated() {
        let a = rotate(mine.xy, rotation(batch_row, d / 2u));
        let b = rotate(mine.zw, rotation(batch_row, d / 2u + 1u));
        mine = vec4<f32>(a, b);
        if params.halves != 0u {
            mine = vec4<f32>(a.x, b.x, a.y, b.y);
            places = vec2<u32>(d / 2u, d / 2u + params.pairs);
        }
    }
    if i < params.second {
        let to = vec2<u32>(batch_row * params.out_stride + i - d) + places;
        q[to.x] = mine.x;
        q[to.x + 1u] = mine.y;
        q[to.y] = mine.z;
        q[to.y + 1u] = mine.w;
    } else {
        let head = slot + (i - d - params.second) / 2u;
        cached(true, head + places.x / 2u, mine.xy);
        cached(true, head + places.y / 2u, mine.zw);
    }
}
