//! Every operation against the CPU's, or against exact arithmetic where the CPU rounds.
//!
//! They run on any adapter, the software one included. Without one they are skipped, and say so;
//! with `MTAD_REQUIRE_GPU` set that is a failure. With `MTAD_ALL_SHADERS=1` every weight type is tried with every
//! kind of kernel, which takes its time: else some of each.

use std::collections::HashMap;

use super::fuse::{Epilogue, RowClass, Step};
use super::*;
use crate::exec::cpu::Cpu;
use crate::exec::{CacheType, KvCache, Rows, Segment, Workspace};
use crate::gguf::{Gguf, SharedTensor, Writer};
use crate::graph::{
    Activation, Attention, BufferId, Builder, Gating, KvShape, Norm, NormKind, RotaryPairs,
    RotaryTable,
};
use crate::lm::TopK;
use BlockType::{F16, F32, Q4_0, Q4_K, Q6_K, Q8_0};

/// Whether everything is to be tried.
pub(super) fn all_kernels() -> bool {
    std::env::var_os("MTAD_ALL_SHADERS").is_some_and(|v| v == "1")
}

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

/// The adapter opened for this test alone.
fn open(words: &str) -> Option<Gpu> {
    Some(Gpu::with(&adapter()?, Variants::parse(words).unwrap()).unwrap())
}

/// The adapter with some variants, opened once for all tests: kernels are compiled once.
fn gpu(words: &str) -> Option<Arc<Gpu>> {
    static OPEN: Mutex<Option<HashMap<String, Arc<Gpu>>>> = Mutex::new(None);
    let mut open_ones = lock(&OPEN);
    let open_ones = open_ones.get_or_insert_default();
    if !open_ones.contains_key(words) {
        open_ones.insert(words.to_owned(), Arc::new(open(words)?));
    }
    open_ones.get(words).cloned()
}

/// The adapter with each variant forced.
fn gpus() -> Vec<Arc<Gpu>> {
    let Some(adapter) = adapter() else { return Vec::new() };
    ["f32", "f32,no-subgroups", "int8", "int8,no-subgroups", "f16", "f16,no-subgroups"]
        .into_iter()
        .filter(|words| !words.starts_with("f16") || adapter.has_f16())
        .filter_map(gpu)
        .collect()
}

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(1).unwrap())
}

/// Numbers from -1 to 1.
fn noise(seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// A tensor of the given bytes.
fn tensor_of(block: BlockType, rows: usize, cols: usize, bytes: Vec<u8>) -> SharedTensor {
    let mut writer = Writer::new();
    writer.set("general.architecture", "test");
    writer.tensor("t", &[cols as u64, rows as u64], block, bytes);
    let file = Arc::new(Gguf::from_vec("test.gguf", writer.to_vec()).unwrap());
    SharedTensor::find(&file, "t").unwrap()
}

/// A tensor of random weights.
pub(super) fn tensor(block: BlockType, rows: usize, cols: usize) -> SharedTensor {
    let mut next = noise(rows as u32 * 31 + cols as u32);
    let mut random = || next.next().unwrap();
    let mut bytes = Vec::new();
    for _ in 0..rows * cols / block.block_len() {
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
    tensor_of(block, rows, cols, bytes)
}

/// Rows that tokens stand for.
fn table(rows: &[f32], cols: usize) -> SharedTensor {
    tensor_of(F32, rows.len() / cols, cols, bytemuck::cast_slice(rows).to_vec())
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

fn doubles(x: Vec<f32>) -> Vec<f64> {
    x.into_iter().map(f64::from).collect()
}

/// A program whose logits are the rows that `body` makes.
pub(super) fn program(body: impl FnOnce(&mut Builder) -> BufferId) -> Arc<Program> {
    let mut builder = Builder::new("test.gguf", 4096);
    let rows = body(&mut builder);
    let rows = builder.select_rows(rows);
    Arc::new(builder.finish(rows).unwrap())
}

/// Embeds rows of a tensor.
pub(super) fn embedded(b: &mut Builder, tensor: &SharedTensor) -> BufferId {
    let table = b.table(tensor.clone());
    b.embed(table, 1.0).unwrap()
}

fn load<E: Executor + 'static>(
    executor: &Arc<E>,
    program: &Arc<Program>,
    ops: Range<usize>,
) -> Box<dyn Stage> {
    executor.clone().load(program, ops, &mut |_| Ok(())).unwrap()
}

/// What some sequences evaluate: of each its line, its first slot, and the ancestors of its rows.
type Sequences<'a> = &'a [(usize, usize, Vec<u128>)];

/// Some operations of a program with what they run in.
struct Runner {
    program: Arc<Program>,
    stage: Box<dyn Stage>,
    workspace: Box<dyn Workspace>,
}

impl Runner {
    fn new<E: Executor + 'static>(executor: &Arc<E>, program: &Arc<Program>) -> Self {
        Self::part(executor, program, 0..program.ops.len())
    }

    fn part<E: Executor + 'static>(
        executor: &Arc<E>,
        program: &Arc<Program>,
        ops: Range<usize>,
    ) -> Self {
        let stage = load(executor, program, ops);
        let workspace = stage.workspace();
        Runner { program: program.clone(), stage, workspace }
    }

    /// Runs rows of some sequences, all of which are wanted.
    fn run(&mut self, tokens: &[u32], sequences: Sequences<'_>, caches: &mut [&mut dyn KvCache]) {
        let mut segments = Vec::new();
        let mut ancestors = Vec::new();
        for (line, first_slot, rows) in sequences {
            let first = ancestors.len();
            ancestors.extend_from_slice(rows);
            let (line, first_slot) = (*line, *first_slot);
            segments.push(Segment { rows: first..ancestors.len(), line, first_slot });
        }
        let mut rotations = vec![Vec::new(); self.program.rotaries.len()];
        for segment in &segments {
            for row in segment.rows.clone() {
                let position = segment.position(row, &ancestors) as f64;
                for (table, into) in self.program.rotaries.iter().zip(&mut rotations) {
                    into.extend(table.frequencies.iter().map(|frequency| {
                        let (sin, cos) = (position * frequency).sin_cos();
                        [cos as f32, sin as f32]
                    }));
                }
            }
        }
        let wanted: Vec<u32> = (0..tokens.len() as u32).collect();
        let (segments, ancestors, wanted) = (&segments[..], &ancestors[..], &wanted[..]);
        let rows = Rows { tokens, segments, ancestors, rotations: &rotations, wanted };
        self.stage.run(&rows, caches, &mut *self.workspace).unwrap();
    }

    fn read(&mut self, buffer: BufferId, rows: usize) -> Vec<f32> {
        self.workspace.read(buffer, 0..rows, &mut Vec::new()).unwrap().to_vec()
    }

    fn logits(&mut self, rows: usize) -> Vec<f32> {
        self.read(self.program.logits, rows)
    }

    /// The logits of rows that see themselves alone, without a cache.
    fn alone(&mut self, tokens: &[u32]) -> Vec<f32> {
        let paths = (0..tokens.len()).map(|i| 1 << i).collect();
        self.run(tokens, &[(0, 0, paths)], &mut []);
        self.logits(tokens.len())
    }
}

fn numbers(n: usize) -> Vec<u32> {
    (0..n as u32).collect()
}

/// Rows times a matrix, twice: added once more, without its bias it would not be twice as much.
fn product(weight: &SharedTensor, bias: Option<&SharedTensor>, x: &[f32]) -> Arc<Program> {
    program(|b| {
        let x = embedded(b, &table(x, weight.view().cols));
        let matrix = b.matrix(weight.clone(), bias.cloned()).unwrap();
        let [out] = b.linear(x, [matrix]).unwrap();
        b.linear_add(x, matrix, out).unwrap();
        out
    })
}

#[test]
fn products_of_every_type_are_exact_and_do_not_depend_on_the_number_of_rows() {
    for gpu in gpus() {
        let types: &[_] = match gpu.variants() {
            Variants {
                subgroups: true,
                arithmetic: Some(Arithmetic::F32 | Arithmetic::Int8),
                ..
            } if all_kernels() => &BlockType::READABLE,
            // Compiling takes its time; these have one of each kind.
            _ => &[F16, Q4_0, Q4_K, Q6_K],
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
            let bias = tensor(F32, 1, rows);
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
            let mut runner = Runner::new(&gpu, &product(&weight, Some(&bias), &x));
            let all = runner.alone(&numbers(n));
            let limit = match gpu.arithmetic_with(block) {
                Arithmetic::F32 => 1e-11,
                Arithmetic::Int8 => 1e-4,
                Arithmetic::F16 => 1e-5,
            };
            let error = nmse(&all, &exact);
            assert!(error < limit, "{block} ({}): {error:.1e}", gpu.kernels());
            for width in [1, 2, 3, 5, 8, 9, 16, 17, 32] {
                let mut few = Vec::new();
                for tokens in numbers(n).chunks(width) {
                    few.extend(runner.alone(tokens));
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
        for block in [Q4_0, Q4_K] {
            let x: Vec<f32> = noise(8).take(128 * cols).collect();
            let mut runner = Runner::new(&gpu, &product(&tensor(block, rows, cols), None, &x));
            let all = runner.alone(&numbers(128));
            for n in 1..=128 {
                let some = runner.alone(&numbers(n));
                assert!(some == all[..n * rows], "{block} ({}), {n} rows", gpu.kernels());
            }
        }
    }
}

#[test]
fn matrices_that_lie_together_are_one_product_with_the_same_bits() {
    for gpu in gpus() {
        let (cols, n) = (256 * 3, 19);
        let x = table(&noise(4).take(n * cols).collect::<Vec<_>>(), cols);
        // Two that lie together, and one of another type; with a bias each, or without.
        for types in [[Q4_0; 3], [Q4_K, Q4_K, Q6_K]] {
            for biased in [false, true] {
                let rows = [50, 7, 33];
                let tensors = [0, 1, 2].map(|i| tensor(types[i], rows[i], cols));
                let biases = rows.map(|rows| biased.then(|| tensor(F32, 1, rows)));
                let build = |which: &[usize], out: usize| {
                    program(|b| {
                        let x = embedded(b, &x);
                        let mut matrix =
                            |i: usize| b.matrix(tensors[i].clone(), biases[i].clone()).unwrap();
                        match which {
                            [i] => {
                                let matrix = matrix(*i);
                                b.linear(x, [matrix]).unwrap()[0]
                            }
                            _ => {
                                let matrices = [0, 1, 2].map(&mut matrix);
                                b.linear(x, matrices).unwrap()[out]
                            }
                        }
                    })
                };
                for out in 0..3 {
                    let together = build(&[0, 1, 2], out);
                    let ops = 0..together.ops.len();
                    let stage = GpuStage::load(gpu.clone(), &together, ops, &mut |_| Ok(()));
                    let plan = stage.unwrap();
                    let plan = plan.plan(RowClass::default());
                    let products = plan.iter().filter(|step| matches!(step, Step::Product(_)));
                    assert_eq!(products.count(), if types[1] == types[2] { 1 } else { 2 });
                    let mut together = Runner::new(&gpu, &together);
                    let mut alone = Runner::new(&gpu, &build(&[out], out));
                    for n in [1, 8, n] {
                        let (a, b) = (together.alone(&numbers(n)), alone.alone(&numbers(n)));
                        assert!(a == b, "{} {n}", gpu.kernels());
                    }
                }
            }
        }
    }
}

#[test]
fn a_matrix_larger_than_a_binding_is_split_by_rows() {
    let Some(mut gpu) = open("") else { return };
    let weight = tensor(Q6_K, 50, 256);
    let bias = tensor(F32, 1, 50);
    let x: Vec<f32> = noise(3).take(3 * 256).collect();
    let product = product(&weight, Some(&bias), &x);
    let looked_up = program(|b| embedded(b, &weight));
    let results = |gpu: Gpu| {
        let gpu = Arc::new(gpu);
        let product = Runner::new(&gpu, &product).alone(&numbers(3));
        let results = (product, Runner::new(&gpu, &looked_up).alone(&numbers(50)));
        (Arc::into_inner(gpu).expect("all stages are gone"), results)
    };
    let whole;
    (gpu, whole) = results(gpu);
    gpu.part_limit = 224 * 17;
    assert_eq!(gpu.parts(&weight).unwrap().parts.len(), 3);
    let parts;
    (gpu, parts) = results(gpu);
    assert!(parts == whole);
    gpu.part_limit = 223;
    let ops = 0..looked_up.ops.len();
    let error = Arc::new(gpu).load(&looked_up, ops, &mut |_| Ok(())).err().unwrap().to_string();
    assert!(error.contains("tensor `t` has rows of 224 bytes"), "{error}");
}

#[test]
fn views_of_one_place_are_told_apart() {
    let Some(gpu) = gpu("f32") else { return };
    let weight = tensor(F32, 8, 64);
    let part = weight.slice(0..3).unwrap();
    let all = gpu.parts(&weight).unwrap();
    assert!(Arc::ptr_eq(&all, &gpu.parts(&weight).unwrap()));
    assert!(!Arc::ptr_eq(&all, &gpu.parts(&part).unwrap()));
    assert!(Arc::ptr_eq(&all, &gpu.parts(&weight).unwrap()));
}

#[test]
fn embedded_rows_are_those_of_the_scalar_code() {
    let Some(gpu) = gpu("f32") else { return };
    for block in BlockType::READABLE {
        let cols = if block.block_len() == 1 { 45 } else { block.block_len() * 3 };
        let table = tensor(block, 9, cols);
        let program = program(|b| {
            let (rows, positions) = (b.table(table.clone()), b.table(table.clone()));
            let x = b.embed(rows, 3.0).unwrap();
            // All rows have position 0.
            b.add_positions(positions, x).unwrap();
            x
        });
        let (out, exact) = (Runner::new(&gpu, &program).alone(&numbers(9)), floats(&table));
        for (i, (x, e)) in out.iter().zip(&exact).enumerate() {
            let e = 3.0 * e + exact[i % cols];
            // Scales and minima are multiplied in another order.
            assert!((x - e).abs() <= 4e-6 * (1.0 + e.abs()), "{block} at {i}: {x}, not {e}");
        }
        assert_eq!(out.len(), exact.len());
    }
}

/// Each operation that works on rows alone, as a program of its own.
fn small_operations(width: usize) -> Vec<(String, Arc<Program>)> {
    let x: Vec<f32> = noise(5).take(6 * width).map(|x| 40.0 * x + 3.0).collect();
    let y: Vec<f32> = noise(6).take(6 * width).map(|x| 4.0 * x).collect();
    let mut all = Vec::new();
    let mut add = |name: String, body: &dyn Fn(&mut Builder, BufferId, BufferId) -> BufferId| {
        let program = program(|b| {
            let (x, y) = (embedded(b, &table(&x, width)), embedded(b, &table(&y, width)));
            body(b, x, y)
        });
        all.push((name, program));
    };
    for kind in [NormKind::Rms, NormKind::Layer] {
        for (weighted, biased) in [(true, false), (true, true), (false, false)] {
            for (group, each) in [(width, true), (width / 2, false), (width / 2, true)] {
                add(format!("{kind:?} {weighted} {biased} {group} {each}"), &|b, x, _| {
                    let len = if each { group } else { width };
                    let weight = weighted.then(|| b.vector(tensor(F32, 1, len)));
                    let bias = biased.then(|| b.vector(tensor(F32, 1, group)));
                    b.norm(x, Norm { kind, weight, bias, epsilon: 1e-5, group }).unwrap()
                });
            }
        }
    }
    use Activation::{Gelu, GeluTanh, Relu, Silu};
    for activation in [Relu, Silu, Gelu, GeluTanh] {
        add(format!("{activation:?}"), &|b, x, _| {
            b.activate(activation, x);
            x
        });
        add(format!("{activation:?} gate"), &|b, x, y| {
            b.gate(Gating::Activated(activation), x, y).unwrap();
            x
        });
    }
    add("clamped gate".to_owned(), &|b, x, y| {
        b.gate(Gating::Clamped { alpha: 1.7, limit: 7.0 }, x, y).unwrap();
        x
    });
    add("add".to_owned(), &|b, x, y| {
        b.add(x, y, -0.3).unwrap();
        x
    });
    add("scale".to_owned(), &|b, x, _| {
        b.scale(x, 0.7);
        x
    });
    add("soft cap".to_owned(), &|b, x, _| {
        b.soft_cap(x, 10.0);
        x
    });
    all
}

#[test]
fn small_operations_are_those_of_the_cpu() {
    let cpu = cpu();
    for gpu in gpus() {
        for width in [64, 100, 1030] {
            for (name, program) in small_operations(width) {
                let exact = Runner::new(&cpu, &program).alone(&numbers(6));
                let found = Runner::new(&gpu, &program).alone(&numbers(6));
                let error = nmse(&found, &doubles(exact));
                let kernels = gpu.kernels();
                assert!(error < 1e-12, "{name}, {width} wide ({kernels}): {error:.1e}");
            }
        }
    }
}

/// The shape of an attention.
#[derive(Debug, Clone, Copy)]
struct Heads {
    heads: usize,
    kv: KvShape,
    rotated: usize,
    pairs: RotaryPairs,
    cache_type: CacheType,
    window: Option<usize>,
    soft_cap: Option<f32>,
    sinks: bool,
}

impl Heads {
    /// Attention over rows of queries, keys and values that follow from the slot, which is the token.
    fn program(&self, slots: usize) -> Arc<Program> {
        let Heads { heads, kv, rotated, pairs, window, soft_cap, .. } = *self;
        let rows = |what: u32, width: usize| -> Vec<f32> {
            (0..slots as u32).flat_map(|slot| noise(1 + slot * 3 + what).take(width)).collect()
        };
        program(|b| {
            let q_width = heads * kv.head_dim;
            let widths = [q_width, kv.width(), kv.width()];
            let qkv = [0, 1, 2].map(|i| embedded(b, &table(&rows(i as u32, widths[i]), widths[i])));
            let frequency = |i| 50f64.powf(-(i as f64) / rotated as f64);
            let frequencies: Vec<f64> = (0..rotated / 2).map(frequency).collect();
            let rotary = b.rotary(RotaryTable { pairs, frequencies, magnitude: 1.0 });
            let layer = b.begin_layer(kv);
            b.rope_append_kv(qkv, (rotated > 0).then_some(rotary), layer).unwrap();
            let sinks = self.sinks.then(|| b.vector(tensor(F32, 1, heads)));
            let scale = 1.0 / (kv.head_dim as f32).sqrt();
            b.attend(qkv[0], layer, Attention { scale, window, soft_cap, sinks }).unwrap()
        })
    }
}

/// A chain of `n` rows.
fn chain(n: usize) -> Vec<u128> {
    (0..n).map(|i| (1 << i) | ((1 << i) - 1)).collect()
}

/// Evaluates the rows of a line, which follow from their slots, 100 to a pass.
fn fill(runner: &mut Runner, cache: &mut dyn KvCache, line: usize) {
    for start in (0..line).step_by(100) {
        let n = 100.min(line - start);
        let tokens: Vec<u32> = (start..start + n).map(|slot| slot as u32).collect();
        runner.run(&tokens, &[(start, start, chain(n))], &mut [&mut *cache]);
    }
}

/// Evaluates a line, then a tree whose rows are given by their parents, `at_a_time` rows to a pass. Returns what
/// attention gives for the tree's rows.
fn attention(
    runner: &mut Runner,
    cache_type: CacheType,
    line: usize,
    parents: &[Option<usize>],
    at_a_time: usize,
) -> Vec<f32> {
    let mut cache = runner.stage.cache(cache_type);
    let mut paths: Vec<u128> = Vec::new();
    for (i, parent) in parents.iter().enumerate() {
        paths.push(parent.map_or(0, |p| paths[p]) | 1 << i);
    }
    fill(runner, &mut *cache, line);
    let mut out = Vec::new();
    for first in (0..paths.len()).step_by(at_a_time) {
        let paths = paths[first..paths.len().min(first + at_a_time)].to_vec();
        let slots = line + first..line + first + paths.len();
        let tokens: Vec<u32> = slots.clone().map(|slot| slot as u32).collect();
        runner.run(&tokens, &[(line, slots.start, paths)], &mut [&mut *cache]);
        out.extend(runner.logits(tokens.len()));
    }
    out
}

#[test]
fn attention_is_the_cpus_and_does_not_depend_on_its_neighbours() {
    let (cpu, Some(gpu)) = (cpu(), gpu("f32")) else { return };
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
        kv: KvShape { heads: 2, head_dim: 32 },
        rotated: 32,
        pairs: RotaryPairs::Interleaved,
        cache_type: CacheType::F16,
        window: None,
        soft_cap: None,
        sinks: false,
    };
    let long = KvShape { heads: 1, head_dim: 160 };
    let short = KvShape { heads: 2, head_dim: 6 };
    for h in [
        usual,
        Heads { window: Some(9), ..usual },
        Heads { window: Some(300), sinks: true, ..usual },
        Heads { pairs: RotaryPairs::Halves, cache_type: CacheType::F32, ..usual },
        Heads { cache_type: CacheType::F32, soft_cap: Some(0.5), sinks: true, ..usual },
        Heads { cache_type: CacheType::F32, rotated: 0, ..usual },
        Heads { kv: long, rotated: 60, heads: 2, ..usual },
        Heads { kv: short, rotated: 4, pairs: RotaryPairs::Halves, ..usual },
    ] {
        let program = h.program(740);
        let (mut on_cpu, mut on_gpu) = (Runner::new(&cpu, &program), Runner::new(&gpu, &program));
        // Within a split, at the edge of one, and over several.
        for (line, parents) in
            [0, 5, 250, 700].into_iter().flat_map(|n| [(n, &parents), (n, &chain)])
        {
            let exact = attention(&mut on_cpu, h.cache_type, line, parents, 128);
            let all = attention(&mut on_gpu, h.cache_type, line, parents, 128);
            let error = nmse(&all, &doubles(exact));
            // Halves are rounded by the driver.
            let limit = if h.cache_type == CacheType::F16 { 1e-6 } else { 1e-11 };
            assert!(error < limit, "{h:?} after {line}: {error:.1e}");
            for at_a_time in [1, 3] {
                let few = attention(&mut on_gpu, h.cache_type, line, parents, at_a_time);
                assert!(few == all, "{h:?} after {line}, {at_a_time} rows at a time");
            }
        }
    }
}

#[test]
fn bytes_that_are_written_along_are_those_of_the_rows() {
    let (n, kv) = (40, KvShape { heads: 3, head_dim: 64 });
    let width = kv.width();
    let [x, y] =
        [700, 800].map(|seed| table(&noise(seed).take(700 * width).collect::<Vec<f32>>(), width));
    let weight = tensor(Q4_0, 40, width);
    for words in ["int8", "int8,no-subgroups"] {
        // Attention over one split; over one for some rows and over two for others; over several, whose sums
        // have no room for all rows at once.
        for (line, partial_limit) in [(2, 1 << 20), (230, 1 << 20), (600, 50_000)] {
            for operation in ["layer_norm", "gate", "activate", "attend"] {
                if line > 2 && operation != "attend" {
                    continue;
                }
                let Some(mut gpu) = open(words) else { return };
                gpu.partial_limit = partial_limit;
                let gpu = Arc::new(gpu);
                let program = program(|b| {
                    let (x, y, z) = (embedded(b, &x), embedded(b, &y), embedded(b, &y));
                    let made = match operation {
                        "layer_norm" => {
                            let vector = || tensor(F32, 1, width);
                            let (weight, bias) = (b.vector(vector()), b.vector(vector()));
                            let (weight, bias, kind) = (Some(weight), Some(bias), NormKind::Layer);
                            let norm = Norm { kind, weight, bias, epsilon: 1e-5, group: width };
                            b.norm(x, norm).unwrap()
                        }
                        "gate" => {
                            b.gate(Gating::Activated(Activation::Silu), x, y).unwrap();
                            x
                        }
                        "activate" => {
                            b.activate(Activation::Relu, x);
                            x
                        }
                        _ => {
                            let layer = b.begin_layer(kv);
                            b.rope_append_kv([x, y, z], None, layer).unwrap();
                            let (window, soft_cap, sinks) = (None, None, None);
                            let attention = Attention { scale: 0.125, window, soft_cap, sinks };
                            b.attend(x, layer, attention).unwrap()
                        }
                    };
                    let matrix = b.matrix(weight.clone(), None).unwrap();
                    b.linear(made, [matrix]).unwrap()[0]
                });
                let run = |runner: &mut Runner| {
                    let mut cache = runner.stage.cache(CacheType::F16);
                    let mut caches: Vec<&mut dyn KvCache> = vec![&mut *cache];
                    if operation == "attend" {
                        fill(runner, &mut *caches[0], line);
                    }
                    let tokens: Vec<u32> = (line..line + n).map(|slot| slot as u32).collect();
                    runner.run(&tokens, &[(line, line, chain(n))], &mut caches);
                };
                // All in one, and with a cut before the product: there rows are rounded anew.
                let cut = program.ops.len() - 2;
                let all = 0..program.ops.len();
                let stage = GpuStage::load(gpu.clone(), &program, all, &mut |_| Ok(())).unwrap();
                let rounds = |step: &Step| matches!(step, Step::Round { .. });
                assert!(!stage.plan(RowClass::default()).iter().any(rounds), "{operation}");
                let mut whole = Runner::new(&gpu, &program);
                run(&mut whole);
                let along = whole.logits(n);
                let mut first = Runner::part(&gpu, &program, 0..cut);
                run(&mut first);
                let mut second = Runner::part(&gpu, &program, cut..program.ops.len());
                let [live] = program.live_at(cut)[..] else { panic!("one buffer is handed over") };
                second.workspace.write(live, &first.read(live, n)).unwrap();
                let anew = second.alone(&numbers(n));
                assert!(along == anew, "{operation} after {line} ({words})");
                assert!(along.chunks(40).all(|row| row.iter().any(|x| *x != 0.0)));
            }
        }
    }
}

/// Two layers of a Llama.
#[derive(Clone, Copy)]
pub(super) struct Llama {
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub ffn: usize,
    /// Of queries and keys, of values, and of the others.
    pub types: [BlockType; 3],
    pub biased: bool,
    pub pairs: RotaryPairs,
    /// Elements of a head that are rotated, of 32.
    pub rotated: usize,
    pub cache_type: CacheType,
}

pub(super) const SMALL: Llama = Llama {
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

impl Llama {
    pub fn program(&self) -> Arc<Program> {
        let l = self;
        let [qk, v, others] = l.types;
        let kv = KvShape { heads: l.kv_heads, head_dim: 32 };
        let q_width = l.heads * 32;
        let input: Vec<f32> = noise(2).take(400 * l.width).collect();
        program(|b| {
            let matrix = |b: &mut Builder, block, rows, cols| {
                let bias = l.biased.then(|| tensor(F32, 1, rows));
                b.matrix(tensor(block, rows, cols), bias).unwrap()
            };
            let frequencies = (0..l.rotated / 2).map(|i| 1.0 / (1.0 + i as f64)).collect();
            let rotary = b.rotary(RotaryTable { pairs: l.pairs, frequencies, magnitude: 1.0 });
            let norm = b.vector(tensor(F32, 1, l.width));
            let x = embedded(b, &table(&input, l.width));
            for _ in 0..2 {
                let layer = b.begin_layer(kv);
                let normed = b.rms_norm(x, norm, 1e-2).unwrap();
                let qkv = [(qk, q_width), (qk, kv.width()), (v, kv.width())]
                    .map(|(block, rows)| matrix(b, block, rows, l.width));
                let qkv = b.linear(normed, qkv).unwrap();
                b.rope_append_kv(qkv, Some(rotary), layer).unwrap();
                let scale = 1.0 / 32f32.sqrt();
                let attention = Attention { scale, window: None, soft_cap: None, sinks: None };
                let attended = b.attend(qkv[0], layer, attention).unwrap();
                let o = matrix(b, others, l.width, q_width);
                b.linear_add(attended, o, x).unwrap();
                let normed = b.rms_norm(x, norm, 1e-2).unwrap();
                let gates = [(); 2].map(|()| matrix(b, others, l.ffn, l.width));
                let [gate, up] = b.linear(normed, gates).unwrap();
                b.gate(Gating::Activated(Activation::Silu), gate, up).unwrap();
                let down = matrix(b, others, l.width, l.ffn);
                b.linear_add(gate, down, x).unwrap();
            }
            let normed = b.rms_norm(x, norm, 1e-2).unwrap();
            let output = matrix(b, others, 45, l.width);
            b.linear(normed, [output]).unwrap()[0]
        })
    }
}

#[test]
fn operations_that_products_do_as_well_give_the_bits_that_they_give_alone() {
    let cpu = cpu();
    let large = Llama {
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
    let halves = Llama { pairs: RotaryPairs::Halves, cache_type: CacheType::F32, ..SMALL };
    let part = Llama { rotated: 20, types: [Q8_0, Q4_0, Q4_0], ..halves };
    // Pairs that do not come in twos are rotated on their own.
    let odd = Llama { rotated: 6, pairs: RotaryPairs::Halves, ..SMALL };
    for (words, models) in [
        ("int8", &[SMALL, large, halves, part, odd][..]),
        ("int8,no-subgroups", &[SMALL]),
        ("int8,padded", &[large]),
    ] {
        let (Some(fused), Some(apart)) = (gpu(words), gpu(&format!("{words},no-fused"))) else {
            return;
        };
        for (i, l) in models.iter().enumerate() {
            let program = l.program();
            let results = |runner: &mut Runner, n: usize| {
                let mut cache = runner.stage.cache(l.cache_type);
                let paths = (0..n).map(|i| 1 << i).collect();
                runner.run(&numbers(n), &[(0, 0, paths)], &mut [&mut *cache]);
                let mut saved = Vec::new();
                cache.save_rows(0..n, &mut saved).unwrap();
                (runner.logits(n), saved)
            };
            let exact = doubles(results(&mut Runner::new(&cpu, &program), 19).0);
            let mut apart = Runner::new(&apart, &program);
            let mut on_gpu = Runner::new(&fused, &program);
            let all = results(&mut on_gpu, 19);
            let error = nmse(&all.0, &exact);
            assert!(error < 1e-3, "{words}, model {i}: {error:.1e}");
            for n in [1, 2, 3, 8, 9, 19] {
                let some = results(&mut on_gpu, n);
                assert!(some == results(&mut apart, n), "{words}, model {i}, {n} rows");
                assert!(some.0 == all.0[..n * 45], "{words}, model {i}, {n} rows of 19");
            }
        }
        // They were done so.
        let program = models[0].program();
        let ops = 0..program.ops.len();
        let stage = GpuStage::load(fused, &program, ops, &mut |_| Ok(())).unwrap();
        let plan = stage.plan(RowClass::default());
        let count = |is: fn(&Epilogue) -> bool| {
            plan.iter().filter(|s| matches!(s, Step::Product(p) if is(&p.epilogue))).count()
        };
        assert_eq!(count(|e| matches!(e, Epilogue::Norm { .. })), 4);
        assert_eq!(count(|e| matches!(e, Epilogue::Gate { .. })), 2);
        assert!(count(|e| matches!(e, Epilogue::Rope { .. })) >= 2);
    }
}

#[test]
fn rows_of_several_sequences_have_the_bits_that_they_have_alone() {
    for words in ["f32", "int8", "int8,no-fused"] {
        let Some(gpu) = gpu(words) else { return };
        for l in [SMALL, Llama { cache_type: CacheType::F32, rotated: 20, ..SMALL }] {
            let mut runner = Runner::new(&gpu, &l.program());
            // Lines within a split and over several; a row, a tree, a chain whose rows share what they read.
            let tree = vec![0b1, 0b10, 0b101, 0b1010, 0b1_0101];
            let sequences =
                [(3, 3, vec![1]), (0, 0, tree), (300, 300, chain(33)), (256, 260, vec![1 << 4])];
            let mut caches: Vec<_> =
                sequences.iter().map(|_| runner.stage.cache(l.cache_type)).collect();
            for (cache, (line, first_slot, _)) in caches.iter_mut().zip(&sequences) {
                fill(&mut runner, &mut **cache, *line.max(first_slot));
            }
            let (mut alone, mut tokens) = (Vec::new(), Vec::new());
            for (i, (cache, sequence)) in caches.iter_mut().zip(&sequences).enumerate() {
                let of_rows: Vec<u32> =
                    (0..sequence.2.len()).map(|row| (50 * i + row) as u32).collect();
                runner.run(&of_rows, std::slice::from_ref(sequence), &mut [&mut **cache]);
                alone.extend(runner.logits(of_rows.len()));
                tokens.extend(of_rows);
            }
            let mut own: Vec<&mut dyn KvCache> = Vec::new();
            caches.iter_mut().for_each(|cache| own.push(&mut **cache));
            runner.run(&tokens, &sequences, &mut own);
            assert!(runner.logits(tokens.len()) == alone, "{}", gpu.kernels());
            // Fewer of them, so that products have no tiles.
            let few = [sequences[1].clone(), sequences[0].clone()];
            let (first, others) = own.split_at_mut(1);
            let tokens: Vec<u32> = (50..55).chain([0]).collect();
            runner.run(&tokens, &few, &mut [&mut *others[0], &mut *first[0]]);
            let expected = [&alone[45..6 * 45], &alone[..45]].concat();
            assert!(runner.logits(6) == expected, "{}", gpu.kernels());
        }
    }
}

#[test]
fn a_committed_row_reads_as_it_did_in_the_tree() {
    let Some(gpu) = gpu("f32") else { return };
    // Layers of different shapes.
    let shapes = [KvShape { heads: 1, head_dim: 8 }, KvShape { heads: 2, head_dim: 8 }];
    let program = program(|b| {
        let x = embedded(b, &table(&[0.0; 16], 16));
        for kv in shapes {
            let layer = b.begin_layer(kv);
            let matrices = [16, kv.width(), kv.width()]
                .map(|rows| b.matrix(tensor(F32, rows, 16), None).unwrap());
            let qkv = b.linear(x, matrices).unwrap();
            b.rope_append_kv(qkv, None, layer).unwrap();
        }
        x
    });
    let stage = load(&gpu, &program, 0..program.ops.len());
    for cache_type in [CacheType::F16, CacheType::F32] {
        let mut cache = stage.cache(cache_type);
        let rows = |slots: &[u8]| -> Vec<u8> {
            let widths = shapes.map(|kv| kv.width() * cache_type.bytes());
            let parts = widths.into_iter().flat_map(|width| [width; 2]);
            parts.flat_map(|n| slots.iter().flat_map(move |slot| vec![*slot; n])).collect()
        };
        assert_eq!(6 * cache.row_bytes(), rows(&[0; 6]).len());
        cache.load_rows(0..6, &rows(&[0, 1, 2, 3, 4, 5])).unwrap();
        cache.move_rows(&[(3, 1), (4, 2), (2, 0)]).unwrap();
        // What it holds stays when it grows.
        cache.load_rows(300..301, &rows(&[9])).unwrap();
        let mut saved = Vec::new();
        cache.save_rows(0..6, &mut saved).unwrap();
        assert_eq!(saved, rows(&[4, 3, 4, 3, 4, 5]));
        saved.clear();
        cache.save_rows(300..301, &mut saved).unwrap();
        assert_eq!(saved, rows(&[9]));
    }
}

#[test]
fn heads_that_do_not_fit_are_refused_at_load() {
    let Some(gpu) = gpu("f32") else { return };
    for (head_dim, heads) in [(512, 1), (7, 2)] {
        let kv = KvShape { heads, head_dim };
        let program = program(|b| {
            let width = kv.width();
            let qkv = [(); 3].map(|()| embedded(b, &table(&vec![0.0; width], width)));
            let layer = b.begin_layer(kv);
            b.rope_append_kv(qkv, None, layer).unwrap();
            qkv[0]
        });
        let error = gpu.clone().load(&program, 0..program.ops.len(), &mut |_| Ok(())).err();
        let Some(Error::Unsupported { file, what }) = error else { panic!("{error:?}") };
        assert_eq!(file, "test.gguf");
        assert!(what.contains(&format!("heads of {head_dim} elements")), "{what}");
    }
}

#[test]
fn a_destroyed_device_is_lost_and_says_so() {
    let Some(gpu) = open("f32") else { return };
    let gpu = Arc::new(gpu);
    let program = program(|b| embedded(b, &table(&[1.0; 64], 64)));
    let mut runner = Runner::new(&gpu, &program);
    runner.alone(&[0]);
    gpu.destroy();
    let buffer = program.logits;
    let lost = runner.workspace.write(buffer, &[0.0; 64]);
    assert!(matches!(lost, Err(Error::DeviceLost { .. })), "{lost:?}");
    let (segments, ancestors) = (&[Segment { rows: 0..1, line: 0, first_slot: 0 }], &[1]);
    let rows = Rows { tokens: &[0], segments, ancestors, rotations: &[], wanted: &[0] };
    let lost = runner.stage.run(&rows, &mut [], &mut *runner.workspace);
    assert!(matches!(lost, Err(Error::DeviceLost { .. })), "{lost:?}");
    let lost = gpu.load(&program, 0..program.ops.len(), &mut |_| Ok(())).err();
    assert!(matches!(lost, Some(Error::DeviceLost { .. })), "{lost:?}");
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
    let Some(gpu) = gpu("f32") else { return };
    for (width, k) in [(5, 5), (300, 5), (2051, 5), (2051, 64), (30_000, 1), (40_000, 64)] {
        // Few different values, so that there are ties.
        let mut x: Vec<f32> =
            noise(9).take(3 * width).map(|x| (x * width as f32 / 8.0).round() + 0.0).collect();
        // What is not a number is left to who reads the rows.
        x.extend(x[width..2 * width].to_vec());
        x[3 * width + 2] = f32::NAN;
        let program = program(|b| embedded(b, &table(&x, width)));
        let mut runner = Runner::new(&gpu, &program);
        runner.alone(&[0, 1, 2, 3]);
        let mut find = |rows: Range<usize>, k: usize| {
            let mut top = TopK::default();
            let found = runner.workspace.top_k(program.logits, rows, k, 1.5, &mut top).unwrap();
            (found, top)
        };
        for rows in [0..3, 1..2] {
            let (found, top) = find(rows.clone(), k);
            assert!(found);
            for (i, row) in x[rows.start * width..rows.end * width].chunks(width).enumerate() {
                let mut all: Vec<_> = (0..).zip(row.iter().copied()).collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                assert_eq!(top.top[i * k..][..k], all[..k], "{width} wide, row {i}");
                let most = f64::from(all[0].1);
                let exponents = row.iter().map(|&x| ((f64::from(x) - most) / 1.5).exp());
                let exact = most / 1.5 + exponents.sum::<f64>().ln();
                assert!((top.log_sum_exp[i] - exact).abs() < 1e-5 * (1.0 + exact.abs()));
            }
        }
        assert!(!find(2..4, k).0);
        assert!(!find(0..3, run::MOST_TOP + 1).0);
    }
}
