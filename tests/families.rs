//! Members of the Llama family against an exact forward pass: rotary pairs, biases, windows and
//! stretched positions, on the CPU and, where there is an adapter, on the GPU.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use mtad::Strategy;
use mtad::engine::{Device, Model, SessionOptions};
use mtad::exec::CacheType;
use mtad::exec::cpu::{Cpu, Isa};
use mtad::exec::wgpu::{Gpu, Variants};
use mtad::gguf::{Gguf, Writer};
use mtad::lm::{Batch, Row, Want};
use mtad::quant::BlockType;

use common::{devices, nmse};

const VOCAB: usize = 40;
const WIDTH: usize = 48;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD: usize = 16;
const FFN: usize = 80;

/// What distinguishes the members.
#[derive(Clone, Copy, Default)]
struct Member {
    architecture: &'static str,
    biases: bool,
    halves: bool,
    window: Option<usize>,
    /// YaRN's factor, from a context of 64.
    yarn: Option<f64>,
}

struct Weights(HashMap<String, Vec<f32>>);

impl Weights {
    fn new(member: &Member) -> (Weights, Writer) {
        let mut state = 7u64;
        let mut noise = |n: usize, scale: f32| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            (0..n).map(|_| scale * next()).collect()
        };
        let (q, kv) = (HEADS * HEAD, KV_HEADS * HEAD);
        let mut shapes = vec![("token_embd".to_owned(), VOCAB, WIDTH, false)];
        for i in 0..LAYERS {
            let mut add = |name: &str, rows, cols, bias| {
                shapes.push((format!("blk.{i}.{name}"), rows, cols, bias));
            };
            add("attn_q", q, WIDTH, member.biases);
            add("attn_k", kv, WIDTH, member.biases);
            add("attn_v", kv, WIDTH, member.biases);
            add("attn_output", WIDTH, q, false);
            add("ffn_gate", FFN, WIDTH, false);
            add("ffn_up", FFN, WIDTH, false);
            add("ffn_down", WIDTH, FFN, false);
        }
        let mut all = HashMap::new();
        let mut writer = Writer::new();
        let mut put = |name: String, rows: usize, cols: usize, values: Vec<f32>| {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let dims = [cols as u64, rows as u64];
            let dims = if rows == 1 { &dims[..1] } else { &dims[..] };
            writer.tensor(&name, dims, BlockType::F32, bytes);
            all.insert(name, values);
        };
        for (name, rows, cols, bias) in shapes {
            put(format!("{name}.weight"), rows, cols, noise(rows * cols, 0.4));
            if bias {
                put(format!("{name}.bias"), 1, rows, noise(rows, 0.5));
            }
        }
        for i in 0..LAYERS {
            for name in ["attn_norm", "ffn_norm"] {
                put(format!("blk.{i}.{name}.weight"), 1, WIDTH, noise(WIDTH, 2.0));
            }
        }
        put("output_norm.weight".to_owned(), 1, WIDTH, noise(WIDTH, 2.0));

        let architecture = member.architecture;
        let key = |name: &str| format!("{architecture}.{name}");
        writer
            .set("general.architecture", architecture)
            .set(&key("context_length"), 256u32)
            .set(&key("embedding_length"), WIDTH as u32)
            .set(&key("block_count"), LAYERS as u32)
            .set(&key("feed_forward_length"), FFN as u32)
            .set(&key("attention.head_count"), HEADS as u32)
            .set(&key("attention.head_count_kv"), KV_HEADS as u32)
            .set(&key("attention.key_length"), HEAD as u32)
            .set(&key("attention.value_length"), HEAD as u32)
            .set(&key("attention.layer_norm_rms_epsilon"), 1e-5f32)
            .set(&key("rope.freq_base"), 500.0f32);
        if let Some(window) = member.window {
            writer.set(&key("attention.sliding_window"), window as u32);
        }
        if let Some(factor) = member.yarn {
            writer
                .set(&key("rope.scaling.type"), "yarn")
                .set(&key("rope.scaling.factor"), factor as f32)
                .set(&key("rope.scaling.original_context_length"), 64u32)
                .set(&key("rope.scaling.yarn_beta_fast"), 4.0f32);
        }
        (Weights(all), writer)
    }

    /// x W^T + b.
    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        let mut out: Vec<f64> =
            self.0[&format!("{name}.weight")].chunks_exact(x.len()).map(dot).collect();
        if let Some(bias) = self.0.get(&format!("{name}.bias")) {
            out.iter_mut().zip(bias).for_each(|(x, b)| *x += f64::from(*b));
        }
        out
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        let weights = &self.0[&format!("{name}.weight")];
        x.iter().zip(weights).map(|(x, w)| x * scale * f64::from(*w)).collect()
    }
}

/// Turns the heads of a row to their position.
fn rotate(x: &mut [f64], position: usize, member: &Member) {
    for head in x.chunks_exact_mut(HEAD) {
        for i in 0..HEAD / 2 {
            let plain = 500f64.powf(-2.0 * i as f64 / HEAD as f64);
            let (mut angle, mut magnitude) = (plain * position as f64, 1.0);
            if let Some(factor) = member.yarn {
                // The pair that makes so many turns in 64 positions.
                let pair = |turns: f64| {
                    HEAD as f64 * (64.0 / (turns * std::f64::consts::TAU)).ln()
                        / (2.0 * 500f64.ln())
                };
                let (low, high) = (pair(4.0).floor().max(0.0), pair(1.0).ceil());
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                angle *= ramp / factor + (1.0 - ramp);
                magnitude = 0.1 * factor.ln() + 1.0;
            }
            let (a, b) = if member.halves { (i, i + HEAD / 2) } else { (2 * i, 2 * i + 1) };
            let (sin, cos) = angle.sin_cos();
            (head[a], head[b]) = (
                magnitude * (head[a] * cos - head[b] * sin),
                magnitude * (head[a] * sin + head[b] * cos),
            );
        }
    }
}

/// The logits of every token, in double precision.
fn exact(weights: &Weights, member: &Member, tokens: &[u32]) -> Vec<f64> {
    let table = &weights.0["token_embd.weight"];
    let row = |t: &u32| table[*t as usize * WIDTH..][..WIDTH].iter().map(|x| f64::from(*x));
    let mut xs: Vec<Vec<f64>> = tokens.iter().map(|t| row(t).collect()).collect();
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (p, x) in xs.iter_mut().enumerate() {
            let normed = weights.norm(x, &name("attn_norm"));
            let mut q = weights.linear(&normed, &name("attn_q"));
            let mut k = weights.linear(&normed, &name("attn_k"));
            rotate(&mut q, p, member);
            rotate(&mut k, p, member);
            keys.push(k);
            values.push(weights.linear(&normed, &name("attn_v")));
            let first = member.window.map_or(0, |window| (p + 1).saturating_sub(window));
            let mut attended = Vec::new();
            for head in 0..HEADS {
                let at = head / (HEADS / KV_HEADS) * HEAD;
                let score = |key: &Vec<f64>| {
                    let q = &q[head * HEAD..][..HEAD];
                    let dot: f64 = q.iter().zip(&key[at..]).map(|(q, k)| q * k).sum();
                    (dot / (HEAD as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = keys[first..].iter().map(score).collect();
                let total: f64 = scores.iter().sum();
                attended.extend((0..HEAD).map(|d| {
                    let weighted = scores.iter().zip(&values[first..]).map(|(s, v)| s * v[at + d]);
                    weighted.sum::<f64>() / total
                }));
            }
            let o = weights.linear(&attended, &name("attn_output"));
            x.iter_mut().zip(o).for_each(|(x, o)| *x += o);
            let normed = weights.norm(x, &name("ffn_norm"));
            let gate = weights.linear(&normed, &name("ffn_gate"));
            let up = weights.linear(&normed, &name("ffn_up"));
            let inner: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let down = weights.linear(&inner, &name("ffn_down"));
            x.iter_mut().zip(down).for_each(|(x, d)| *x += d);
        }
    }
    xs.iter().flat_map(|x| weights.linear(&weights.norm(x, "output_norm"), "token_embd")).collect()
}

/// Logits of all rows with a cache in single precision, fed in groups.
fn logits(model: &Model, tokens: &[u32], group: usize) -> Vec<f32> {
    let options = SessionOptions { cache_type: CacheType::F32, ..SessionOptions::default() };
    let mut lm = model.session(&options).unwrap();
    let mut out = Vec::new();
    for piece in tokens.chunks(group) {
        let outputs = lm.eval(&Batch {
            tokens: piece.to_vec(),
            parents: (0..piece.len()).map(|i| i.checked_sub(1).map(|p| Row(p as u32))).collect(),
            wants: vec![Want::Logits; piece.len()],
        });
        let outputs = outputs.unwrap();
        (0..piece.len()).for_each(|i| out.extend_from_slice(outputs.logits(i)));
        lm.commit(Some(Row(piece.len() as u32 - 1))).unwrap();
    }
    out
}

#[test]
fn members_of_the_family_are_exact_and_rows_do_not_depend_on_their_number() {
    let qwen = Member { architecture: "qwen2", biases: true, halves: true, ..Member::default() };
    let llama = Member { architecture: "llama", ..Member::default() };
    let members = [
        ("llama", llama),
        ("qwen2", qwen),
        ("mistral", Member { window: Some(5), ..llama }),
        ("a window longer than a tile", Member { window: Some(40), ..llama }),
        ("qwen2 with a window and yarn", Member { window: Some(33), yarn: Some(4.0), ..qwen }),
        ("yarn", Member { yarn: Some(2.5), ..llama }),
    ];
    let tokens: Vec<u32> = (0..90).map(|i| (i * i + 3 * i) % VOCAB as u32).collect();
    let devices = devices();
    let mut seen = Vec::new();
    for (name, member) in members {
        let (weights, writer) = Weights::new(&member);
        let file = Arc::new(Gguf::from_vec("family.gguf", writer.to_vec()).unwrap());
        let exact = exact(&weights, &member, &tokens);
        for device in &devices {
            let model = Model::load(file.clone(), device, &mut |_, _| true).unwrap();
            let together = logits(&model, &tokens, tokens.len());
            let error = nmse(&together, &exact);
            assert!(error < 1e-9, "{name} on {}: NMSE {error:.1e}", device.describe());
            for group in [1, 7] {
                let few = logits(&model, &tokens, group);
                assert!(few == together, "{name} on {} in groups of {group}", device.describe());
            }
        }
        // What makes a member one of its own changes its logits.
        seen.push(exact);
        for other in &seen[..seen.len() - 1] {
            let floats: Vec<f32> = other.iter().map(|x| *x as f32).collect();
            assert!(nmse(&floats, seen.last().unwrap()) > 1e-3, "{name} is like another");
        }
    }
}

/// In half precision a cache can tip a router between two experts that it nearly finds equal.
const EXACT: SessionOptions = SessionOptions { context: None, cache_type: CacheType::F32 };

/// The models of other families, with the tokens that they were fed.
fn family_vectors() -> Option<Vec<(String, std::path::PathBuf, Vec<u32>)>> {
    let folder = common::shared("vectors/families")?;
    let index = std::fs::read_to_string(folder.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let entries = index.as_object().unwrap().iter().map(|(name, entry)| {
        let tokens = entry["tokens"].as_array().unwrap();
        let tokens = tokens.iter().map(|t| t.as_u64().unwrap() as u32).collect();
        (name.clone(), folder.join(format!("{name}-F32.gguf")), tokens)
    });
    let entries: Vec<_> = entries.collect();
    assert_eq!(entries.len(), 20);
    Some(entries)
}

#[test]
fn other_families_are_exact_on_every_instruction_set_and_rows_do_not_depend_on_their_number() {
    let Some(entries) = family_vectors() else { return };
    for (name, path, tokens) in entries {
        let exact = common::read_npy(&path.with_file_name(format!("{name}.exact.npy")));
        let file = Arc::new(Gguf::open(&path).unwrap());
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let device = Device::Cpu(Arc::new(Cpu::with_isa(2, isa).unwrap()));
            let model = Model::load(file.clone(), &device, &mut |_, _| true).unwrap();
            let together = common::logits_in(&EXACT, &model, &tokens, tokens.len());
            let error = common::nmse(&together, &exact);
            println!("{name:12} {isa:10} {error:.2e}");
            assert!(error <= 1e-5, "{name} on {isa}: NMSE {error}");
            for group in 1..tokens.len() {
                let grouped = common::logits_in(&EXACT, &model, &tokens, group);
                assert!(grouped == together, "{name} on {isa} in groups of {group}");
            }
        }
    }
}

#[test]
fn other_families_are_exact_on_a_gpu() {
    let (Some(entries), Some(adapter)) = (family_vectors(), common::adapter()) else { return };
    let gpu = Arc::new(Gpu::with(&adapter, Variants::parse("f32").unwrap()).unwrap());
    let cpu = Arc::new(Cpu::new(1).unwrap());
    let on_gpu = mtad::engine::device::OnGpu { gpu, cpu, layers: None, may_fall_back: false };
    let device = Device::Gpu(on_gpu);
    let mut seen = 0;
    for (name, path, tokens) in entries {
        let exact = common::read_npy(&path.with_file_name(format!("{name}.exact.npy")));
        let file = Arc::new(Gguf::open(&path).unwrap());
        let model = match Model::load(file, &device, &mut |_, _| true) {
            Err(mtad::Error::Unsupported { what, .. }) if what.contains("experts") => continue,
            model => model.unwrap(),
        };
        let together = common::logits_in(&EXACT, &model, &tokens, tokens.len());
        let error = common::nmse(&together, &exact);
        println!("{name:12} {error:.2e} {}", model.describe());
        assert!(error <= 1e-5, "{name}: NMSE {error}");
        for group in [1, 3, 9] {
            let grouped = common::logits_in(&EXACT, &model, &tokens, group);
            assert!(grouped == together, "{name} in groups of {group}");
        }
        seen += 1;
    }
    assert_eq!(seen, 15, "all but the mixtures of experts");
}

#[test]
fn greedy_drafting_is_the_targets_own_text_in_other_families() {
    let Some(entries) = family_vectors() else { return };
    let device = Device::Cpu(Arc::new(Cpu::new(2).unwrap()));
    let load = |path: &std::path::Path| {
        Model::load(Arc::new(Gguf::open(path).unwrap()), &device, &mut |_, _| true).unwrap()
    };
    for (i, (name, path, tokens)) in entries.iter().enumerate() {
        // A model of another family drafts, and is mostly wrong.
        let (target, draft) = (load(path), load(&entries[(i + 1) % entries.len()].1));
        let text = |strategy: Strategy| {
            let settings = mtad::Settings {
                strategy,
                warp: mtad::Warp { temperature: 0.0, ..mtad::Warp::default() },
                ..mtad::Settings::default()
            };
            let options = SessionOptions { context: Some(64), ..SessionOptions::default() };
            let mut target = target.session(&options).unwrap();
            let mut draft = draft.session(&options).unwrap();
            let mut decoding = mtad::decode::Decoding::new(settings).unwrap();
            let mut models = mtad::decode::Models::pair(&mut *target, &mut *draft);
            decoding.start(&mut models, &tokens[..9]).unwrap();
            while decoding.generated().len() < 40 {
                decoding.next_block(&mut models).unwrap();
            }
            decoding.generated()[..40].to_vec()
        };
        let greedy = text(Strategy::Greedy);
        for strategy in [Strategy::Speculative, Strategy::Mtad, Strategy::Mmtad] {
            assert_eq!(text(strategy), greedy, "{name} by {strategy}");
        }
    }
}
