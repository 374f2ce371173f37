//! The CPU's kernels one by one, on one thread and from the cache: what they cost beside memory.
//!
//!     cargo bench --bench kernels                  # all
//!     cargo bench --bench kernels -- matmul/Q4_0   # some
//!     MTAD_CPU=avx2 cargo bench --bench kernels    # another instruction set
//!
//! Items are multiplications (matmul) or elements (the others).

use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use mtad::exec::cpu::{Buffer, Cpu};
use mtad::exec::{Backend, CacheShape, CacheType, Pass, RotaryPairs, Rows};
use mtad::gguf::{Gguf, SharedTensor, Writer};
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

/// Rows for a pass that only counts them.
fn rows<'a>(tokens: &'a [u32], paths: &'a [u128], line: usize) -> Rows<'a> {
    Rows { tokens, line, first_slot: line, paths, rotations: &[] }
}

/// A buffer of `n` rows with something in it.
fn filled(cpu: &Cpu, n: usize, width: usize) -> Buffer {
    let mut out = cpu.buffer(width);
    let table = cpu.embedding(&tensor(BlockType::F32, 1, width)).expect("an embedding");
    cpu.pass(&rows(&vec![0; n], &vec![1; n], 0), 0, |pass| {
        pass.embed(&table, &mut out);
        Ok(())
    })
    .expect("a pass");
    out
}

const TYPES: [&str; 15] = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS",
];

#[divan::bench(args = TYPES, consts = [1, 4, 8, 32])]
fn matmul<const N: usize>(bencher: Bencher, name: &str) {
    let (outputs, cols) = (2048, 1024);
    let cpu = Cpu::new(1).expect("a CPU");
    let block_type = BlockType::from_name(name).expect("a type");
    let matrix = cpu.matrix(&tensor(block_type, outputs, cols), None).expect("a matrix");
    let (x, mut out) = (filled(&cpu, N, cols), cpu.buffer(outputs));
    let (tokens, paths) = (vec![0; N], vec![1; N]);
    bencher.counter(ItemsCount::new(N * outputs * cols)).bench_local(|| {
        cpu.pass(&rows(&tokens, &paths, 0), 0, |pass| {
            pass.linear(&x, &mut [(&matrix, &mut out)]);
            Ok(())
        })
    });
}

/// Attention of N rows with 8 query heads of 64 on 2 key/value heads, over `line` positions.
#[divan::bench(args = [128, 1024, 4096], consts = [1, 8])]
fn attention<const N: usize>(bencher: Bencher, line: usize) {
    let cpu = Cpu::new(1).expect("a CPU");
    let shape = CacheShape { layers: 1, kv_heads: 2, head_dim: 64, cache_type: CacheType::F16 };
    let mut cache = cpu.cache(shape);
    let (mut q, mut k, v) = (filled(&cpu, N, 512), filled(&cpu, N, 128), filled(&cpu, N, 128));
    let mut out = cpu.buffer(512);
    let tokens = vec![0; N];
    let paths: Vec<u128> = (0..N).map(|i| (1 << (i + 1)) - 1).collect();
    let rotations = vec![[1.0, 0.0]; N * 32];
    let rows = Rows { rotations: &rotations, ..rows(&tokens, &paths, line) };
    bencher.counter(ItemsCount::new(N * 512 * line)).bench_local(|| {
        cpu.pass(&rows, 0, |pass| {
            pass.rotate_and_store(&mut q, &mut k, &v, RotaryPairs::Interleaved, &mut cache, 0);
            pass.attend(&q, &cache, 0, None, &mut out);
            Ok(())
        })
    });
}

#[divan::bench(args = [2048, 8192])]
fn rms_norm(bencher: Bencher, width: usize) {
    let cpu = Cpu::new(1).expect("a CPU");
    let weight = cpu.vector(&tensor(BlockType::F32, 1, width)).expect("a vector");
    let (x, mut out) = (filled(&cpu, 1, width), cpu.buffer(width));
    bencher.counter(ItemsCount::new(width)).bench_local(|| {
        cpu.pass(&rows(&[0], &[1], 0), 0, |pass| {
            pass.rms_norm(&x, &weight, 1e-5, &mut out);
            Ok(())
        })
    });
}

#[divan::bench(args = [2048, 8192])]
fn swiglu(bencher: Bencher, width: usize) {
    let cpu = Cpu::new(1).expect("a CPU");
    let (mut gate, up) = (filled(&cpu, 1, width), filled(&cpu, 1, width));
    bencher.counter(ItemsCount::new(width)).bench_local(|| {
        cpu.pass(&rows(&[0], &[1], 0), 0, |pass| {
            pass.swiglu(&mut gate, &up);
            Ok(())
        })
    });
}
