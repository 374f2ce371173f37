//! Models on the GPU: exact logits, the same bits however rows are grouped, and the same text from
//! every greedy strategy.
//!
//! Any adapter does, the software one included. Without one these tests are skipped, and say so;
//! with `MTAD_REQUIRE_GPU` set that is a failure.

#![cfg(feature = "builtin-pair")]

mod common;

use std::path::Path;
use std::sync::Arc;

use mtad::engine::device::OnGpu;
use mtad::engine::{Device, Model, SessionOptions};
use mtad::exec::cpu::Cpu;
use mtad::exec::wgpu::{Gpu, Variants};
use mtad::gguf::Gguf;
use mtad::lm::{Batch, Row, Want};
use mtad::session::pair::builtin_file;
use mtad::{Error, Pair, Request, Settings, Strategy, Warp};

use common::{adapter, logits, nmse, read_npy, shared};

/// A GPU with some of a model's layers, without or with leave to go on on the CPU.
fn device(words: &str, layers: Option<usize>, may_fall_back: bool) -> Option<Device> {
    let gpu = Gpu::with(&adapter()?, Variants::parse(words).unwrap()).unwrap();
    let cpu = Arc::new(Cpu::new(1).unwrap());
    Some(Device::Gpu(OnGpu { gpu: Arc::new(gpu), cpu, layers, may_fall_back }))
}

fn gpu_of(device: &Device) -> &Gpu {
    let Device::Gpu(on_gpu) = device else { panic!("{}", device.describe()) };
    &on_gpu.gpu
}

/// The golden models whose names pass, with their tokens.
fn golden(folder: &Path, fits: impl Fn(&str) -> bool) -> Vec<(String, Vec<u32>)> {
    let index = std::fs::read_to_string(folder.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let tokens = |entry: &serde_json::Value| {
        let tokens = entry["tokens"].as_array().unwrap();
        tokens.iter().map(|t| t.as_u64().unwrap() as u32).collect()
    };
    let models = index.as_object().unwrap().iter().filter(|(name, _)| fits(name));
    models.map(|(name, entry)| (name.clone(), tokens(entry))).collect()
}

/// Whether a golden model on a device is exact, and the same in groups of any size.
fn check_golden(folder: &Path, (name, tokens): &(String, Vec<u32>), device: &Device) {
    let file = Arc::new(Gguf::open(folder.join(format!("{name}.gguf"))).unwrap());
    let exact = read_npy(&folder.join(format!("{name}.exact.npy")));
    let float = name.ends_with("f32") || name.ends_with("f16");
    let limit = if float { 1e-5 } else { 2e-3 };
    let model = Model::load(file, device, &mut |_, _| true).unwrap();
    let together = logits(&model, tokens, tokens.len());
    let error = nmse(&together, &exact);
    println!("{name:20} {error:.2e} (limit {limit:.0e}) {}", model.describe());
    assert!(error <= limit, "{name} on {}: NMSE {error} > {limit}", model.describe());
    for group in [1, 3, 8] {
        let grouped = logits(&model, tokens, group);
        assert!(grouped == together, "{name} on {} in groups of {group}", model.describe());
    }
}

#[test]
fn golden_logits_of_every_type_are_within_the_contract() {
    let (Some(folder), Some(device)) = (shared("vectors/golden"), device("", None, false)) else {
        return;
    };
    let models = golden(&folder, |_| true);
    assert_eq!(models.len(), 17);
    models.iter().for_each(|model| check_golden(&folder, model, &device));
    assert_eq!(gpu_of(&device).padded_types(), []);
}

#[test]
fn every_forced_variant_is_within_the_contract() {
    let Some(folder) = shared("vectors/golden") else { return };
    let some = ["rand-gqa-Q4_0", "stories260K-Q8_0", "stories260K-f32"];
    let models = golden(&folder, |name| some.contains(&name));
    assert_eq!(models.len(), 3);
    for words in
        ["f32", "f32,no-subgroups", "int8", "f16", "no-tiles", "padded", "int8,no-subgroups,padded"]
    {
        if words == "f16" && adapter().is_some_and(|adapter| !adapter.has_f16()) {
            println!("half precision is skipped: the adapter does not compute in it");
            continue;
        }
        let Some(device) = device(words, None, false) else { return };
        models.iter().for_each(|model| check_golden(&folder, model, &device));
    }
}

#[test]
fn parts_of_a_model_on_either_device_are_within_the_contract() {
    let Some(folder) = shared("vectors/golden") else { return };
    // Three layers and five.
    for (name, layers) in [("rand-gqa-Q4_0", 3), ("stories260K-f32", 5)] {
        let models = golden(&folder, |found| found == name);
        for on_gpu in [1, layers / 2, layers - 1, layers] {
            let Some(device) = device("", Some(on_gpu), false) else { return };
            models.iter().for_each(|model| check_golden(&folder, model, &device));
        }
    }
}

/// The built-in pair on a device.
fn pair(device: &Device) -> Pair {
    let (target, draft) = (builtin_file("target").unwrap(), builtin_file("draft").unwrap());
    Pair::on_devices((target, device), Some((draft, device)), &mut |_, _| true).unwrap()
}

#[test]
fn rows_of_random_trees_are_what_they_are_alone() {
    let Some(device) = device("", None, false) else { return };
    let file = Arc::new(builtin_file("draft").unwrap());
    let model = Model::load(file, &device, &mut |_, _| true).unwrap();
    let mut state = 7u32;
    let mut next = |n: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % n
    };
    let mut lm = model.session(&SessionOptions::default()).unwrap();
    let mut line: Vec<u32> = Vec::new();
    for round in 0..10 {
        // Grow a tree in batches of random sizes, at random parents; keep a random path of it.
        let mut paths: Vec<Vec<u32>> = Vec::new();
        let mut found = Vec::new();
        while paths.len() < 20 {
            let mut batch = Batch::new();
            for _ in 0..1 + next(9) {
                let parent = next(paths.len() + 1).checked_sub(1);
                let token = 259 + next(1000) as u32;
                let mut path = parent.map_or(Vec::new(), |p: usize| paths[p].clone());
                path.push(token);
                batch.push(token, parent.map(|p| Row(p as u32)), Want::Logits);
                paths.push(path);
            }
            let outputs = lm.eval(&batch).unwrap();
            (0..batch.len()).for_each(|i| found.push(outputs.logits(i).to_vec()));
        }
        for _ in 0..3 {
            let row = next(paths.len());
            let tokens: Vec<u32> = line.iter().chain(&paths[row]).copied().collect();
            let alone = logits(&model, &tokens, 1);
            let last = &alone[alone.len() - lm.vocab_size()..];
            assert!(found[row] == last, "round {round}, row {row}");
        }
        let tip = next(paths.len());
        lm.commit(Some(Row(tip as u32))).unwrap();
        line.extend(&paths[tip]);
        if round % 4 == 3 {
            line.truncate(line.len() / 2);
            lm.truncate(line.len()).unwrap();
        }
    }
}

#[test]
fn rows_are_saved_on_one_device_and_restored_on_another() {
    let cpu = Device::Cpu(Arc::new(Cpu::new(1).unwrap()));
    let (Some(gpu), Some(split)) = (device("", None, true), device("", Some(2), false)) else {
        return;
    };
    let file = Arc::new(builtin_file("target").unwrap());
    let layers = file.get_u64("llama.block_count").unwrap().unwrap() as usize;
    let load = |device| Model::load(file.clone(), device, &mut |_, _| true).unwrap();
    let models = [&cpu, &gpu, &split].map(load);
    let tokens: Vec<u32> = (300..340).collect();
    for source in &models {
        let mut lm = source.session(&SessionOptions::default()).unwrap();
        lm.eval(&Batch::chain(&tokens, None, Row(0), Want::Nothing)).unwrap();
        lm.commit(Some(Row(tokens.len() as u32 - 1))).unwrap();
        let mut bytes = Vec::new();
        lm.save_rows(0..40, &mut bytes).unwrap();
        assert_eq!(bytes.len(), 40 * lm.row_bytes());
        for model in &models {
            let mut restored = model.session(&SessionOptions::default()).unwrap();
            restored.load_rows(15, &bytes_of(&bytes, layers, 0..15)).unwrap();
            restored.load_rows(25, &bytes_of(&bytes, layers, 15..40)).unwrap();
            let mut again = Vec::new();
            restored.save_rows(0..40, &mut again).unwrap();
            assert!(again == bytes, "{} to {}", source.describe(), model.describe());
        }
    }
}

/// Some of forty saved rows of a model: keys and values of each layer.
fn bytes_of(saved: &[u8], layers: usize, rows: std::ops::Range<usize>) -> Vec<u8> {
    let part = saved.len() / (2 * layers);
    let row = part / 40;
    saved.chunks(part).flat_map(|c| &c[rows.start * row..rows.end * row]).copied().collect()
}

fn request(strategy: Strategy, temperature: f32, seed: u64, max_tokens: usize) -> Request {
    Request {
        settings: Settings {
            strategy,
            seed,
            score: true,
            warp: Warp { temperature, ..Warp::default() },
            ..Settings::default()
        },
        max_tokens: Some(max_tokens),
        ..Request::default()
    }
}

/// Tokens, perplexity, and tokens of each target pass.
fn generate(pair: &Pair, prompt: &str, request: &Request) -> (Vec<u32>, f64, f64) {
    let mut session = pair.session(&SessionOptions::default()).unwrap();
    let mut generation = session.generate(prompt, request).unwrap();
    generation.by_ref().for_each(|piece| drop(piece.unwrap()));
    let efficiency = generation.statistics().block_efficiency();
    (generation.tokens().to_vec(), generation.perplexity().unwrap(), efficiency)
}

fn check_greedy(device: &Device) {
    let pair = pair(device);
    for prompt in ["Once upon a time", "The dog said"] {
        let text = |strategy| generate(&pair, prompt, &request(strategy, 0.0, 1, 40)).0;
        let greedy = text(Strategy::Greedy);
        assert!(greedy.len() > 20);
        for strategy in [Strategy::Speculative, Strategy::Mtad, Strategy::Mmtad] {
            assert_eq!(text(strategy), greedy, "{strategy} on {}", device.describe());
        }
    }
}

#[test]
fn greedy_drafting_gives_greedy_text() {
    let Some(device) = device("", None, false) else { return };
    check_greedy(&device);
}

#[test]
fn greedy_drafting_gives_greedy_text_within_each_split() {
    for layers in [1, 2, 4] {
        let Some(device) = device("", Some(layers), false) else { return };
        check_greedy(&device);
    }
}

#[test]
fn sampled_text_has_the_statistics_of_the_cpu() {
    let Some(gpu) = device("", None, false) else { return };
    let cpu = Device::Cpu(Arc::new(Cpu::new(1).unwrap()));
    let (gpu, cpu) = (pair(&gpu), pair(&cpu));
    for strategy in [Strategy::Speculative, Strategy::Mtad] {
        let sample = |pair: &Pair, seeds: std::ops::Range<u64>| -> [Vec<f64>; 2] {
            let run = |seed| {
                let request = request(strategy, 0.8, seed, 40);
                let (_, perplexity, efficiency) = generate(pair, "Once upon a time", &request);
                (perplexity.ln(), efficiency)
            };
            let (a, b) = seeds.map(run).unzip();
            [a, b]
        };
        let (here, there) = (sample(&gpu, 0..16), sample(&cpu, 100..140));
        for (what, here, there) in
            [("log-perplexity", &here[0], &there[0]), ("block efficiency", &here[1], &there[1])]
        {
            let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
            let variance = |x: &[f64]| {
                let m = mean(x);
                x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (x.len() - 1) as f64
            };
            let error = variance(here) / here.len() as f64 + variance(there) / there.len() as f64;
            let sigmas = (mean(here) - mean(there)).abs() / error.sqrt();
            println!(
                "{strategy} {what}: gpu {:.3}, cpu {:.3}, {sigmas:.1} SE",
                mean(here),
                mean(there)
            );
            assert!(sigmas < 4.0, "{strategy} {what}: {sigmas} standard errors");
        }
    }
}

#[test]
fn a_lost_device_keeps_the_tokens_and_goes_on_on_the_cpu_if_it_may() {
    let greedy = request(Strategy::Mtad, 0.0, 1, 40);
    for may_fall_back in [false, true] {
        let Some(device) = device("", None, may_fall_back) else { return };
        let pair = pair(&device);
        let mut session = pair.session(&SessionOptions::default()).unwrap();
        let mut generation = session.generate("Once upon a time", &greedy).unwrap();
        for _ in 0..10 {
            generation.next().unwrap().unwrap();
        }
        let before = generation.tokens().to_vec();
        gpu_of(&device).destroy();
        let rest: Result<Vec<_>, Error> = generation.by_ref().collect();
        assert!(generation.tokens().starts_with(&before) && before.len() >= 10);
        if may_fall_back {
            rest.unwrap();
            assert_eq!(generation.tokens().len(), 40);
            let notes = pair.take_notes();
            assert!(notes.iter().any(|n| n.contains("was lost") && n.contains("cpu")), "{notes:?}");
        } else {
            assert!(matches!(rest, Err(Error::DeviceLost { .. })), "{rest:?}");
        }
    }
}

#[test]
fn a_device_that_is_gone_at_load_is_told_or_replaced() {
    for may_fall_back in [false, true] {
        let Some(device) = device("", None, may_fall_back) else { return };
        gpu_of(&device).destroy();
        let file = Arc::new(builtin_file("draft").unwrap());
        let loaded = Model::load(file, &device, &mut |_, _| true);
        match may_fall_back {
            true => {
                let model = loaded.unwrap();
                assert!(model.describe().starts_with("cpu"), "{}", model.describe());
                let notes = model.take_notes();
                assert!(notes[0].contains("was lost"), "{notes:?}");
            }
            false => assert!(matches!(loaded, Err(Error::DeviceLost { .. }))),
        }
    }
}
