//! Every verb against the CPU's, or against exact arithmetic where the CPU rounds.
//!
//! They run on any adapter, the software one included. Without one they are skipped, and say so;
//! with `MTAD_REQUIRE_GPU` set that is a failure.

use std::sync::Arc;

use super::*;
use crate::backend::RotaryPairs;
use crate::backend::cpu::Cpu;
use crate::gguf::{Gguf, Writer};

/// The first adapter.
fn adapter() -> Option<Adapter> {
    let found = Adapter::all().into_iter().next();
    if found.is_none() {
        let required = std::env::var_os("MTAD_REQUIRE_GPU").is_some_and(|v| v != "0");
        assert!(!required, "MTAD_REQUIRE_GPU is set, and no adapter was found");
        eprintln!("skipped: no adapter was found (a Vulkan driver such as lavapipe would do)");
    }
    found
}

/// The adapter with each variant forced.
fn gpus() -> Vec<Gpu> {
    let Some(adapter) = adapter() else { return Vec::new() };
    ["f32", "f32,no-subgroups", "int8", "int8,no-subgroups", "f16", "f16,no-subgroups"]
        .into_iter()
        .filter(|words| !words.starts_with("f16") || adapter.has_f16())
        .map(|words| Gpu::with(&adapter, Variants::parse(words).unwrap()).unwrap())
        .collect()
}

/// Numbers from -1 to 1.
fn noise(seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// A tensor of random weights.
fn tensor(block: BlockType, rows: usize, cols: usize) -> SharedTensor {
    let mut next = noise(rows as u32 * 31 + cols as u32);
    let mut random = || next.next().unwrap();
    let len = rows * cols / block.block_len();
    let mut bytes = Vec::new();
    for _ in 0..len {
        match block {
            BlockType::F32 => bytes.extend(random().to_le_bytes()),
            BlockType::F16 => bytes.extend(half::f16::from_f32(random()).to_le_bytes()),
            BlockType::BF16 => bytes.extend(half::bf16::from_f32(random()).to_le_bytes()),
            _ => {
                let at = bytes.len();
                bytes.extend((0..block.block_bytes()).map(|_| (random() * 1e4) as i32 as u8));
                for offset in block.scale_offsets() {
                    let scale = half::f16::from_f32(0.01 + 0.01 * random()).to_le_bytes();
                    bytes[at + offset..][..2].copy_from_slice(&scale);
                }
            }
        }
    }
    let mut writer = Writer::new();
    writer.set("general.architecture", "test");
    writer.tensor("t", &[cols as u64, rows as u64], block, bytes);
    let file = Arc::new(Gguf::from_vec("test.gguf", writer.to_vec()).unwrap());
    SharedTensor::find(&file, "t").unwrap()
}

fn floats(tensor: &SharedTensor) -> Vec<f32> {
    let view = tensor.view();
    let mut out = vec![0.0; view.rows * view.cols];
    view.block_type.dequantize(view.bytes, &mut out);
    out
}

fn nmse(x: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(x.len(), exact.len());
    let error: f64 = x.iter().zip(exact).map(|(&x, e)| (f64::from(x) - e).powi(2)).sum();
    error / exact.iter().map(|e| e * e).sum::<f64>()
}

/// A pass over `n` rows that see themselves alone.
fn plain<B: Backend, R>(backend: &B, n: usize, record: impl FnOnce(&mut B::Pass<'_>) -> R) -> R {
    let paths: Vec<u128> = (0..n).map(|i| 1 << i).collect();
    let tokens: Vec<u32> = (0..n as u32).collect();
    let rows = Rows { tokens: &tokens, line: 0, first_slot: 0, paths: &paths, rotations: &[] };
    backend.pass(&rows, 1 << 20, |pass| Ok(record(pass))).unwrap()
}

fn read<B: Backend>(backend: &B, buffer: &B::Buffer) -> Vec<f32> {
    let mut copy = Vec::new();
    backend.read(buffer, &mut copy).unwrap().to_vec()
}

fn product<B: Backend>(
    backend: &B,
    (weight, bias): (&SharedTensor, Option<&SharedTensor>),
    x: &[f32],
) -> Vec<f32> {
    let (rows, cols) = (weight.view().rows, weight.view().cols);
    let matrix = backend.matrix(weight, bias).unwrap();
    let (mut from, mut to) = (backend.buffer(cols), backend.buffer(rows));
    plain(backend, x.len() / cols, |pass| {
        pass.write(x, &mut from);
        pass.linear(&from, &mut [(&matrix, &mut to)]);
        // Added once more, without its bias it would not be twice as much.
        pass.linear_add(&from, &matrix, &mut to);
    });
    read(backend, &to)
}

#[test]
fn products_of_every_type_are_exact_and_do_not_depend_on_the_number_of_rows() {
    for gpu in gpus() {
        let types: &[_] = match gpu.variants() {
            Variants {
                subgroups: true,
                arithmetic: Some(Arithmetic::F32 | Arithmetic::Int8),
                ..
            } => &BlockType::READABLE,
            // Compiling takes its time; these have one of each kind.
            _ => &[BlockType::F16, BlockType::Q4_0, BlockType::Q4_K, BlockType::Q6_K],
        };
        for &block in types {
            // Odd numbers of blocks, so that rows begin in the middle of a word; of float types,
            // rows that end within a chunk and within a group.
            let cols = match block.block_len() {
                1 => 171,
                32 => 32 * 37,
                _ => 256 * 5,
            };
            let (rows, n) = (35, 37);
            let weight = tensor(block, rows, cols);
            let bias = tensor(BlockType::F32, 1, rows);
            let x: Vec<f32> = noise(7).take(n * cols).collect();
            let (w, b) = (floats(&weight), floats(&bias));
            let exact: Vec<f64> = (0..n * rows)
                .map(|i| {
                    let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
                    let dot: f64 =
                        x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    2.0 * (dot + f64::from(b[i % rows]))
                })
                .collect();
            let all = product(&gpu, (&weight, Some(&bias)), &x);
            let limit = match gpu.arithmetic_with(block) {
                Arithmetic::F32 => 1e-11,
                Arithmetic::Int8 => 1e-4,
                Arithmetic::F16 => 1e-5,
            };
            let error = nmse(&all, &exact);
            assert!(error < limit, "{block} ({}): {error:.1e}", gpu.kernels());
            for width in [1, 2, 3, 5, 8, 9, 16, 17, 32] {
                let mut few = Vec::new();
                for x in x.chunks(width * cols) {
                    few.extend(product(&gpu, (&weight, Some(&bias)), x));
                }
                assert!(few == all, "{block} ({}), {width} rows at a time", gpu.kernels());
            }
        }
        // A driver's compiler may round from shader to shader as it likes; this one's does not.
        if gpu.adapter().is_software() {
            let apart = (gpu.padded_types(), gpu.untiled_types());
            assert_eq!(apart, (vec![], vec![]), "{}", gpu.kernels());
        }
    }
}

#[test]
fn a_row_is_the_same_bits_among_any_number_up_to_128() {
    let (rows, cols) = (35, 256 * 3);
    for gpu in gpus().into_iter().filter(|gpu| gpu.variants().subgroups) {
        for block in [BlockType::Q4_0, BlockType::Q4_K] {
            let weight = tensor(block, rows, cols);
            let x: Vec<f32> = noise(8).take(128 * cols).collect();
            let all = product(&gpu, (&weight, None), &x);
            for n in 1..=128 {
                let some = product(&gpu, (&weight, None), &x[..n * cols]);
                assert!(some == all[..n * rows], "{block} ({}), {n} rows", gpu.kernels());
            }
        }
    }
}

#[test]
fn matrices_that_lie_together_are_one_product_with_the_same_bits() {
    for gpu in gpus() {
        let (cols, n) = (256 * 3, 19);
        let x: Vec<f32> = noise(4).take(n * cols).collect();
        // Two that lie together, and one of another type; with a bias each, or without.
        for types in [[BlockType::Q4_0; 3], [BlockType::Q4_K, BlockType::Q4_K, BlockType::Q6_K]] {
            for biased in [false, true] {
                let weights: Vec<_> = types
                    .into_iter()
                    .zip([50, 7, 33])
                    .map(|(block, rows)| {
                        let bias = biased.then(|| tensor(BlockType::F32, 1, rows));
                        (tensor(block, rows, cols), bias)
                    })
                    .collect();
                let matrices = gpu.matrices(&weights).unwrap();
                assert!(matrices[1].follows(&matrices[0]) && !matrices[0].follows(&matrices[1]));
                assert_eq!(matrices[2].follows(&matrices[1]), types[1] == types[2]);
                for n in [1, 8, n] {
                    let mut from = gpu.buffer(cols);
                    let mut outs = [50, 7, 33].map(|rows| gpu.buffer(rows));
                    plain(&gpu, n, |pass| {
                        pass.write(&x[..n * cols], &mut from);
                        let mut to: Vec<_> = matrices.iter().zip(&mut outs).collect();
                        pass.linear(&from, &mut to);
                    });
                    for (matrix, out) in matrices.iter().zip(&outs) {
                        let mut alone = gpu.buffer(out.width);
                        plain(&gpu, n, |pass| pass.linear(&from, &mut [(matrix, &mut alone)]));
                        assert!(read(&gpu, out) == read(&gpu, &alone), "{} {n}", gpu.kernels());
                    }
                }
            }
        }
    }
}

#[test]
fn a_matrix_larger_than_a_binding_is_split_by_rows() {
    let Some(adapter) = adapter() else { return };
    let mut gpu = Gpu::with(&adapter, Variants::default()).unwrap();
    let weight = tensor(BlockType::Q6_K, 50, 256);
    let bias = tensor(BlockType::F32, 1, 50);
    let x: Vec<f32> = noise(3).take(3 * 256).collect();
    let whole = product(&gpu, (&weight, Some(&bias)), &x);
    let table = embedded(&gpu, &weight, 50);
    gpu.part_limit = 224 * 17;
    assert_eq!(gpu.parts(&weight).unwrap().parts.len(), 3);
    assert_eq!(product(&gpu, (&weight, Some(&bias)), &x), whole);
    assert_eq!(embedded(&gpu, &weight, 50), table);
    gpu.part_limit = 223;
    gpu.uploads = Mutex::default();
    let error = gpu.matrix(&weight, None).unwrap_err().to_string();
    assert!(error.contains("tensor `t` has rows of 224 bytes"), "{error}");
}

fn embedded<B: Backend>(backend: &B, table: &SharedTensor, n: usize) -> Vec<f32> {
    let embedding = backend.embedding(table).unwrap();
    let mut out = backend.buffer(table.view().cols);
    plain(backend, n, |pass| pass.embed(&embedding, &mut out));
    read(backend, &out)
}

#[test]
fn embedding_rows_are_those_of_the_scalar_code() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    for block in BlockType::READABLE {
        let cols = if block.block_len() == 1 { 45 } else { block.block_len() * 3 };
        let table = tensor(block, 9, cols);
        let (out, exact) = (embedded(&gpu, &table, 9), floats(&table));
        for (i, (x, e)) in out.iter().zip(&exact).enumerate() {
            // Scales and minima are multiplied in another order.
            assert!((x - e).abs() <= 1e-6 * (1.0 + e.abs()), "{block} at {i}: {x}, not {e}");
        }
        assert_eq!(out.len(), exact.len());
    }
}

/// Norms, SwiGLU, ReLU, gather and hand-over of some rows.
fn small_verbs<B: Backend>(backend: &B, width: usize) -> Vec<f32> {
    let weight = backend.vector(&tensor(BlockType::F32, 1, width)).unwrap();
    let x: Vec<f32> = noise(5).take(6 * width).map(|x| 40.0 * x + 3.0).collect();
    let [mut a, mut b, mut c, mut d] = [(); 4].map(|()| backend.buffer(width));
    plain(backend, 6, |pass| {
        pass.write(&x, &mut a);
        pass.rms_norm(&a, &weight, 1e-5, &mut b);
        pass.layer_norm(&a, &weight, &weight, 1e-5, &mut d);
        pass.relu(&mut d);
        pass.swiglu(&mut a, &b);
        pass.gather(&a, &[5, 0, 3], &mut c);
    });
    let mut out = read(backend, &b);
    out.extend(read(backend, &c));
    out.extend(read(backend, &d));
    out
}

#[test]
fn small_verbs_are_those_of_the_cpu() {
    let cpu = Cpu::new(1).unwrap();
    for gpu in gpus() {
        for width in [64, 100, 1030] {
            let exact: Vec<f64> = small_verbs(&cpu, width).into_iter().map(f64::from).collect();
            let error = nmse(&small_verbs(&gpu, width), &exact);
            assert!(error < 1e-12, "{width} wide ({}): {error:.1e}", gpu.kernels());
        }
    }
}

/// The shape of an attention.
#[derive(Debug, Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rotated: usize,
    pairs: RotaryPairs,
    cache_type: CacheType,
    window: Option<usize>,
}

/// Evaluates rows in a cache, `at_a_time` rows to a pass: a line, then a tree whose rows are given
/// by their parents. Returns what attention gives for the tree's rows.
fn attention<B: Backend>(
    backend: &B,
    h: Heads,
    line: usize,
    parents: &[Option<usize>],
    at_a_time: usize,
) -> Vec<f32> {
    let Heads { heads, kv_heads, head_dim, rotated, .. } = h;
    let mut cache =
        backend.cache(CacheShape { layers: 1, kv_heads, head_dim, cache_type: h.cache_type });
    let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let mut paths: Vec<u128> = Vec::new();
    for (i, parent) in parents.iter().enumerate() {
        paths.push(parent.map_or(0, |p| paths[p]) | 1 << i);
    }
    let mut out = Vec::new();
    let mut run = |line: usize, slot: usize, positions: &[usize], paths: &[u128]| {
        let n = positions.len();
        let angle =
            |p: usize, i: usize| (p as f64 / 50f64.powf(i as f64 / rotated as f64)).sin_cos();
        let rotations: Vec<[f32; 2]> = positions
            .iter()
            .flat_map(|&p| (0..rotated / 2).map(move |i| angle(p, i)))
            .map(|(s, c)| [c as f32, s as f32])
            .collect();
        let tokens = vec![0; n];
        let rows = Rows { tokens: &tokens, line, first_slot: slot, paths, rotations: &rotations };
        let [mut q, mut a] = [(); 2].map(|()| backend.buffer(q_width));
        let [mut k, mut v] = [(); 2].map(|()| backend.buffer(kv_width));
        // What a row holds follows from its slot.
        let row = |slot: usize, what: u32, width| noise(1 + slot as u32 * 3 + what).take(width);
        let values = |what, width| -> Vec<f32> {
            (slot..slot + n).flat_map(|slot| row(slot, what, width)).collect()
        };
        backend
            .pass(&rows, 1 << 20, |pass| {
                pass.write(&values(0, q_width), &mut q);
                pass.write(&values(1, kv_width), &mut k);
                pass.write(&values(2, kv_width), &mut v);
                pass.rotate_and_store(&mut q, &mut k, &v, h.pairs, &mut cache, 0);
                pass.attend(&q, &cache, 0, h.window, &mut a);
                Ok(())
            })
            .unwrap();
        read(backend, &a)
    };
    for start in (0..line).step_by(100) {
        let n = 100.min(line - start);
        let positions: Vec<_> = (start..start + n).collect();
        let chain: Vec<u128> = (0..n).map(|i| (1 << i) | ((1 << i) - 1)).collect();
        run(start, start, &positions, &chain);
    }
    for first in (0..paths.len()).step_by(at_a_time) {
        let paths = &paths[first..paths.len().min(first + at_a_time)];
        let positions: Vec<_> =
            paths.iter().map(|path| line + path.count_ones() as usize - 1).collect();
        out.extend(run(line, line + first, &positions, paths));
    }
    out
}

#[test]
fn attention_is_the_cpus_and_does_not_depend_on_its_neighbours() {
    let cpu = Cpu::new(1).unwrap();
    let gpus = gpus();
    let Some(gpu) = gpus.first() else { return };
    // A tree with branches and abandoned rows.
    let parents: Vec<Option<usize>> = (0..23usize)
        .map(|i| match i % 5 {
            0 => i.checked_sub(7),
            1 => i.checked_sub(1),
            _ => i.checked_sub(2),
        })
        .collect();
    // A chain so long that its rows share what they read.
    let chain: Vec<Option<usize>> = (0..39usize).map(|i| i.checked_sub(1)).collect();
    let usual = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        rotated: 32,
        pairs: RotaryPairs::Interleaved,
        cache_type: CacheType::F16,
        window: None,
    };
    for h in [
        usual,
        Heads { window: Some(9), ..usual },
        Heads { window: Some(300), ..usual },
        Heads { pairs: RotaryPairs::Halves, cache_type: CacheType::F32, ..usual },
        Heads { head_dim: 160, rotated: 60, heads: 2, kv_heads: 1, ..usual },
        Heads { head_dim: 6, rotated: 4, pairs: RotaryPairs::Halves, ..usual },
    ] {
        // Within a split, at the edge of one, and over several.
        for (line, parents) in
            [0, 5, 250, 700].into_iter().flat_map(|n| [(n, &parents), (n, &chain)])
        {
            let exact = attention(&cpu, h, line, parents, 128);
            let exact: Vec<f64> = exact.into_iter().map(f64::from).collect();
            let all = attention(gpu, h, line, parents, 128);
            let error = nmse(&all, &exact);
            // Halves are rounded by the driver.
            let limit = if h.cache_type == CacheType::F16 { 1e-6 } else { 1e-11 };
            assert!(error < limit, "{h:?} after {line}: {error:.1e}");
            for at_a_time in [1, 3] {
                let few = attention(gpu, h, line, parents, at_a_time);
                assert!(few == all, "{h:?} after {line}, {at_a_time} rows at a time");
            }
        }
    }
}

#[test]
fn bytes_that_are_written_along_are_those_of_the_rows() {
    let Some(adapter) = adapter() else { return };
    for words in ["int8", "int8,no-subgroups"] {
        let mut gpu = Gpu::with(&adapter, Variants::parse(words).unwrap()).unwrap();
        let (n, heads, head_dim) = (40, 3, 64);
        let width = heads * head_dim;
        let weight = tensor(BlockType::Q4_0, 40, width);
        let matrix = gpu.matrix(&weight, None).unwrap();
        let scales = gpu.vector(&tensor(BlockType::F32, 1, width)).unwrap();
        let x: Vec<f32> = noise(8).take(n * width).collect();
        let cache_type = CacheType::F16;
        let shape = CacheShape { layers: 1, kv_heads: heads, head_dim, cache_type };
        // Attention over one split; over one for some rows and over two for others; over several, whose sums
        // have no room for all rows at once.
        for (line, partial_limit) in [(2, 1 << 20), (230, 1 << 20), (600, 50_000)] {
            gpu.partial_limit = partial_limit;
            let mut cache = gpu.cache(shape);
            let mut fill =
                |first_slot: usize, n: usize, then: &mut dyn FnMut(&mut GpuPass<'_>, &Cache)| {
                    let paths: Vec<u128> = (0..n).map(|i| (1 << i) | ((1 << i) - 1)).collect();
                    let tokens = vec![0; n];
                    let rows = Rows {
                        tokens: &tokens,
                        line: first_slot,
                        first_slot,
                        paths: &paths,
                        rotations: &[],
                    };
                    let [mut q, mut k, mut v] = [(); 3].map(|()| gpu.buffer(width));
                    let values: Vec<f32> = noise(first_slot as u32).take(n * width).collect();
                    gpu.pass(&rows, 0, |pass| {
                        for buffer in [&mut q, &mut k, &mut v] {
                            pass.write(&values, buffer);
                        }
                        let pairs = RotaryPairs::Halves;
                        pass.rotate_and_store(&mut q, &mut k, &v, pairs, &mut cache, 0);
                        then(pass, &cache);
                        Ok(())
                    })
                    .unwrap();
                };
            (0..line)
                .step_by(100)
                .for_each(|first| fill(first, 100.min(line - first), &mut |_, _| ()));
            let [mut from, mut other, mut rows, mut along, mut anew] =
                [width, width, width, 40, 40].map(|width| gpu.buffer(width));
            for verb in ["layer_norm", "swiglu", "attend"] {
                fill(line, n, &mut |pass, cache| {
                    pass.write(&x, &mut from);
                    pass.write(&x, &mut other);
                    match verb {
                        "layer_norm" => pass.layer_norm(&from, &scales, &scales, 1e-5, &mut rows),
                        "attend" => pass.attend(&from, cache, 0, None, &mut rows),
                        _ => {
                            pass.swiglu(&mut other, &from);
                            std::mem::swap(&mut other, &mut rows);
                        }
                    }
                    assert!(pass.rounded.is_some(), "{verb}");
                    pass.linear(&rows, &mut [(&matrix, &mut along)]);
                });
                // In a pass of their own, rows are rounded anew.
                plain(&gpu, n, |pass| pass.linear(&rows, &mut [(&matrix, &mut anew)]));
                let (along, anew) = (read(&gpu, &along), read(&gpu, &anew));
                assert!(along == anew, "{verb} after {line} ({words})");
                assert!(along.chunks(40).all(|row| row.iter().any(|x| *x != 0.0)));
            }
        }
    }
}

/// The verbs of a Llama layer and of what follows the last, over `n` rows that see themselves alone.
struct Layer {
    width: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    /// Of queries and keys, of values, and of the others.
    types: [BlockType; 3],
    biased: bool,
    pairs: RotaryPairs,
    /// Elements of a head that are rotated, of 32.
    rotated: usize,
    cache_type: CacheType,
}

/// Returns the rows after the layer, its logits, and what it left in the cache.
fn layer<B: Backend>(backend: &B, l: &Layer, n: usize) -> (Vec<f32>, Vec<f32>, Vec<u8>) {
    let (q_width, kv_width) = (l.heads * 32, l.kv_heads * 32);
    let weight = |block, rows, cols| (tensor(block, rows, cols), None::<SharedTensor>);
    let biased = |(weight, _): (SharedTensor, _)| {
        let bias = l.biased.then(|| tensor(BlockType::F32, 1, weight.view().rows));
        (weight, bias)
    };
    let [qk, v, others] = l.types;
    let shapes = [(qk, q_width), (qk, kv_width), (v, kv_width)];
    let qkv: Vec<_> = shapes.map(|(t, rows)| biased(weight(t, rows, l.width))).into();
    let qkv = backend.matrices(&qkv).unwrap();
    // (Of two tensors alike one would be there once.)
    let gates = [(); 2].map(|()| biased(weight(others, l.ffn, l.width)));
    let gates = backend.matrices(&gates).unwrap();
    let matrix = |rows, cols| {
        let (weight, bias) = biased(weight(others, rows, cols));
        backend.matrix(&weight, bias.as_ref()).unwrap()
    };
    let (o, down) = (matrix(l.width, q_width), matrix(l.width, l.ffn));
    let output = matrix(45, l.width);
    let norm = backend.vector(&tensor(BlockType::F32, 1, l.width)).unwrap();
    let shape =
        CacheShape { layers: 1, kv_heads: l.kv_heads, head_dim: 32, cache_type: l.cache_type };
    let mut cache = backend.cache(shape);
    let [mut x, mut normed] = [(); 2].map(|()| backend.buffer(l.width));
    let [mut q, mut attended] = [(); 2].map(|()| backend.buffer(q_width));
    let [mut k, mut v] = [(); 2].map(|()| backend.buffer(kv_width));
    let [mut gate, mut up] = [(); 2].map(|()| backend.buffer(l.ffn));
    let mut logits = backend.buffer(45);
    let paths: Vec<u128> = (0..n).map(|i| 1 << i).collect();
    let rotations: Vec<[f32; 2]> =
        (0..n * l.rotated / 2).map(|i| (i as f32).sin_cos().into()).collect();
    let tokens = vec![0; n];
    let rows =
        Rows { tokens: &tokens, line: 0, first_slot: 0, paths: &paths, rotations: &rotations };
    let input: Vec<f32> = noise(2).take(n * l.width).collect();
    backend
        .pass(&rows, 1 << 20, |pass| {
            pass.write(&input, &mut x);
            pass.rms_norm(&x, &norm, 1e-2, &mut normed);
            let to = [&mut q, &mut k, &mut v];
            pass.linear(&normed, &mut qkv.iter().zip(to).collect::<Vec<_>>());
            pass.rotate_and_store(&mut q, &mut k, &v, l.pairs, &mut cache, 0);
            pass.attend(&q, &cache, 0, None, &mut attended);
            pass.linear_add(&attended, &o, &mut x);
            pass.rms_norm(&x, &norm, 1e-2, &mut normed);
            pass.linear(&normed, &mut [(&gates[0], &mut gate), (&gates[1], &mut up)]);
            pass.swiglu(&mut gate, &up);
            pass.linear_add(&gate, &down, &mut x);
            pass.rms_norm(&x, &norm, 1e-2, &mut normed);
            pass.linear(&normed, &mut [(&output, &mut logits)]);
            Ok(())
        })
        .unwrap();
    let mut saved = Vec::new();
    backend.save_rows(&cache, 0..n, &mut saved).unwrap();
    (read(backend, &x), read(backend, &logits), saved)
}

#[test]
fn a_norm_that_a_product_took_is_not_read_again() {
    let Some(adapter) = adapter() else { return };
    let gpu = Gpu::with(&adapter, Variants::parse("int8").unwrap()).unwrap();
    let [weight, floats] = [BlockType::Q4_0, BlockType::F16].map(|t| tensor(t, 32, 32));
    let [matrix, floats] = [&weight, &floats].map(|t| gpu.matrix(t, None).unwrap());
    let norm = gpu.vector(&tensor(BlockType::F32, 1, 32)).unwrap();
    let [mut x, mut normed, mut a, mut b] = [(); 4].map(|()| gpu.buffer(32));
    let rows = Rows { tokens: &[0], line: 0, first_slot: 0, paths: &[1], rotations: &[] };
    let mut pass = |again: bool| {
        gpu.pass(&rows, 1, |pass| {
            pass.write(&[1.0; 32], &mut x);
            pass.rms_norm(&x, &norm, 1e-5, &mut normed);
            pass.linear(&normed, &mut [(&matrix, &mut a)]);
            if again {
                pass.linear(&normed, &mut [(&floats, &mut b)]);
            }
            Ok(())
        })
    };
    let error = pass(true).unwrap_err();
    assert!(matches!(&error, Error::Device { what, .. } if what.contains("a norm")), "{error}");
    pass(false).unwrap();
}

#[test]
fn verbs_that_products_do_as_well_give_the_bits_that_they_give_alone() {
    use BlockType::{Q4_0, Q4_K, Q6_K, Q8_0};
    let Some(adapter) = adapter() else { return };
    let cpu = Cpu::new(1).unwrap();
    let small = Layer {
        width: 96,
        heads: 3,
        kv_heads: 1,
        ffn: 160,
        types: [Q4_0, Q4_0, Q8_0],
        biased: true,
        pairs: RotaryPairs::Interleaved,
        rotated: 32,
        cache_type: CacheType::F16,
    };
    let large = Layer {
        width: 512,
        heads: 8,
        kv_heads: 2,
        ffn: 512,
        types: [Q4_K, Q6_K, Q4_K],
        biased: false,
        pairs: RotaryPairs::Halves,
        rotated: 24,
        cache_type: CacheType::F32,
    };
    let halves = Layer { pairs: RotaryPairs::Halves, cache_type: CacheType::F32, ..small };
    let part = Layer { rotated: 20, types: [Q8_0, Q4_0, Q4_0], ..halves };
    // Pairs that do not come in twos are rotated on their own.
    let odd = Layer { rotated: 6, pairs: RotaryPairs::Halves, ..small };
    for (words, layers) in [
        ("int8", &[&small, &large, &halves, &part, &odd][..]),
        ("int8,no-subgroups", &[&small]),
        ("int8,padded", &[&large]),
    ] {
        let fused = Gpu::with(&adapter, Variants::parse(words).unwrap()).unwrap();
        let apart = Variants { fused: false, ..fused.variants() };
        let apart = Gpu::with(&adapter, apart).unwrap();
        for (i, l) in layers.iter().enumerate() {
            let exact: Vec<f64> = layer(&cpu, l, 19).1.into_iter().map(f64::from).collect();
            let all = layer(&fused, l, 19);
            let error = nmse(&all.1, &exact);
            assert!(error < 1e-3, "{words}, layer {i}: {error:.1e}");
            for n in [1, 2, 3, 8, 9, 19] {
                let some = layer(&fused, l, n);
                assert!(some == layer(&apart, l, n), "{words}, layer {i}, {n} rows");
                assert!(some.1 == all.1[..n * 45], "{words}, layer {i}, {n} rows of 19");
            }
        }
        // They were done so, as far as the device can tell.
        if fused.time_kernels() {
            layer(&fused, layers[0], 8);
            let names: Vec<_> = fused.kernel_times().into_iter().map(|(name, ..)| name).collect();
            for ending in [", norm", ", swiglu", ", rotate_store"] {
                assert!(names.iter().any(|name| name.contains(ending)), "{ending} in {names:?}");
            }
            assert!(!names.iter().any(|name| name == "rotate_store" || name == "swiglu"));
        }
    }
}

#[test]
fn a_committed_row_reads_as_it_did_in_the_tree() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    for cache_type in [CacheType::F16, CacheType::F32] {
        let shape = CacheShape { layers: 2, kv_heads: 1, head_dim: 8, cache_type };
        let mut cache = gpu.cache(shape);
        let words = cache.words();
        for layer in &mut cache.layers {
            *layer = Some([(); 2].map(|()| gpu.device.storage(4 * 6 * words as u64)));
            for storage in layer.iter().flatten() {
                let rows: Vec<f32> = (0..6 * words).map(|i| (i / words) as f32).collect();
                gpu.device.write(storage, 0, &rows);
            }
        }
        gpu.move_rows(&mut cache, &[(3, 1), (4, 2), (2, 0)]).unwrap();
        for storage in cache.layers.iter().flatten().flatten() {
            let mut rows = Vec::new();
            gpu.device.read(storage, 6 * words, &mut rows).unwrap();
            let first: Vec<f32> = rows.chunks(words).map(|row| row[0]).collect();
            assert_eq!(first, [4.0, 3.0, 4.0, 3.0, 4.0, 5.0]);
            assert!(rows.chunks(words).all(|row| row.iter().all(|x| *x == row[0])));
        }
    }
}

#[test]
fn heads_that_do_not_fit_are_refused_and_nothing_breaks() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    let shape = CacheShape { layers: 1, kv_heads: 1, head_dim: 512, cache_type: CacheType::F16 };
    let mut cache = gpu.cache(shape);
    let [mut q, mut k, mut v, mut out] = [(); 4].map(|()| gpu.buffer(512));
    let rows = Rows { tokens: &[0], line: 0, first_slot: 0, paths: &[1], rotations: &[[1.0, 0.0]] };
    let error = gpu
        .pass(&rows, 1, |pass| {
            for buffer in [&mut q, &mut k, &mut v] {
                pass.write(&[0.0; 512], buffer);
            }
            pass.rotate_and_store(&mut q, &mut k, &v, RotaryPairs::Halves, &mut cache, 0);
            pass.attend(&q, &cache, 0, None, &mut out);
            Ok(())
        })
        .unwrap_err();
    assert!(matches!(&error, Error::Device { what, .. } if what.contains("not of 512")), "{error}");
    // The next pass is none the worse for it.
    small_verbs(&gpu, 64);
}

#[test]
fn a_destroyed_device_is_lost_and_says_so() {
    let Some(adapter) = adapter() else { return };
    let gpu = Gpu::with(&adapter, Variants::default()).unwrap();
    small_verbs(&gpu, 64);
    gpu.destroy();
    let mut buffer = gpu.buffer(64);
    let rows = Rows { tokens: &[0], line: 0, first_slot: 0, paths: &[1], rotations: &[] };
    let lost = gpu.pass(&rows, 1, |pass| {
        pass.write(&[0.0; 64], &mut buffer);
        Ok(())
    });
    assert!(matches!(lost, Err(Error::DeviceLost { .. })), "{lost:?}");
}

#[test]
fn names_choose_adapters() {
    let adapters = Adapter::all();
    for (i, adapter) in adapters.iter().enumerate() {
        assert_eq!(Adapter::named(&adapters, &format!("gpu:{i}")).unwrap().name(), adapter.name());
        let part = adapter.name().to_uppercase();
        assert_eq!(Adapter::named(&adapters, &part).unwrap().name(), adapter.name());
    }
    for name in ["gpu:99", "gpu:x", "", "no such device", "gpux"] {
        let error = Adapter::named(&adapters, name).unwrap_err().to_string();
        assert!(error.contains("there is `cpu`"), "{error}");
    }
    // Software runs only if it is asked for.
    let software: Vec<_> = adapters.into_iter().filter(Adapter::is_software).collect();
    assert!(Adapter::named(&software, "gpu").is_err());
    assert!(Adapter::best(&software).is_none());
}

#[test]
fn variants_are_read_from_words() {
    assert_eq!(Variants::parse("").unwrap(), Variants::default());
    let arithmetic = Some(Arithmetic::Int8);
    let all = Variants { subgroups: false, arithmetic, tiles: false, padded: true, fused: false };
    assert_eq!(Variants::parse("no-subgroups, int8,no-tiles,padded,no-fused").unwrap(), all);
    assert_eq!(Variants::parse("int8,f16").unwrap().arithmetic, Some(Arithmetic::F16));
    assert!(Variants::parse("fast").unwrap_err().to_string().contains("MTAD_GPU has `fast`"));
}

#[test]
fn the_largest_of_rows_are_those_of_a_sort() {
    let Some(gpu) = gpus().into_iter().next() else { return };
    for (width, k) in [(5, 5), (300, 5), (2051, 5), (2051, 64), (30_000, 1), (40_000, 64)] {
        // Few different values, so that there are ties.
        let mut x: Vec<f32> =
            noise(9).take(3 * width).map(|x| (x * width as f32 / 8.0).round() + 0.0).collect();
        let mut buffer = gpu.buffer(width);
        let temperature = 1.5;
        let mut find = |x: &[f32]| {
            plain(&gpu, 3, |pass| pass.write(x, &mut buffer));
            let mut largest = Largest::default();
            let found = gpu.read_largest(&buffer, k, temperature, &mut largest).unwrap();
            (found, largest)
        };
        let (found, largest) = find(&x);
        assert!(found);
        for (i, row) in x.chunks(width).enumerate() {
            let mut all: Vec<_> = (0..).zip(row.iter().copied()).collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            assert_eq!(largest.top[i * k..][..k], all[..k], "{width} wide, row {i}");
            let most = f64::from(all[0].1);
            let exponents = row.iter().map(|&x| ((f64::from(x) - most) / 1.5).exp());
            let exact = most / 1.5 + exponents.sum::<f64>().ln();
            assert!((largest.log_sum_exp[i] - exact).abs() < 1e-5 * (1.0 + exact.abs()));
        }
        // What is not a number is left to who reads the rows.
        x[width + 2] = f32::NAN;
        assert!(!find(&x).0);
        assert!(
            !gpu.read_largest(&buffer, MOST_LARGEST + 1, 1.0, &mut Largest::default()).unwrap()
        );
    }
}
