//! Operations of the CPU against double precision, alone and among others.

use std::ops::Range;
use std::sync::Arc;

use super::noise::Noise;
use super::{Cpu, Isa};
use crate::exec::{CacheType, Executor, KvCache, Rows, Segment, Stage, Workspace};
use crate::gguf::{Gguf, SharedTensor, Writer};
use crate::graph::{
    Activation, Attention, BufferId, Builder, Expert, Experts, Gating, KvShape, Norm, NormKind,
    Program, Routing, WeightId,
};
use crate::quant::BlockType;

fn tensor(rows: usize, values: &[f32]) -> SharedTensor {
    let mut writer = Writer::new();
    let dims = [(values.len() / rows) as u64, rows as u64];
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    writer.tensor("w", &dims, BlockType::F32, bytes);
    let file = Arc::new(Gguf::from_vec("test", writer.to_vec()).unwrap());
    SharedTensor::find(&file, "w").unwrap()
}

/// Every instruction set of this machine, on two threads.
fn cpus() -> impl Iterator<Item = Arc<Cpu>> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(|isa| Arc::new(Cpu::with_isa(2, isa).unwrap()))
}

/// A program that ends by selecting all rows of `out`.
fn finished(mut b: Builder, out: BufferId) -> Arc<Program> {
    let selected = b.select_rows(out);
    Arc::new(b.finish(selected).unwrap())
}

fn loaded(cpu: &Arc<Cpu>, program: &Arc<Program>) -> Box<dyn Stage> {
    cpu.clone().load(program, 0..program.ops.len(), &mut |_| Ok(())).unwrap()
}

/// Runs a program over rows without a cache; `inputs` are its inputs in order.
fn run(cpu: &Arc<Cpu>, program: &Arc<Program>, inputs: &[&[Vec<f32>]]) -> Vec<Vec<f32>> {
    let (stage, n) = (loaded(cpu, program), inputs[0].len());
    let mut workspace = stage.workspace();
    write(&mut *workspace, inputs);
    let (tokens, wanted) = (vec![0; n], (0..n as u32).collect::<Vec<_>>());
    let segments = [Segment { rows: 0..n, line: 0, first_slot: 0 }];
    let rows = Rows {
        tokens: &tokens,
        segments: &segments,
        ancestors: &vec![1; n],
        rotations: &[],
        wanted: &wanted,
    };
    let mut cache = stage.cache(CacheType::F32);
    stage.run(&rows, &mut [&mut *cache], &mut *workspace).unwrap();
    read(&mut *workspace, program, n)
}

fn write(workspace: &mut dyn Workspace, inputs: &[&[Vec<f32>]]) {
    for (i, rows) in inputs.iter().enumerate() {
        workspace.write(BufferId(i as u32), &rows.concat()).unwrap();
    }
}

fn read(workspace: &mut dyn Workspace, program: &Program, n: usize) -> Vec<Vec<f32>> {
    let mut copy = Vec::new();
    let rows = workspace.read(program.logits, 0..n, &mut copy).unwrap();
    rows.chunks(program.vocab_size).map(<[f32]>::to_vec).collect()
}

fn assert_near(found: &[Vec<f32>], exact: &[Vec<f64>], bound: f64, what: &str) {
    assert_eq!(found.len(), exact.len());
    for (row, (found, exact)) in found.iter().zip(exact).enumerate() {
        assert_eq!(found.len(), exact.len());
        for (i, (x, y)) in found.iter().zip(exact).enumerate() {
            let near = (f64::from(*x) - y).abs() <= bound * (1.0 + y.abs());
            assert!(near, "{what}: row {row}, element {i}: {x}, exactly {y}");
        }
    }
}

/// Keys, values and queries of slots `0..line + tree`, and the ancestors of the tree's slots.
struct Case {
    kv: KvShape,
    group: usize,
    line: usize,
    attention: Attention,
    sinks: Vec<f32>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    q: Vec<Vec<f32>>,
    ancestors: Vec<u128>,
}

impl Case {
    fn new(
        kv: KvShape,
        group: usize,
        (line, tree): (usize, usize),
        window: Option<usize>,
        special: bool,
        noise: &mut Noise,
    ) -> Self {
        let (slots, width) = (line + tree, kv.width());
        let mut rows = |n: usize, width| (0..n).map(|_| noise.floats(width)).collect();
        let (k, v, q) = (rows(slots, width), rows(slots, width), rows(slots, width * group));
        // Long chains with a few branches.
        let mut ancestors: Vec<u128> = Vec::new();
        for i in 0..tree {
            let parent = match noise.below(4) {
                0 => noise.below(i + 1).checked_sub(1),
                _ => i.checked_sub(1),
            };
            ancestors.push(parent.map_or(0, |p| ancestors[p]) | 1 << i);
        }
        let plain = 1.0 / (kv.head_dim as f32).sqrt();
        let (scale, soft_cap) = if special { (0.7, Some(1.5)) } else { (plain, None) };
        let sinks = if special { noise.floats(kv.heads * group) } else { Vec::new() };
        let attention = Attention { scale, window, soft_cap, sinks: None };
        Case { kv, group, line, attention, sinks, k, v, q, ancestors }
    }

    fn program(&self) -> Arc<Program> {
        let mut b = Builder::new("test", 1000);
        let width = self.kv.width();
        let qkv = [b.input(width * self.group), b.input(width), b.input(width)];
        let sinks = (!self.sinks.is_empty()).then(|| b.vector(tensor(1, &self.sinks)));
        let layer = b.begin_layer(self.kv);
        b.rope_append_kv(qkv, None, layer).unwrap();
        let out = b.attend(qkv[0], layer, Attention { sinks, ..self.attention }).unwrap();
        finished(b, out)
    }

    fn inputs(&self, slots: Range<usize>) -> [Vec<Vec<f32>>; 3] {
        [&self.q, &self.k, &self.v].map(|rows| rows[slots.clone()].to_vec())
    }

    /// A cache with the rows of the line, and of the tree's first `stored` rows.
    fn cache(&self, stage: &dyn Stage, stored: usize) -> Box<dyn KvCache> {
        let mut cache = stage.cache(CacheType::F32);
        for slot in 0..self.line {
            pass(stage, &mut [(self, &mut *cache, slot, slot..slot + 1, &[1])]);
        }
        if stored > 0 {
            let (line, ancestors) = (self.line, &self.ancestors[..stored]);
            pass(stage, &mut [(self, &mut *cache, line, line..line + stored, ancestors)]);
        }
        cache
    }

    /// Attends with some rows of the tree, after those before them.
    fn alone(&self, stage: &dyn Stage, rows: Range<usize>) -> Vec<Vec<f32>> {
        let mut cache = self.cache(stage, rows.start);
        let slots = self.line + rows.start..self.line + rows.end;
        pass(stage, &mut [(self, &mut *cache, self.line, slots, &self.ancestors[rows])])
    }

    /// Head by head in double precision.
    fn exact(&self, row: usize) -> Vec<f64> {
        let (d, path) = (self.kv.head_dim, self.ancestors[row]);
        let tree = (0..self.ancestors.len()).filter(|r| path >> r & 1 == 1).map(|r| self.line + r);
        let seen: Vec<usize> = (0..self.line).chain(tree).collect();
        let window = self.attention.window.unwrap_or(seen.len());
        let seen = &seen[seen.len().saturating_sub(window)..];
        let mut out = Vec::new();
        for head in 0..self.kv.heads * self.group {
            let q = &self.q[self.line + row][head * d..][..d];
            let at = head / self.group * d;
            let score = |k: &[f32]| -> f64 {
                let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                let score = dot * f64::from(self.attention.scale);
                match self.attention.soft_cap {
                    Some(cap) => f64::from(cap) * (score / f64::from(cap)).tanh(),
                    None => score,
                }
            };
            let weights: Vec<f64> =
                seen.iter().map(|&slot| score(&self.k[slot][at..][..d]).exp()).collect();
            let sink = self.sinks.get(head).map_or(0.0, |sink| f64::from(*sink).exp());
            let total: f64 = weights.iter().sum::<f64>() + sink;
            out.extend((0..d).map(|i| {
                let value = |(&slot, w): (&usize, &f64)| w * f64::from(self.v[slot][at + i]);
                seen.iter().zip(&weights).map(value).sum::<f64>() / total
            }));
        }
        out
    }
}

/// What a sequence has in a pass: its cache, its line, its slots, and their ancestors.
type Part<'a> = (&'a Case, &'a mut dyn KvCache, usize, Range<usize>, &'a [u128]);

/// One pass over rows of several sequences of one shape.
fn pass(stage: &dyn Stage, parts: &mut [Part<'_>]) -> Vec<Vec<f32>> {
    let mut inputs = [Vec::new(), Vec::new(), Vec::new()];
    let (mut segments, mut all, mut first) = (Vec::new(), Vec::new(), 0);
    let mut program = None;
    for (case, _, line, slots, ancestors) in &*parts {
        for (to, rows) in inputs.iter_mut().zip(case.inputs(slots.clone())) {
            to.extend(rows);
        }
        let rows = first..first + slots.len();
        first = rows.end;
        segments.push(Segment { rows, line: *line, first_slot: slots.start });
        all.extend_from_slice(ancestors);
        program.get_or_insert_with(|| case.program());
    }
    let mut workspace = stage.workspace();
    write(&mut *workspace, &[&inputs[0], &inputs[1], &inputs[2]]);
    let wanted: Vec<u32> = (0..first as u32).collect();
    let rows = Rows {
        tokens: &vec![0; first],
        segments: &segments,
        ancestors: &all,
        rotations: &[],
        wanted: &wanted,
    };
    let mut caches: Vec<&mut dyn KvCache> =
        parts.iter_mut().map(|(_, cache, ..)| &mut **cache).collect();
    stage.run(&rows, &mut caches, &mut *workspace).unwrap();
    read(&mut *workspace, &program.expect("there is a part"), first)
}

#[test]
fn attention_is_exact_and_a_row_gets_the_same_bits_alone_and_among_others() {
    let mut noise = Noise(3);
    let cases = [
        (64, 2, 4, 70, 13, None, false),
        (80, 1, 1, 31, 40, None, false),
        (8, 2, 3, 0, 66, None, false),
        (16, 1, 5, 64, 1, None, false),
        // Windows that end within a tile, a path, one position, and before the first.
        (64, 2, 2, 101, 20, Some(50), false),
        (16, 1, 3, 33, 60, Some(7), false),
        (8, 1, 1, 40, 9, Some(1), false),
        (8, 1, 2, 64, 9, Some(1000), false),
        // A scale of its own, soft caps and sinks.
        (64, 2, 2, 70, 20, None, true),
        (16, 1, 3, 33, 30, Some(7), true),
    ];
    for (head_dim, heads, group, line, tree, window, special) in cases {
        let kv = KvShape { heads, head_dim };
        let case = Case::new(kv, group, (line, tree), window, special, &mut noise);
        for cpu in cpus() {
            let stage = loaded(&cpu, &case.program());
            let together = case.alone(&*stage, 0..tree);
            for row in (0..tree).step_by(7) {
                let alone = &case.alone(&*stage, row..row + 1)[0];
                let isa = cpu.isa();
                assert!(*alone == together[row], "{isa}: row {row} is not the same alone");
                for (x, exact) in together[row].iter().zip(case.exact(row)) {
                    assert!((f64::from(*x) - exact).abs() < 1e-5, "{isa} {row}: {x} {exact}");
                }
            }
        }
    }
}

#[test]
fn rows_of_several_sequences_get_the_bits_that_they_get_alone() {
    let mut noise = Noise(11);
    let kv = KvShape { heads: 2, head_dim: 32 };
    for special in [false, true] {
        for count in [1, 2, 3, 8] {
            let cases: Vec<Case> = (0..count)
                .map(|_| {
                    let shape = (noise.below(90), 1 + noise.below(20));
                    let mut case = Case::new(kv, 2, shape, Some(40), special, &mut noise);
                    // (Sinks are the model's.)
                    case.sinks.iter_mut().enumerate().for_each(|(i, sink)| *sink = i as f32 * 0.3);
                    case
                })
                .collect();
            for cpu in cpus() {
                let stage = loaded(&cpu, &cases[0].program());
                let alone: Vec<_> = cases
                    .iter()
                    .flat_map(|case| case.alone(&*stage, 0..case.ancestors.len()))
                    .collect();
                let mut caches: Vec<_> = cases.iter().map(|case| case.cache(&*stage, 0)).collect();
                let mut parts: Vec<Part<'_>> = cases
                    .iter()
                    .zip(&mut caches)
                    .map(|(case, cache)| {
                        let slots = case.line..case.line + case.ancestors.len();
                        (case, &mut **cache, case.line, slots, &case.ancestors[..])
                    })
                    .collect();
                assert!(pass(&*stage, &mut parts) == alone, "{count} sequences on {}", cpu.isa());
            }
        }
    }
}

#[test]
fn norms_of_rows_and_of_heads_are_exact() {
    let mut noise = Noise(5);
    let rows: Vec<Vec<f32>> = (0..5).map(|_| noise.floats(48)).collect();
    for kind in [NormKind::Rms, NormKind::Layer] {
        for (group, weight_len, bias_len) in [
            (48, 48, 48),
            (48, 0, 0),
            (16, 16, 0),
            (16, 48, 48),
            (12, 12, 12),
            (12, 48, 48),
            (24, 48, 0),
        ] {
            let (weights, biases) =
                (noise.floats(weight_len.max(1)), noise.floats(bias_len.max(1)));
            let mut b = Builder::new("test", 10);
            let x = b.input(48);
            let weight = (weight_len > 0).then(|| b.vector(tensor(1, &weights)));
            let bias =
                (bias_len > 0 && kind == NormKind::Layer).then(|| b.vector(tensor(1, &biases)));
            let with_bias = bias.is_some();
            let out = b.norm(x, Norm { kind, weight, bias, epsilon: 1e-3, group }).unwrap();
            let program = finished(b, out);
            let exact: Vec<Vec<f64>> = rows
                .iter()
                .map(|row| {
                    let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                    let groups = row.chunks(group).map(|part| {
                        let n = group as f64;
                        let mean = part.iter().sum::<f64>() / n;
                        let mean = if kind == NormKind::Layer { mean } else { 0.0 };
                        let square = part.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                        let scale = 1.0 / (square + 1e-3).sqrt();
                        part.iter().map(|x| (x - mean) * scale).collect::<Vec<_>>()
                    });
                    let normed = groups.flatten().enumerate();
                    let weighted = normed.map(|(i, x)| match weight_len {
                        0 => x,
                        len => x * f64::from(weights[i % len]),
                    });
                    let biased = weighted.enumerate().map(|(i, x)| match with_bias {
                        true => x + f64::from(biases[i % bias_len]),
                        false => x,
                    });
                    biased.collect()
                })
                .collect();
            for cpu in cpus() {
                let found = run(&cpu, &program, &[&rows]);
                assert_near(&found, &exact, 1e-5, &format!("{kind:?} of {group} on {}", cpu.isa()));
            }
        }
    }
}

/// erf by its series (Abramowitz and Stegun 1964, 7.1.5).
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

#[test]
fn elementwise_operations_are_exact() {
    let mut noise = Noise(8);
    let mut rows = |scale: f32| -> Vec<Vec<f32>> {
        (0..3).map(|_| noise.floats(37).into_iter().map(|x| scale * x).collect()).collect()
    };
    let (x, y) = (rows(6.0), rows(9.0));
    let exact = |f: &dyn Fn(f64, f64) -> f64| -> Vec<Vec<f64>> {
        let row = |(x, y): (&Vec<f32>, &Vec<f32>)| {
            x.iter().zip(y).map(|(x, y)| f(f64::from(*x), f64::from(*y))).collect()
        };
        x.iter().zip(&y).map(row).collect()
    };
    let check =
        |what: &str, build: &dyn Fn(&mut Builder, BufferId, BufferId), exact: Vec<Vec<f64>>| {
            let mut b = Builder::new("test", 10);
            let (a, c) = (b.input(37), b.input(37));
            build(&mut b, a, c);
            // (So that both are inputs whatever the operation reads.)
            b.add(a, c, 0.0).unwrap();
            let program = finished(b, a);
            for cpu in cpus() {
                let found = run(&cpu, &program, &[&x, &y]);
                assert_near(&found, &exact, 2e-6, &format!("{what} on {}", cpu.isa()));
            }
        };
    for f in [Activation::Relu, Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        check(&format!("{f:?}"), &|b, x, _| b.activate(f, x), exact(&|x, _| activated(f, x)));
        let gated = exact(&|x, y| activated(f, x) * y);
        let gate = |b: &mut Builder, x, y| b.gate(Gating::Activated(f), x, y).unwrap();
        check(&format!("gate by {f:?}"), &gate, gated);
    }
    let clamped = Gating::Clamped { alpha: 1.702, limit: 7.0 };
    let by_hand = exact(&|x, y| {
        let (g, u) = (x.min(7.0), y.clamp(-7.0, 7.0));
        g / (1.0 + (-1.702 * g).exp()) * (u + 1.0)
    });
    check("clamped gate", &|b, x, y| b.gate(clamped, x, y).unwrap(), by_hand);
    check("add", &|b, x, y| b.add(x, y, 0.25).unwrap(), exact(&|x, y| x + 0.25 * y));
    check("scale", &|b, x, _| b.scale(x, 3.5), exact(&|x, _| 3.5 * x));
    check("soft cap", &|b, x, _| b.soft_cap(x, 4.0), exact(&|x, _| 4.0 * (x / 4.0).tanh()));
}

#[test]
fn a_mixture_of_experts_is_exact_and_a_row_gets_the_same_bits_alone() {
    let mut noise = Noise(21);
    let (width, inner, count, used) = (32, 48, 5, 2);
    let matrix = |noise: &mut Noise, rows: usize, cols: usize| noise.floats(rows * cols);
    let weights: Vec<[Vec<f32>; 3]> = (0..count)
        .map(|_| {
            [(inner, width), (inner, width), (width, inner)]
                .map(|(rows, cols)| matrix(&mut noise, rows, cols))
        })
        .collect();
    let x: Vec<Vec<f32>> = (0..9).map(|_| noise.floats(width)).collect();
    let logits: Vec<Vec<f32>> = (0..9).map(|_| noise.floats(count)).collect();
    for routing in [Routing::Softmax, Routing::SoftmaxNormalized, Routing::SoftmaxOfChosen] {
        let mut b = Builder::new("test", 10);
        let (from, router) = (b.input(width), b.input(count));
        let mut add = |rows: usize, values: &[f32]| -> WeightId {
            b.matrix(tensor(rows, values), None).unwrap()
        };
        let experts = weights
            .iter()
            .map(|[gate, up, down]| Expert {
                gate: add(inner, gate),
                up: add(inner, up),
                down: add(width, down),
            })
            .collect();
        let gating = Gating::Activated(Activation::Silu);
        let experts = Experts { experts, used, routing, gating, scale: 1.5 };
        let out = b.experts(from, router, experts).unwrap();
        let program = finished(b, out);
        let exact: Vec<Vec<f64>> = x
            .iter()
            .zip(&logits)
            .map(|(x, logits)| {
                let all: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                let mut order: Vec<usize> = (0..count).collect();
                order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
                let chosen = &order[..used];
                let of = |i: usize| f64::from(logits[i]).exp();
                let chosen_sum: f64 = chosen.iter().map(|&i| of(i)).sum();
                let total = if routing == Routing::Softmax { all } else { chosen_sum };
                let times = |m: &[f32], x: &[f64]| -> Vec<f64> {
                    let row = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
                    m.chunks(x.len()).map(row).collect()
                };
                let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                let mut out = vec![0.0; width];
                for &i in chosen {
                    let [gate, up, down] = &weights[i];
                    let (gate, up) = (times(gate, &x), times(up, &x));
                    let gated: Vec<f64> = gate
                        .iter()
                        .zip(up)
                        .map(|(g, u)| activated(Activation::Silu, *g) * u)
                        .collect();
                    let made = times(down, &gated);
                    out.iter_mut().zip(made).for_each(|(o, y)| *o += 1.5 * of(i) / total * y);
                }
                out
            })
            .collect();
        for cpu in cpus() {
            let together = run(&cpu, &program, &[&x, &logits]);
            assert_near(&together, &exact, 2e-5, &format!("{routing:?} on {}", cpu.isa()));
            for row in [0, 4, 8] {
                let alone = run(&cpu, &program, &[&x[row..row + 1], &logits[row..row + 1]]);
                assert!(alone[0] == together[row], "row {row} is not the same alone");
            }
        }
    }
}
