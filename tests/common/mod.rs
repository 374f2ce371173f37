//! What several tests need: where the reference data lie, numpy files, small vocabularies.
#![allow(dead_code, missing_docs)] // Every test uses a part of it.

pub mod checkpoint;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mtad::engine::{Device, Model, SessionOptions};
use mtad::exec::cpu::{Cpu, Isa};
use mtad::exec::wgpu::Adapter;
use mtad::gguf::{Gguf, OwnedValue, Writer};
use mtad::lm::{Batch, Row, Want};
use mtad::quant::BlockType;

/// A file or folder of the reference data: below `MTAD_SHARED`, or else below `../shared` beside
/// the package. `None`, with a line that says so, where there is none; in CI that is a failure.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("MTAD_SHARED").filter(|root| !root.is_empty()) {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    let path = root.join(path);
    if path.exists() {
        return Some(path);
    }
    let why = format!("{} is not there; MTAD_SHARED names the reference data", path.display());
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{why}");
    eprintln!("skipped: {why}");
    None
}

/// The first adapter. `None`, with a line that says so, where there is none; a failure if
/// `MTAD_REQUIRE_GPU` is set.
pub fn adapter() -> Option<Adapter> {
    let found = Adapter::all().into_iter().next();
    if found.is_none() {
        let required = std::env::var_os("MTAD_REQUIRE_GPU").is_some_and(|v| v != "0");
        assert!(!required, "MTAD_REQUIRE_GPU is set, and no adapter was found");
        eprintln!("skipped: no adapter was found (a Vulkan driver such as lavapipe would do)");
    }
    found
}

/// Every way to run a model here: each instruction set of the CPU; the first adapter, with all
/// layers and with the last one only.
pub fn devices() -> Vec<Device> {
    let sets = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let mut devices: Vec<Device> =
        sets.map(|isa| Device::Cpu(Arc::new(Cpu::with_isa(2, isa).unwrap()))).collect();
    if let Some(adapter) = adapter() {
        for layers in [None, Some(1)] {
            let cpu = Cpu::new(1).unwrap();
            devices.push(Device::named(adapter.name(), cpu, layers).unwrap());
        }
    }
    devices
}

/// Token types as GGUF numbers them.
pub const NORMAL: i32 = 1;
pub const UNKNOWN: i32 = 2;
pub const CONTROL: i32 = 3;
pub const USER_DEFINED: i32 = 4;
pub const BYTE: i32 = 6;

/// A SentencePiece vocabulary: `<unk>`, `<s>`, `</s>`, the 256 bytes, then `pieces` with scores
/// 0, -1, -2 ... The first piece has id 259.
pub fn sentencepiece(pieces: &[&str]) -> Writer {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    let mut types = vec![UNKNOWN, CONTROL, CONTROL];
    let mut scores = vec![0.0; 3 + 256];
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([BYTE; 256]);
    for (rank, piece) in pieces.iter().enumerate() {
        tokens.push((*piece).to_owned());
        types.push(NORMAL);
        scores.push(-(rank as f32));
    }
    let mut writer = Writer::new();
    writer
        .set("general.architecture", "llama")
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens))
        .set("tokenizer.ggml.scores", OwnedValue::F32s(scores))
        .set("tokenizer.ggml.token_type", OwnedValue::I32s(types))
        .set("tokenizer.ggml.bos_token_id", 1u32)
        .set("tokenizer.ggml.eos_token_id", 2u32)
        .set("tokenizer.ggml.unknown_token_id", 0u32);
    writer
}

/// A byte-level vocabulary: the printable ASCII characters, `Ġ` for the space, what `merges`
/// make, then `<|endoftext|>`, which begins and ends texts.
pub fn byte_level(pre: &str, merges: &[&str]) -> Writer {
    let mut tokens: Vec<String> = (b'!'..=b'~').map(|byte| char::from(byte).to_string()).collect();
    tokens.push("Ġ".to_owned());
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut types = vec![NORMAL; tokens.len()];
    let end = tokens.len() as u32;
    tokens.push("<|endoftext|>".to_owned());
    types.push(CONTROL);
    let mut writer = Writer::new();
    writer
        .set("general.architecture", "gpt2")
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", pre)
        .set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens))
        .set("tokenizer.ggml.token_type", OwnedValue::I32s(types))
        .set("tokenizer.ggml.merges", strings(merges))
        .set("tokenizer.ggml.bos_token_id", end)
        .set("tokenizer.ggml.eos_token_id", end);
    writer
}

/// Texts with their ids by one of the reference vocabularies: llama.cpp's own vectors, then the
/// harder ones.
pub fn vectors(name: &str) -> Vec<(String, Vec<u32>)> {
    let read = |path: String| std::fs::read_to_string(shared(&path).unwrap()).unwrap();
    let base = format!("vectors/tokenizer/ggml-vocab-{name}.gguf");
    let inputs = read(format!("{base}.inp"));
    let outputs = read(format!("{base}.out"));
    // The separator stands behind every text, the last one too.
    const SEPARATOR: &str = "\n__ggml_vocab_test__\n";
    let inputs: Vec<&str> = inputs.strip_suffix(SEPARATOR).unwrap().split(SEPARATOR).collect();
    let outputs: Vec<&str> = outputs.lines().collect();
    assert_eq!((inputs.len(), outputs.len()), (46, 46));
    let mut vectors: Vec<_> = inputs
        .into_iter()
        .zip(outputs)
        .map(|(text, ids)| {
            let ids = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
            (text.to_owned(), ids)
        })
        .collect();

    #[derive(serde::Deserialize)]
    struct Entry {
        text: String,
        ids: Vec<u32>,
    }
    let harder: Vec<Entry> =
        serde_json::from_str(&read(format!("vectors/tokenizer/tok_pub_{name}.json"))).unwrap();
    assert_eq!(harder.len(), 200);
    vectors.extend(harder.into_iter().map(|entry| (entry.text, entry.ids)));
    vectors
}

/// A metadata array of strings.
pub fn strings(texts: &[&str]) -> OwnedValue {
    OwnedValue::Strings(texts.iter().map(|text| (*text).to_owned()).collect())
}

/// The file in memory, as a reader sees it.
pub fn gguf(writer: &Writer) -> Gguf {
    Gguf::from_vec("test.gguf", writer.to_vec()).expect("the writer writes sound files")
}

/// The elements of a numpy file of `<f8` or `<f4`.
pub fn read_npy(path: &Path) -> Vec<f64> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let header = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    let text = std::str::from_utf8(&bytes[10..10 + header]).unwrap();
    assert!(text.contains("'fortran_order': False"), "{text}");
    let data = &bytes[10 + header..];
    if text.contains("'<f8'") {
        data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    } else {
        assert!(text.contains("'<f4'"), "{text}");
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
    }
}

/// Logits of every row, fed in groups of `group`.
pub fn logits(model: &Model, tokens: &[u32], group: usize) -> Vec<f32> {
    logits_in(&SessionOptions::default(), model, tokens, group)
}

/// The same in a session with other options.
pub fn logits_in(
    options: &SessionOptions,
    model: &Model,
    tokens: &[u32],
    group: usize,
) -> Vec<f32> {
    let mut lm = model.session(options).unwrap();
    let mut out = Vec::new();
    for piece in tokens.chunks(group) {
        let mut batch = Batch::new();
        for (i, &token) in piece.iter().enumerate() {
            batch.push(token, i.checked_sub(1).map(|p| Row(p as u32)), Want::Logits);
        }
        let outputs = lm.eval(&batch).unwrap();
        (0..piece.len()).for_each(|i| out.extend_from_slice(outputs.logits(i)));
        lm.commit(Some(Row(piece.len() as u32 - 1))).unwrap();
    }
    out
}

/// Normalised mean squared error: sum (x - exact)^2 / sum exact^2.
pub fn nmse(x: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(x.len(), exact.len());
    let error: f64 = x.iter().zip(exact).map(|(&x, e)| (f64::from(x) - e).powi(2)).sum();
    error / exact.iter().map(|e| e * e).sum::<f64>()
}

/// A Llama model of one layer with random weights and a vocabulary of 264 tokens: width 64, two
/// heads of 32 that share one key/value head.
pub fn tiny_llama() -> Writer {
    let mut writer = sentencepiece(&["a", "b", "ab", "▁", "▁ab"]);
    let vocab = 3 + 256 + 5;
    writer
        .set("llama.context_length", 512u32)
        .set("llama.embedding_length", 64u32)
        .set("llama.block_count", 1u32)
        .set("llama.feed_forward_length", 96u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.attention.head_count_kv", 1u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let mut state = 1u64;
    let mut weights = |n: u64| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| 0.3 * next()).collect()
    };
    for (name, cols, rows) in [
        ("token_embd", 64, vocab),
        ("blk.0.attn_q", 64, 64),
        ("blk.0.attn_k", 64, 32),
        ("blk.0.attn_v", 64, 32),
        ("blk.0.attn_output", 64, 64),
        ("blk.0.ffn_gate", 64, 96),
        ("blk.0.ffn_up", 64, 96),
        ("blk.0.ffn_down", 96, 64),
    ] {
        let mut blocks = vec![0; (cols * rows / 32 * 34) as usize];
        BlockType::Q8_0.quantize(&weights(cols * rows), &mut blocks);
        writer.tensor(&format!("{name}.weight"), &[cols, rows], BlockType::Q8_0, blocks);
    }
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
        let ones: Vec<u8> = [1f32; 64].iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.tensor(&format!("{name}.weight"), &[64], BlockType::F32, ones);
    }
    writer
}
