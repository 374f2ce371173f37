//! `mtad quantize`: files of every type, held against llama.cpp's on the same weights.
#![cfg(feature = "builtin-pair")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{sentencepiece, shared, tiny_llama};
use mtad::gguf::Gguf;
use mtad::quant::{BlockType, Recipe};
use serde_json::Value;

fn mtad(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.args(args).stdin(Stdio::null()).output().expect("the binary runs")
}

/// Quantizes; what it reports.
fn quantize(args: &[&str]) -> Value {
    let output = mtad(&[&["quantize", "--json"], args].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn weights(file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    let mut out = vec![0.0; tensor.rows * tensor.cols];
    tensor.block_type.dequantize(tensor.bytes, &mut out);
    out
}

/// (squared error by squares) of all matrices, by the type that they have in `file`.
fn nmse(file: &Gguf, source: &Gguf) -> BTreeMap<&'static str, f64> {
    let mut sums = BTreeMap::<_, (f64, f64)>::new();
    for tensor in file.tensors().filter(|tensor| tensor.rows > 1) {
        let (x, exact) = (weights(file, tensor.name), weights(source, tensor.name));
        let sum = sums.entry(tensor.block_type.name()).or_default();
        for (x, exact) in x.iter().zip(exact) {
            sum.0 += f64::from(x - exact).powi(2);
            sum.1 += f64::from(exact).powi(2);
        }
    }
    sums.into_iter().map(|(name, (error, squares))| (name, error / squares)).collect()
}

#[test]
fn every_recipe_has_llama_cpps_types_and_no_more_error() {
    let Some(golden) = shared("vectors/golden") else { return };
    let folder = tempfile::tempdir().unwrap();
    let source_path = golden.join("rand-gqa-f16.gguf");
    let source = Gguf::open(&source_path).unwrap();
    let mut seen = 0;
    for recipe in Recipe::all() {
        let theirs = golden.join(format!("rand-gqa-{recipe}.gguf"));
        if !theirs.exists() {
            continue;
        }
        let out = folder.path().join("out.gguf");
        let report = quantize(&[path(&source_path), path(&out), recipe.name()]);
        let (ours, theirs) = (Gguf::open(&out).unwrap(), Gguf::open(theirs).unwrap());
        assert_eq!(report["output_bytes"], ours.file_len() as u64);
        for key in ["general.file_type", "general.quantization_version"] {
            assert_eq!(ours.get_u64(key).unwrap(), theirs.get_u64(key).unwrap(), "{recipe} {key}");
        }
        for tensor in theirs.tensors() {
            let ours = ours.tensor(tensor.name).unwrap();
            assert_eq!(ours.block_type, tensor.block_type, "{recipe}: {}", tensor.name);
        }
        let mut all = [0.0; 2];
        for ((t, ours), theirs) in nmse(&ours, &source).into_iter().zip(nmse(&theirs, &source)) {
            println!(
                "{recipe:7} {t:7} {ours:.4e} llama.cpp {:.4e} ratio {:.4}",
                theirs.1,
                ours / theirs.1
            );
            assert_eq!(t, theirs.0);
            assert!(ours <= 1.02 * theirs.1, "{recipe}: {t} has {ours}, llama.cpp {}", theirs.1);
            all[0] += ours;
            all[1] += theirs.1;
            let reported = report["types"].as_array().unwrap().iter().find(|row| row["type"] == t);
            if let Some(reported) = reported.unwrap()["nmse"].as_f64() {
                assert!((reported / ours - 1.0).abs() < 1e-3, "{recipe}: {t} {reported} {ours}");
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 13, "quantized models in {}", golden.display());
}

#[test]
fn a_quantized_model_is_read_back_on_request_only() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (full, small) = (at("full.gguf"), at("small.gguf"));
    let refused = mtad(&["quantize", "builtin:draft", path(&full), "F32"]);
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("--requantize") && stderr.contains("Q8_0"), "{stderr}");
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());

    quantize(&["builtin:draft", path(&full), "f32", "--requantize"]);
    let (builtin, whole) =
        (mtad::session::pair::builtin_file("draft").unwrap(), Gguf::open(&full).unwrap());
    let changed: Vec<_> =
        builtin.metadata().filter(|(key, value)| whole.get(key) != Some(*value)).collect();
    assert!(changed.iter().all(|(key, _)| key.starts_with("general.")), "{changed:?}");
    for tensor in builtin.tensors() {
        assert_eq!(whole.tensor(tensor.name).unwrap().block_type, BlockType::F32);
        assert_eq!(weights(&whole, tensor.name), weights(&builtin, tensor.name));
    }
    // What came from Q8_0 fits Q8_0 again; the embedding is the output, so it keeps 8 bits ...
    quantize(&[path(&full), path(&small), "Q8_0"]);
    let again = Gguf::open(&small).unwrap();
    assert!(nmse(&again, &builtin).values().all(|&error| error < 1e-8));
    // ... or gets the 6 of an output; rows of 128 are no super-blocks, which is said.
    let output = mtad(&["quantize", path(&full), path(&small), "Q4_K_M"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("no whole blocks of Q4_K; stored as Q5_0"), "{stderr}");
    let small = Gguf::open(&small).unwrap();
    assert_eq!(small.tensor("token_embd.weight").unwrap().block_type, BlockType::Q8_0);
    assert_eq!(small.get_u64("general.file_type").unwrap(), Some(15));
}

#[test]
fn the_input_and_what_was_there_are_never_lost() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let input = at("in.gguf");
    std::fs::write(&input, tiny_llama().to_vec()).unwrap();
    let bytes = std::fs::read(&input).unwrap();
    let refused = mtad(&["quantize", path(&input), path(&input), "Q4_0", "--requantize"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is the input"));
    assert_eq!(std::fs::read(&input).unwrap(), bytes);

    // A weight that is no number, or too large: the old output stays, and nothing half-written.
    let (broken, out) = (at("broken.gguf"), at("out.gguf"));
    std::fs::write(&out, "precious").unwrap();
    for (weight, what) in [(f32::NAN, "not a finite"), (1e9, "too large for Q4_0")] {
        let mut writer = sentencepiece(&["a"]);
        let mut bad = vec![1f32; 64];
        bad[40] = weight;
        let bad: Vec<u8> = bad.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.tensor("blk.0.ffn_up.weight", &[32, 2], BlockType::F32, bad);
        std::fs::write(&broken, writer.to_vec()).unwrap();
        let failed = mtad(&["quantize", path(&broken), path(&out), "Q4_0"]);
        let stderr = String::from_utf8(failed.stderr).unwrap();
        assert_eq!(failed.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("blk.0.ffn_up.weight") && stderr.contains(what), "{stderr}");
        assert_eq!(std::fs::read(&out).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    for (args, code, what) in [
        (&["nowhere.gguf", "x.gguf", "Q4_0"][..], 1, "nowhere.gguf"),
        (&["builtin:draft", "x.gguf", "Q9_X"], 2, "there is no weight type `Q9_X`"),
        (&["builtin:draft", path(folder.path()), "F16", "--requantize"], 2, "is no name"),
        (&["builtin:draft", "no/such/place.gguf", "F16", "--requantize"], 1, "no/such/place.gguf"),
    ] {
        let output = mtad(&[&["quantize"], args].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(what) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}
