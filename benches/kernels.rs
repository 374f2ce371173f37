//! The CPU's kernels one by one, on one thread and from the cache: what they cost beside memory.
//!
//!     cargo bench --bench kernels                  # all
//!     cargo bench --bench kernels -- matmul/Q4_0   # some
//!     MTAD_CPU=avx2 cargo bench --bench kernels    # another instruction set
//!
//! Each is a program of one operation. Items are multiplications (matmul) or elements (the others).

use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use mtad::exec::cpu::{Cpu, Isa};
use mtad::exec::{CacheType, Executor, Rows, Segment};
use mtad::gguf::{Gguf, SharedTensor, Writer};
use mtad::graph::{Activation, Attention, BufferId, Builder, Gating, KvShape};
use mtad::quant::BlockType;

fn main() {
    divan::main();
}

/// A file with one tensor of zeros but for its scales: kernels take the same time for any values.
fn tensor(block_type: BlockType, rows: usize, cols: usize) -> SharedTensor {
    let bytes = vec![0; rows * cols / block_type.block_len() * block_type.block_bytes()];
    let mut writer = Writer::new();
    writer.tensor("w", &[cols as u64, rows as u64], block_type, bytes);
    let file = Arc::new(Gguf::from_vec("bench", writer.to_vec()).expect("a sound file"));
    SharedTensor::find(&file, "w").expect("the tensor is there")
}

/// Times a program that `build` makes of inputs of some widths, over `n` rows of a chain after a line. What it ends in
/// is not selected: nobody wants it.
fn time(
    bencher: Bencher,
    items: usize,
    (n, line): (usize, usize),
    widths: &[usize],
    build: impl FnOnce(&mut Builder, &[BufferId]) -> mtad::Result<BufferId>,
) {
    let cpu = Arc::new(Cpu::with_isa(1, isa()).expect("a CPU"));
    let mut builder = Builder::new("bench", line + n);
    let inputs: Vec<_> = widths.iter().map(|width| builder.input(*width)).collect();
    let out = build(&mut builder, &inputs).expect("shapes that fit");
    let selected = builder.select_rows(out);
    let program = Arc::new(builder.finish(selected).expect("a program"));
    let stage = cpu.load(&program, 0..program.ops.len(), &mut |_| Ok(())).expect("a stage");
    let (mut workspace, mut cache) = (stage.workspace(), stage.cache(CacheType::F16));
    let inputs = program.live_at(0);
    for input in inputs {
        let rows = vec![0.0; n * program.buffer(input).width];
        workspace.write(input, &rows).expect("room for rows");
    }
    let rows = Rows {
        tokens: &vec![0; n],
        segments: &[Segment { rows: 0..n, line, first_slot: line }],
        ancestors: &(0..n).map(|i| u128::MAX >> (127 - i)).collect::<Vec<_>>(),
        rotations: &[],
        wanted: &[],
    };
    bencher
        .counter(ItemsCount::new(items))
        .bench_local(|| stage.run(&rows, &mut [&mut *cache], &mut *workspace));
}

/// The instruction set that the environment names, or the best.
fn isa() -> Isa {
    Isa::from_env().expect("one of this machine's").unwrap_or(Isa::best())
}

const TYPES: [&str; 15] = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS",
];

#[divan::bench(args = TYPES, consts = [1, 4, 8, 32])]
fn matmul<const N: usize>(bencher: Bencher, name: &str) {
    let (outputs, cols) = (2048, 1024);
    let block_type = BlockType::from_name(name).expect("a type");
    time(bencher, N * outputs * cols, (N, 0), &[cols], |b, x| {
        let matrix = b.matrix(tensor(block_type, outputs, cols), None)?;
        Ok(b.linear(x[0], [matrix])?[0])
    });
}

/// Attention of N rows with 8 query heads of 64 on 2 key/value heads, over `line` positions.
#[divan::bench(args = [128, 1024, 4096], consts = [1, 8])]
fn attention<const N: usize>(bencher: Bencher, line: usize) {
    time(bencher, N * 512 * line, (N, line), &[512, 128, 128], |b, qkv| {
        let layer = b.begin_layer(KvShape { heads: 2, head_dim: 64 });
        b.rope_append_kv([qkv[0], qkv[1], qkv[2]], None, layer)?;
        b.attend(qkv[0], layer, Attention::scaled(0.125))
    });
}

#[divan::bench(args = [2048, 8192])]
fn rms_norm(bencher: Bencher, width: usize) {
    time(bencher, width, (1, 0), &[width], |b, x| {
        let weight = b.vector(tensor(BlockType::F32, 1, width));
        b.rms_norm(x[0], weight, 1e-5)
    });
}

#[divan::bench(args = [2048, 8192])]
fn swiglu(bencher: Bencher, width: usize) {
    time(bencher, width, (1, 0), &[width, width], |b, x| {
        b.gate(Gating::Activated(Activation::Silu), x[0], x[1])?;
        Ok(x[0])
    });
}
