//! Logits of real small models against exact ones (f64 arithmetic on the dequantized weights).

mod common;

use std::sync::Arc;

use mtad::engine::{Device, Model, SessionOptions};
use mtad::exec::CacheType;
use mtad::exec::cpu::{Cpu, Isa};
use mtad::gguf::Gguf;
use mtad::lm::{Batch, Row, Want};

use common::{logits, nmse, read_npy, shared};

#[test]
fn golden_logits_within_the_contract_on_every_instruction_set() {
    let Some(golden) = shared("vectors/golden") else { return };
    let index = std::fs::read_to_string(golden.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let mut seen = 0;
    for (name, entry) in index.as_object().unwrap() {
        let tokens: Vec<u32> = entry["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_u64().unwrap() as u32)
            .collect();
        let file = Arc::new(Gguf::open(golden.join(format!("{name}.gguf"))).unwrap());
        let exact = read_npy(&golden.join(format!("{name}.exact.npy")));
        let float = name.ends_with("f32") || name.ends_with("f16");
        let limit = match float {
            true => 1e-5,
            false => 1.5 * entry["llamacpp_nmse_vs_exact"].as_f64().unwrap(),
        };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for threads in [1, 2] {
                let device = Device::Cpu(Arc::new(Cpu::with_isa(threads, isa).unwrap()));
                let model = Model::load(file.clone(), &device, &mut |_, _| true).unwrap();
                let together = logits(&model, &tokens, tokens.len());
                let error = nmse(&together, &exact);
                println!("{name:20} {isa:10} {threads} threads: {error:.2e} (limit {limit:.2e})");
                assert!(error <= limit, "{name} on {isa}: NMSE {error} > {limit}");
                for group in [1, 3, 8] {
                    let grouped = logits(&model, &tokens, group);
                    assert_eq!(grouped, together, "{name} on {isa} in groups of {group}");
                }
                if threads == 1 {
                    continue;
                }
                let other = Cpu::with_isa(1, isa).unwrap().without_repacking();
                let other = Device::Cpu(Arc::new(other));
                let other = Model::load(file.clone(), &other, &mut |_, _| true).unwrap();
                assert_eq!(logits(&other, &tokens, tokens.len()), together, "{name} on {isa}");
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 17, "models in {}", golden.display());
}

#[test]
fn a_cache_in_single_precision_is_nearer_to_exact() {
    let Some(golden) = shared("vectors/golden") else { return };
    let file = Arc::new(Gguf::open(golden.join("stories260K-f32.gguf")).unwrap());
    let exact = read_npy(&golden.join("stories260K-f32.exact.npy"));
    let index = std::fs::read_to_string(golden.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let tokens = index["stories260K-f32"]["tokens"].as_array().unwrap();
    let tokens: Vec<u32> = tokens.iter().map(|t| t.as_u64().unwrap() as u32).collect();
    let device = Device::Cpu(Arc::new(Cpu::new(1).unwrap()));
    let model = Model::load(file, &device, &mut |_, _| true).unwrap();
    let error = |cache_type| {
        let mut lm = model.session(&SessionOptions { cache_type, ..SessionOptions::default() });
        let mut batch = Batch::new();
        for (i, &token) in tokens.iter().enumerate() {
            batch.push(token, i.checked_sub(1).map(|p| Row(p as u32)), Want::Logits);
        }
        let outputs = lm.eval(&batch).unwrap();
        let logits: Vec<f32> = (0..tokens.len()).flat_map(|i| outputs.logits(i).to_vec()).collect();
        nmse(&logits, &exact)
    };
    let (half, single) = (error(CacheType::F16), error(CacheType::F32));
    assert!(single < 1e-10 && single < half / 10.0, "f16 {half:.1e}, f32 {single:.1e}");
}
