//! `mtad convert`: weights and figures of checkpoint folders. (Their tokenizers:
//! `convert_tokenizers.rs`; OPT: `opt.rs`.)

mod common;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use mtad::convert::convert;
use mtad::engine::{Device, Model};
use mtad::exec::cpu::Cpu;
use mtad::gguf::{Gguf, Value as Metadata};
use mtad::quant::BlockType;
use serde_json::{Value, json};
use tempfile::TempDir;

use common::checkpoint::{Checkpoint, HEAD, LAYERS, Stored, WIDTH, safetensors};
use common::{logits, nmse, tiny_llama};

const VOCAB: usize = 80;

fn mtad(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.env("MTAD_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"));
    command.args(args).stdin(Stdio::null()).output().expect("the binary runs")
}

/// A place for checkpoints and what becomes of them.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Converts a folder; what is reported, and the file.
    fn convert(&self, folder: &str, out: &str, options: &[&str]) -> (Value, Gguf) {
        let (folder, out) = (self.name(folder), self.name(out));
        let output = mtad(&[&["convert", &folder, &out, "--json"], options].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{folder} {options:?}: {stderr}");
        (serde_json::from_slice(&output.stdout).unwrap(), Gguf::open(out).unwrap())
    }

    /// Writes a checkpoint and converts it with its weights as they are.
    fn converted(&self, name: &str, checkpoint: &Checkpoint) -> Gguf {
        checkpoint.write(&self.path(name));
        self.convert(name, &format!("{name}.gguf"), &["--type", "f32"]).1
    }
}

/// Logits of 60 tokens.
fn run(file: Gguf) -> Vec<f32> {
    let device = Device::Cpu(Arc::new(Cpu::new(2).unwrap()));
    let model = Model::load(Arc::new(file), &device, &mut |_, _| true).unwrap();
    let tokens: Vec<u32> = (0..60).map(|i| (i * i + 5 * i) % VOCAB as u32).collect();
    logits(&model, &tokens, 16)
}

fn exact(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

#[test]
fn a_llama_gives_the_logits_of_the_same_weights_written_as_gguf() {
    let place = Place::new();
    let checkpoint = Checkpoint::llama(VOCAB);
    let file = place.converted("llama", &checkpoint);
    let written = checkpoint.as_gguf();
    assert_eq!(file.tensors().len(), written.tensors().len());
    for tensor in written.tensors() {
        let found = file.tensor(tensor.name).unwrap();
        assert_eq!((found.rows, found.cols), (tensor.rows, tensor.cols), "{}", tensor.name);
        assert!(found.bytes == tensor.bytes, "{}", tensor.name);
    }
    let expected = run(written);
    assert!(run(file) == expected);

    // The same weights as a Qwen2, whose rows keep the checkpoint's order and whose pairs are
    // halves: the order of a Llama's rows is right only if both come to the same.
    let mut qwen2 = Checkpoint::qwen2(VOCAB);
    for tensor in &mut qwen2.tensors {
        match tensor.name.ends_with("bias") {
            true => tensor.bytes.fill(0),
            false => {
                let same = checkpoint.tensors.iter().find(|other| other.name == tensor.name);
                tensor.bytes = same.unwrap().bytes.clone();
            }
        }
    }
    let file = place.converted("qwen2", &qwen2);
    assert_eq!(file.get_str("general.architecture").unwrap(), Some("qwen2"));
    let error = nmse(&run(file), &exact(&expected));
    assert!(error < 1e-7, "NMSE {error:.1e}");
    // And biases of queries count.
    qwen2.tensor("model.layers.0.self_attn.q_proj.bias").bytes =
        1f32.to_le_bytes().repeat(4 * HEAD);
    let error = nmse(&run(place.converted("biased", &qwen2)), &exact(&expected));
    assert!(error > 1e-4, "NMSE {error:.1e}");
}

#[test]
fn biases_of_a_llama_are_put_in_order_like_its_rows() {
    let place = Place::new();
    let mut qwen2 = Checkpoint::qwen2(VOCAB);
    let expected = run(place.converted("qwen2", &qwen2));
    // A Llama with biases has one more, on the output of attention.
    for i in 0..LAYERS {
        let name = format!("model.layers.{i}.self_attn.o_proj.bias");
        qwen2.tensors.push(Stored {
            name,
            dtype: "F32",
            shape: vec![WIDTH],
            bytes: vec![0; 4 * WIDTH],
        });
    }
    let llama = qwen2.with(json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": true,
    }));
    let error = nmse(&run(place.converted("llama", &llama)), &exact(&expected));
    assert!(error < 1e-7, "NMSE {error:.1e}");
}

#[test]
fn shards_make_the_same_file() {
    let place = Place::new();
    let checkpoint = Checkpoint::llama(VOCAB);
    checkpoint.write(&place.path("one/model"));
    checkpoint.write_shards(&place.path("three/model"));
    place.convert("one/model", "one.gguf", &["--type", "q8_0"]);
    let (report, _) = place.convert("three/model", "three.gguf", &["--type", "q8_0"]);
    let read = |name| std::fs::read(place.path(name)).unwrap();
    assert!(read("one.gguf") == read("three.gguf"));
    let shard = |i| format!("three/model/model-{i:05}-of-00003.safetensors");
    let len = |name: String| std::fs::metadata(place.path(&name)).unwrap().len();
    assert_eq!(report["input_bytes"], (1..4).map(shard).map(len).sum::<u64>());
}

#[test]
fn weights_are_stored_in_the_type_that_is_asked_for() {
    let place = Place::new();
    let checkpoint = Checkpoint::llama(VOCAB);
    checkpoint.write(&place.path("f32"));
    let types = |file: &Gguf| -> Vec<&str> {
        let mut types: Vec<_> =
            file.tensors().filter(|t| t.rows > 1).map(|t| t.block_type.name()).collect();
        types.sort_unstable();
        types.dedup();
        types
    };
    // Every weight is rounded once, to the nearest.
    let (report, file) = place.convert("f32", "f16.gguf", &["--type", "F16"]);
    assert_eq!((types(&file), &report["type"]), (vec!["F16"], &json!("F16")));
    assert_eq!(file.get_u64("general.file_type").unwrap(), Some(1));
    let written = checkpoint.as_gguf();
    for tensor in written.tensors() {
        let found = file.tensor(tensor.name).unwrap();
        let floats = |t: mtad::gguf::Tensor<'_>| {
            let mut floats = vec![0.0; t.rows * t.cols];
            t.block_type.dequantize(t.bytes, &mut floats);
            floats
        };
        let (rounded, mut exact) = (floats(found), floats(tensor));
        match tensor.rows {
            1 => assert_eq!(found.block_type, BlockType::F32),
            _ => exact.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
        }
        assert!(rounded == exact, "{}", tensor.name);
    }

    // Without a type: the checkpoint's 16 bits.
    for (dtype, wanted) in [("F32", "F16"), ("F16", "F16"), ("BF16", "BF16")] {
        match dtype {
            "F32" => checkpoint.write(&place.path("any")),
            _ => checkpoint.in_16_bits(dtype).write(&place.path("any")),
        }
        let (_, file) = place.convert("any", "any.gguf", &[]);
        assert_eq!(types(&file), [wanted], "{dtype}");
    }

    // Of a checkpoint in F16, other types are what `quantize` makes of its file.
    checkpoint.in_16_bits("F16").write(&place.path("half"));
    place.convert("half", "half.gguf", &["--type", "f16"]);
    for name in ["Q8_0", "Q4_0", "Q4_K_M"] {
        let (report, file) = place.convert("half", "direct.gguf", &["--type", name]);
        assert_eq!(report["type"], name);
        let two = mtad(&["quantize", &place.name("half.gguf"), &place.name("two.gguf"), name]);
        assert!(two.status.success(), "{}", String::from_utf8_lossy(&two.stderr));
        let two = Gguf::open(place.path("two.gguf")).unwrap();
        assert!(file.tensor("blk.0.attn_q.weight").unwrap().block_type.name() != "F16");
        assert_eq!(file.digest(), two.digest(), "{name}");
        let kind = |file: &Gguf| file.get_u64("general.file_type").unwrap();
        assert_eq!(kind(&file), kind(&two), "{name}");
    }
    let unknown = mtad(&["convert", &place.name("half"), &place.name("x.gguf"), "--type", "q9"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("Q8_0"));
}

#[test]
fn figures_of_the_config_become_metadata() {
    let place = Place::new();
    let number = |file: &Gguf, key: &str| file.get_f32(key).unwrap();
    let llama = || Checkpoint::llama(VOCAB);

    let file = place.converted("My-Llama", &llama());
    assert_eq!(file.get_str("general.name").unwrap(), Some("My-Llama"));
    for (key, value) in [
        ("context_length", 256),
        ("embedding_length", WIDTH as u64),
        ("block_count", LAYERS as u64),
        ("feed_forward_length", 96),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", HEAD as u64),
        ("vocab_size", VOCAB as u64),
    ] {
        assert_eq!(file.get_u64(&format!("llama.{key}")).unwrap(), Some(value), "{key}");
    }
    assert_eq!(number(&file, "llama.rope.freq_base"), Some(5000.0));
    assert_eq!(number(&file, "llama.attention.layer_norm_rms_epsilon"), Some(1e-5));
    for key in ["rope.scaling.type", "attention.sliding_window", "attention.key_length"] {
        assert!(file.get(&format!("llama.{key}")).is_none(), "{key}");
    }

    // Tied: no output of its own, though the checkpoint may store it again.
    let file = place.converted("tied", &llama().with(json!({"tie_word_embeddings": true})));
    assert!(file.tensor("output.weight").is_none());
    // Heads of another length than the width's share.
    let mut long = llama().with(json!({"head_dim": 32, "num_attention_heads": 2}));
    long.config["num_key_value_heads"] = 1.into();
    let file = place.converted("long", &long);
    assert_eq!(file.get_u64("llama.rope.dimension_count").unwrap(), Some(32));
    let file = place.converted("short", &llama().with(json!({"head_dim": 16})));
    assert_eq!(file.get_u64("llama.rope.dimension_count").unwrap(), Some(16));

    // Bases and scalings of rotary positions, in the old form and the new.
    let theta = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 700.0}});
    let file = place.converted("theta", &llama().with(theta));
    assert_eq!(number(&file, "llama.rope.freq_base"), Some(700.0));
    let file = place.converted("bare", &llama().with(json!({"rope_theta": null})));
    assert_eq!(number(&file, "llama.rope.freq_base"), Some(10_000.0));
    let linear = json!({"rope_scaling": {"type": "linear", "factor": 2.5}});
    let file = place.converted("linear", &llama().with(linear));
    assert_eq!(file.get_str("llama.rope.scaling.type").unwrap(), Some("linear"));
    assert_eq!(number(&file, "llama.rope.scaling.factor"), Some(2.5));

    let llama3 = json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }});
    let file = place.converted("llama3", &llama().with(llama3));
    let factors = file.tensor("rope_freqs.weight").unwrap();
    let factors: Vec<f32> =
        factors.bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    // In 64 positions pairs turn 64 / 2 pi x 5000^(-i/8) times: 10.2, 3.51, 1.21, 0.42 ...
    let turns = |i: i32| 64.0 / std::f64::consts::TAU * 5000f64.powf(f64::from(-i) / 8.0);
    let between = |i| {
        let kept = (turns(i) - 1.0) / 3.0;
        (1.0 / (kept + (1.0 - kept) / 8.0)) as f32
    };
    let expected = [1.0, between(1), between(2), 8.0, 8.0, 8.0, 8.0, 8.0];
    assert!(factors.iter().zip(expected).all(|(f, e)| (f / e - 1.0).abs() < 1e-6), "{factors:?}");

    // YaRN: readers multiply by 1 + 0.1 ln s of their own accord.
    let own = 1.0 + 0.1 * 4f64.ln();
    for (stated, expected) in [
        (json!({}), None),
        (json!({"attention_factor": 1.3}), Some(1.3 / own)),
        (json!({"attention_factor": own}), None),
        (json!({"mscale": 1.0, "mscale_all_dim": 1.0}), Some(1.0 / own)),
        (json!({"mscale": 2.0, "mscale_all_dim": 0.5}), {
            Some((1.0 + 0.2 * 4f64.ln()) / (1.0 + 0.05 * 4f64.ln()) / own)
        }),
    ] {
        let mut yarn = json!({"type": "yarn", "factor": 4.0, "beta_fast": 16.0});
        yarn["original_max_position_embeddings"] = 64.into();
        stated.as_object().unwrap().iter().for_each(|(key, x)| yarn[key] = x.clone());
        let file = place.converted("yarn", &llama().with(json!({"rope_scaling": yarn})));
        let key = |name: &str| number(&file, &format!("llama.rope.scaling.{name}"));
        assert_eq!(file.get_str("llama.rope.scaling.type").unwrap(), Some("yarn"));
        assert_eq!((key("factor"), key("original_context_length")), (Some(4.0), Some(64.0)));
        assert_eq!((key("yarn_beta_fast"), key("yarn_beta_slow")), (Some(16.0), None));
        let found = key("attn_factor");
        let close = match (found, expected) {
            (Some(found), Some(expected)) => (f64::from(found) / expected - 1.0).abs() < 1e-6,
            (found, expected) => found.is_none() && expected.is_none(),
        };
        assert!(close, "{stated}: {found:?}, not {expected:?}");
    }

    // Windows.
    let mistral = |window: Value| {
        let config = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"});
        let mut checkpoint = llama().with(config);
        checkpoint.config["sliding_window"] = window;
        checkpoint
    };
    let qwen2 = |changes| Checkpoint::qwen2(VOCAB).with(changes);
    let all = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 0});
    for (name, checkpoint, window) in [
        ("mistral", mistral(Value::Null), None),
        ("mistral-window", mistral(17.into()), Some(17)),
        ("qwen2", qwen2(json!({"sliding_window": 9, "max_window_layers": 0})), None),
        ("qwen2-off", qwen2(json!({"use_sliding_window": false, "sliding_window": 9})), None),
        ("qwen2-window", qwen2(all), Some(9)),
        ("qwen2-late", qwen2(json!({"use_sliding_window": true, "max_window_layers": 2})), None),
    ] {
        let file = place.converted(name, &checkpoint);
        let architecture = if name.starts_with("qwen2") { "qwen2" } else { "llama" };
        let key = format!("{architecture}.attention.sliding_window");
        assert_eq!(file.get_u64(&key).unwrap(), window, "{name}");
    }
}

#[test]
fn a_folder_without_tokenizer_is_for_token_ids_only() {
    let place = Place::new();
    Checkpoint::llama(VOCAB).write(&place.path("bare"));
    let out = place.name("bare.gguf");
    let output = mtad(&["convert", &place.name("bare"), &out]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("has no tokenizer") && stderr.contains("vocab.json"), "{stderr}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("without a tokenizer"));
    let (report, file) = place.convert("bare", "bare.gguf", &[]);
    assert!(report["tokenizer"].is_null(), "{report}");
    assert!(report["notes"][0].as_str().unwrap().contains("has no tokenizer"), "{report}");
    assert!(file.metadata().all(|(key, _)| !key.starts_with("tokenizer.")));

    let npy = place.name("bare.npy");
    let logits = mtad(&["logits", "--model", &out, "--tokens", "1,2,79", "--out", &npy]);
    assert!(logits.status.success(), "{}", String::from_utf8_lossy(&logits.stderr));
    assert_eq!(common::read_npy(Path::new(&npy)).len(), 3 * VOCAB);
    let failed = mtad(&["run", "text", "--model", &out]);
    let stderr = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(failed.status.code(), Some(1));
    for words in [&*out, "has no tokenizer", "a file with the vocabulary is needed"] {
        assert!(stderr.contains(words), "{stderr}");
    }
}

/// A folder that cannot be converted.
struct Bad {
    what: &'static str,
    folder: Box<dyn Fn(&Path)>,
    /// The file that the message names, in the folder.
    file: &'static str,
    words: &'static [&'static str],
}

/// Checkpoints that differ from a sound one.
fn bad(
    what: &'static str,
    file: &'static str,
    words: &'static [&'static str],
    folder: impl Fn(&Path) + 'static,
) -> Bad {
    Bad { what, folder: Box::new(folder), file, words }
}

fn changed(change: impl Fn(&mut Checkpoint)) -> impl Fn(&Path) {
    move |folder| {
        let mut checkpoint = Checkpoint::llama(VOCAB);
        change(&mut checkpoint);
        checkpoint.write(folder);
    }
}

fn config(changes: Value) -> impl Fn(&Path) {
    move |folder| Checkpoint::llama(VOCAB).with(changes.clone()).write(folder)
}

/// A sound checkpoint, or its shards, one of whose files then becomes something else.
fn file(shards: bool, name: &'static str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> impl Fn(&Path) {
    move |folder| {
        match shards {
            true => Checkpoint::llama(VOCAB).write_shards(folder),
            false => Checkpoint::llama(VOCAB).write(folder),
        }
        let old = std::fs::read(folder.join(name)).unwrap_or_default();
        std::fs::write(folder.join(name), change(old)).unwrap();
    }
}

const ONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SECOND: &str = "model-00002-of-00003.safetensors";

#[test]
fn bad_folders_are_refused_by_file_and_leave_nothing_behind() {
    let cases = [
        // The config.
        bad("no config", "", &["has no config.json"], |folder| {
            Checkpoint::llama(VOCAB).write(folder);
            std::fs::remove_file(folder.join("config.json")).unwrap();
        }),
        bad(
            "broken JSON",
            "config.json",
            &["no sound JSON", "line 1"],
            file(false, "config.json", |text| text[..50].to_vec()),
        ),
        bad(
            "no object",
            "config.json",
            &["no object"],
            file(false, "config.json", |_| b"[1]".to_vec()),
        ),
        bad(
            "an architecture that is not known",
            "config.json",
            &["GPTNeoXForCausalLM", "`LlamaForCausalLM`", "`OPTForCausalLM` are converted"],
            config(json!({"architectures": ["GPTNeoXForCausalLM"]})),
        ),
        bad(
            "no architecture",
            "config.json",
            &["`architectures` is missing", "`LlamaForCausalLM`"],
            config(json!({"architectures": null})),
        ),
        bad(
            "two architectures",
            "config.json",
            &["`architectures` is [", "a list of one name"],
            config(json!({"architectures": ["LlamaForCausalLM", "OPTForCausalLM"]})),
        ),
        bad(
            "another model type",
            "config.json",
            &["`model_type` is \"gemma\"", "`llama` goes with LlamaForCausalLM"],
            config(json!({"model_type": "gemma"})),
        ),
        bad(
            "quantized by another program",
            "config.json",
            &["`quantization_config`", "F32, F16 or BF16"],
            config(json!({"quantization_config": {"quant_method": "gptq"}})),
        ),
        bad(
            "another activation",
            "config.json",
            &["`hidden_act` is \"gelu\"", "`silu`"],
            config(json!({"hidden_act": "gelu"})),
        ),
        bad(
            "no width",
            "config.json",
            &["`hidden_size` is missing", "a whole number from 1"],
            config(json!({"hidden_size": null})),
        ),
        bad(
            "an absurd width",
            "config.json",
            &["`hidden_size` is 99999999999", "16777216"],
            config(json!({"hidden_size": 99_999_999_999u64})),
        ),
        bad(
            "words for a number",
            "config.json",
            &["`num_attention_heads` is \"four\""],
            config(json!({"num_attention_heads": "four"})),
        ),
        bad(
            "heads that do not share evenly",
            "config.json",
            &["`num_key_value_heads` is 3", "a divisor"],
            config(json!({"num_key_value_heads": 3})),
        ),
        bad(
            "a scaling that is not known",
            "config.json",
            &["`rope_scaling.rope_type` is \"dynamic\"", "`llama3` and `yarn` are converted"],
            config(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})),
        ),
        bad(
            "a scaling without its factor",
            "config.json",
            &["`rope_scaling.factor` is missing"],
            config(json!({"rope_scaling": {"type": "linear"}})),
        ),
        bad(
            "windows on some layers",
            "config.json",
            &["1 of 2 layers", "`max_window_layers`"],
            |folder| {
                let window = json!({"use_sliding_window": true, "max_window_layers": 1});
                Checkpoint::qwen2(VOCAB).with(window).write(folder);
            },
        ),
        // The tensors.
        bad(
            "a wrong shape",
            ONE,
            &["`model.layers.1.mlp.up_proj.weight` is 64 x 96", "asks for 96 x 64"],
            changed(|c| c.tensor("model.layers.1.mlp.up_proj.weight").shape = vec![64, 96]),
        ),
        bad(
            "another vocabulary's embedding",
            ONE,
            &["`model.embed_tokens.weight` is 80 x 64", "asks for 81 x 64"],
            config(json!({"vocab_size": 81})),
        ),
        bad(
            "a missing tensor",
            ONE,
            &["`model.norm.weight` is missing", "asks for 64"],
            changed(|c| c.tensors.retain(|t| t.name != "model.norm.weight")),
        ),
        bad(
            "a missing output",
            ONE,
            &["`lm_head.weight` is missing"],
            changed(|c| c.tensors.retain(|t| t.name != "lm_head.weight")),
        ),
        bad(
            "a tensor too many",
            ONE,
            &["`model.layers.0.adapter.weight`", "no part of the architecture `llama`"],
            changed(|c| {
                let mut more = c.tensors[1].clone();
                more.name = "model.layers.0.adapter.weight".to_owned();
                c.tensors.push(more);
            }),
        ),
        bad(
            "whole numbers",
            ONE,
            &["`model.layers.0.mlp.up_proj.weight` is I32", "F32, F16 and BF16 are read"],
            changed(|c| c.tensor("model.layers.0.mlp.up_proj.weight").dtype = "I32"),
        ),
        // Found only when half of the file is written.
        bad(
            "a weight that is no number",
            ONE,
            &["`model.layers.1.mlp.up_proj.weight`", "not a finite number"],
            changed(|c| {
                let bytes = &mut c.tensor("model.layers.1.mlp.up_proj.weight").bytes;
                bytes[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
            }),
        ),
        bad(
            "a weight that is too large",
            ONE,
            &["`model.layers.1.mlp.down_proj.weight`", "too large for F16", "BF16 would hold it"],
            changed(|c| {
                let bytes = &mut c.tensor("model.layers.1.mlp.down_proj.weight").bytes;
                bytes[400..404].copy_from_slice(&1e9f32.to_le_bytes());
            }),
        ),
        // The files of weights.
        bad("no weights", "", &["has neither model.safetensors nor"], |folder| {
            Checkpoint::llama(VOCAB).write(folder);
            std::fs::remove_file(folder.join(ONE)).unwrap();
        }),
        bad("weights in another format", "", &["pytorch_model.bin", "safetensors"], |folder| {
            Checkpoint::llama(VOCAB).write(folder);
            std::fs::rename(folder.join(ONE), folder.join("pytorch_model.bin")).unwrap();
        }),
        bad(
            "weights cut short",
            ONE,
            &["cut short", "the file has"],
            file(false, ONE, |bytes| bytes[..bytes.len() - 5].to_vec()),
        ),
        bad("a header cut short", ONE, &["cut short"], {
            file(false, ONE, |bytes| bytes[..300].to_vec())
        }),
        bad("some bytes", ONE, &["3 bytes"], file(false, ONE, |_| b"abc".to_vec())),
        bad("nothing", ONE, &["is empty"], file(false, ONE, |_| Vec::new())),
        bad(
            "a header that is no JSON",
            ONE,
            &["no sound safetensors header"],
            file(false, ONE, |mut bytes| {
                bytes[9] = b'!';
                bytes
            }),
        ),
        bad("a missing shard", INDEX, &["`model-00002-of-00003.safetensors`", "not there"], {
            |folder: &Path| {
                Checkpoint::llama(VOCAB).write_shards(folder);
                std::fs::remove_file(folder.join(SECOND)).unwrap();
            }
        }),
        bad("a shard cut short", SECOND, &["cut short"], {
            file(true, SECOND, |bytes| bytes[..bytes.len() / 2].to_vec())
        }),
        bad("another shard in its place", SECOND, &["has no tensor", INDEX], {
            file(true, SECOND, |_| {
                safetensors(&[Stored {
                    name: "other".to_owned(),
                    dtype: "F32",
                    shape: vec![1],
                    bytes: vec![0; 4],
                }])
            })
        }),
        bad(
            "a shard twice",
            SECOND,
            &["has the tensor `", ", and so has", "model-00001-of-00003"],
            {
                |folder: &Path| {
                    let checkpoint = Checkpoint::llama(VOCAB);
                    checkpoint.write_shards(folder);
                    std::fs::write(folder.join(SECOND), safetensors(&checkpoint.tensors)).unwrap();
                }
            },
        ),
        bad("an index without a map", INDEX, &["`weight_map` is missing"], {
            file(true, INDEX, |_| b"{}".to_vec())
        }),
        bad("an index of nothing", INDEX, &["`weight_map` is {}"], {
            file(true, INDEX, |_| b"{\"weight_map\": {}}".to_vec())
        }),
        bad(
            "an index that leads out of the folder",
            INDEX,
            &["`weight_map.a.weight` is \"../x.safetensors\"", "beside it"],
            file(true, INDEX, |_| {
                b"{\"weight_map\": {\"a.weight\": \"../x.safetensors\"}}".to_vec()
            }),
        ),
    ];
    for case in cases {
        let place = Place::new();
        (case.folder)(&place.path("model"));
        // Once where nothing was, once where something is.
        for was in [None, Some("precious")] {
            if let Some(was) = was {
                std::fs::write(place.path("out.gguf"), was).unwrap();
            }
            let output =
                mtad(&["convert", &place.name("model"), &place.name("out.gguf"), "--json"]);
            let stderr = String::from_utf8(output.stderr).unwrap();
            let what = case.what;
            assert_eq!(output.status.code(), Some(1), "{what}: {stderr}");
            assert!(output.stdout.is_empty() && !stderr.contains("panicked"), "{what}: {stderr}");
            let named = place.path("model").join(case.file).display().to_string();
            assert!(stderr.contains(named.trim_end_matches('/')), "{what}: {stderr}");
            for words in case.words {
                assert!(stderr.contains(words), "{what}: {stderr} ({words})");
            }
            let left = std::fs::read(place.path("out.gguf")).ok();
            assert_eq!(left.as_deref(), was.map(str::as_bytes), "{what}");
            let files = std::fs::read_dir(place.0.path()).unwrap().count();
            assert_eq!(files, 1 + usize::from(was.is_some()), "{what}");
        }
    }
}

#[test]
fn outputs_replace_files_but_none_of_the_checkpoint() {
    let place = Place::new();
    Checkpoint::llama(VOCAB).write_shards(&place.path("model"));
    std::fs::write(place.path("model/README.md"), "about it").unwrap();
    std::fs::write(place.path("old.gguf"), tiny_llama().to_vec()).unwrap();
    // An older file is replaced, and the output may lie beside the weights.
    let (_, file) = place.convert("model", "old.gguf", &[]);
    assert_eq!(file.tensor("token_embd.weight").unwrap().rows, VOCAB);
    place.convert("model", "model/model.gguf", &[]);
    place.convert("model", "model/model.gguf", &[]);

    let folder = place.name("model");
    for name in ["config.json", SECOND, INDEX, "README.md"] {
        let before = std::fs::read(place.path("model").join(name)).unwrap();
        let refused = mtad(&["convert", &folder, &format!("{folder}/{name}")]);
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("is the input") && stderr.contains(name), "{stderr}");
        assert_eq!(std::fs::read(place.path("model").join(name)).unwrap(), before);
    }
    for (args, code, words) in [
        ([&*folder, &*folder], 2, "is no name for a file"),
        ([&folder, &format!("{folder}/no/such/place.gguf")], 1, "no/such/place.gguf"),
        ([&place.name("nowhere"), "x.gguf"], 1, "nowhere"),
        ([&place.name("old.gguf"), "x.gguf"], 1, "is no folder"),
    ] {
        let output = mtad(&[&["convert"], &args[..]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(words) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
    let names = std::fs::read_dir(place.path("model")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.contains(".part")));
}

#[test]
fn a_conversion_that_is_stopped_leaves_nothing() {
    let place = Place::new();
    Checkpoint::llama(VOCAB).write(&place.path("model"));
    let out = place.path("out.gguf");
    let mut calls = 0;
    let stopped = convert(&place.path("model"), &out, None, &mut |_, _, _| {
        calls += 1;
        calls < 9
    });
    assert!(matches!(stopped, Err(mtad::Error::Cancelled)), "{stopped:?}");
    assert_eq!(calls, 9);
    assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 1);

    // Progress ends where all bytes of the tensors are done.
    let mut last = (0, 1);
    convert(&place.path("model"), &out, None, &mut |_, done, total| {
        last = (done, total);
        true
    })
    .unwrap();
    assert_eq!(last.0, last.1);
    let file = Gguf::open(out).unwrap();
    assert!(matches!(file.get("general.quantization_version"), Some(Metadata::U32(2))));
}

/// Converts a model of eight tokens in this process; a panic is the failure. Errors name something
/// in the folder.
fn must_not_panic(what: &str, place: &Place) -> bool {
    let (folder, out) = (place.path("model"), place.path("out.gguf"));
    let converted = catch_unwind(|| convert(&folder, &out, None, &mut |_, _, _| true));
    match converted.unwrap_or_else(|_| panic!("{what}: it panicked")) {
        Ok(_) => {
            // What is converted can be run.
            let file = Arc::new(Gguf::open(&out).unwrap());
            let cpu = Device::Cpu(Arc::new(Cpu::new(1).unwrap()));
            let model = Model::load(file, &cpu, &mut |_, _| true);
            let model = model.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(logits(&model, &[1], 1).len(), 8, "{what}");
            true
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains(&place.name("model")), "{what}: {error}");
            false
        }
    }
}

#[test]
fn odd_values_in_a_config_do_no_harm() {
    let odd = json!([
        null, true, -1, 0, 1, 3, 16_777_217, 9_223_372_036_854_775_807u64, 0.5, -2.5, 1e300, "", "x",
        [], [1], {}, {"type": "yarn"}, {"a": {"b": []}}
    ]);
    let long = json!({
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "mscale": 1.0},
        "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0, "head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention"], "eos_token_id": [1, 2],
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 0, "quantization_config": null,
        "partial_rotary_factor": 1.0,
    });
    let place = Place::new();
    let (mut fine, mut refused) = (0, 0);
    for checkpoint in [Checkpoint::llama(8), Checkpoint::qwen2(8)] {
        let checkpoint = checkpoint.with(long.clone());
        checkpoint.write(&place.path("model"));
        assert!(must_not_panic("as it is", &place));
        let mut try_it = |path: &[&str], value: &Value| {
            let mut config = checkpoint.config.clone();
            *path.iter().fold(&mut config, |at, key| &mut at[*key]) = value.clone();
            std::fs::write(place.path("model/config.json"), config.to_string()).unwrap();
            match must_not_panic(&format!("{path:?} = {value}"), &place) {
                true => fine += 1,
                false => refused += 1,
            }
        };
        for value in odd.as_array().unwrap() {
            for (key, part) in checkpoint.config.as_object().unwrap() {
                try_it(&[key], value);
                part.as_object()
                    .into_iter()
                    .flatten()
                    .for_each(|(sub, _)| try_it(&[key, sub], value));
            }
        }
    }
    assert!(fine > 100 && refused > 500, "{fine} were fine, {refused} were refused");
}

#[test]
fn damaged_weights_do_no_harm() {
    let place = Place::new();
    Checkpoint::llama(8).write(&place.path("model"));
    let whole = std::fs::read(place.path("model").join(ONE)).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let write = |bytes: &[u8]| std::fs::write(place.path("model").join(ONE), bytes).unwrap();
    for cut in (0..header).step_by(7).chain((header..whole.len()).step_by(4999)) {
        write(&whole[..cut]);
        assert!(!must_not_panic(&format!("cut at {cut}"), &place), "cut at {cut}");
    }
    let mut noise = 0x2545_f491_4f6c_dd1du64;
    let mut refused = 0;
    for at in (0..8).chain((8..header).step_by(3)) {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (noise % 8);
        write(&bytes);
        refused += usize::from(!must_not_panic(&format!("bit in byte {at}"), &place));
    }
    assert!(refused > 500, "only {refused} damages were noticed");
}
