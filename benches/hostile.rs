//! What files cost that are made to be slow: ten times the size must take at most twelve times the
//! time. Exits with 1 where it takes more. Sizes are such that both fit into a processor's cache:
//! beyond it memory gets slower, whatever the work.
//!
//!     cargo bench --bench hostile

use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mtad::convert::convert;
use mtad::gguf::{Gguf, OwnedValue, Writer};
use mtad::quant::BlockType;
use mtad::tokenizer::{EncodeOptions, Tokenizer};
use serde_json::json;

/// How much longer ten times the size may take.
const MOST: f64 = 12.0;

/// Time that this thread has had, where the system tells (Linux): others that use the machine then
/// do not matter.
fn clock(start: Instant) -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let spent = stat.and_then(|stat| stat.split(' ').next()?.parse().ok());
    spent.map_or_else(|| start.elapsed(), Duration::from_nanos)
}

/// The time of a run: the least of some means, each over a time that the clock can tell.
fn time(mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    let mean = |_| {
        let before = clock(start);
        for runs in 1.. {
            work();
            let spent = clock(start) - before;
            if spent > Duration::from_millis(150) {
                return spent / runs;
            }
        }
        unreachable!("the numbers do not end")
    };
    (0..3).map(mean).min().unwrap_or_default()
}

/// Times work of a size and of ten times that. `make` prepares it. What others do with the machine
/// may spoil one comparison; what is wrong with the work shows in all.
fn compare<W: FnMut()>(name: &str, size: usize, make: impl Fn(usize) -> W) -> bool {
    let mut best = (f64::INFINITY, [Duration::ZERO; 2]);
    for _ in 0..4 {
        let times = [size, 10 * size].map(|size| time(make(size)));
        let ratio = times[1].as_secs_f64() / times[0].as_secs_f64();
        if ratio < best.0 {
            best = (ratio, times);
        }
        if ratio <= MOST {
            break;
        }
    }
    let (ratio, [small, large]) = best;
    let verdict = if ratio <= MOST { "" } else { "  TOO MUCH" };
    println!("{name:38} {size:>8} {small:>12.3?}  x 10 {large:>12.3?}  {ratio:>6.2}{verdict}");
    ratio <= MOST
}

/// A file with many tensors, each of one number.
fn tensors(count: usize) -> Gguf {
    let mut writer = Writer::new();
    for i in 0..count {
        writer.tensor(&format!("blk.{i}.weight"), &[1], BlockType::F32, vec![0; 4]);
    }
    Gguf::from_vec("tensors", writer.to_vec()).expect("a sound file")
}

fn look_up_tensors(count: usize) -> impl FnMut() {
    let file = tensors(count);
    let names: Vec<String> = file.tensors().map(|tensor| tensor.name.to_owned()).collect();
    move || {
        let found = names.iter().filter(|name| black_box(&file).tensor(name).is_some()).count();
        assert_eq!(found, names.len());
    }
}

fn open_tensors(count: usize) -> impl FnMut() {
    let mut writer = Writer::new();
    for i in 0..count {
        writer.set(&format!("key.{i}"), i as u32);
        writer.tensor(&format!("blk.{i}.weight"), &[1], BlockType::F32, vec![0; 4]);
    }
    let bytes = writer.to_vec();
    move || drop(black_box(Gguf::from_vec("tensors", bytes.clone())))
}

fn set_keys(count: usize) -> impl FnMut() {
    let keys: Vec<String> = (0..count).map(|i| format!("key.{i}")).collect();
    move || {
        let mut writer = Writer::new();
        for key in keys.iter().chain(&keys) {
            writer.set(key, 1u32);
        }
        black_box(writer);
    }
}

/// A vocabulary of SentencePiece with these control tokens.
fn tokenizer(special: &[String]) -> Tokenizer {
    let mut tokens = ["<unk>", "<s>", "</s>", "x", "y", "▁"].map(str::to_owned).to_vec();
    let mut types = vec![2, 3, 3, 1, 1, 1];
    tokens.extend_from_slice(special);
    types.resize(tokens.len(), 3);
    let mut writer = Writer::new();
    writer
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.scores", OwnedValue::F32s(vec![0.0; tokens.len()]))
        .set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens))
        .set("tokenizer.ggml.token_type", OwnedValue::I32s(types))
        .set("tokenizer.ggml.unknown_token_id", 0u32);
    let file = Gguf::from_vec("vocabulary", writer.to_vec()).expect("a sound file");
    Tokenizer::from_gguf(&file).expect("a vocabulary")
}

const SPECIAL: EncodeOptions = EncodeOptions { bos: false, special: true };

/// Texts in which special tokens are found at every second place.
fn split_often(bytes: usize) -> impl FnMut() {
    let tokenizer = tokenizer(&["ab".to_owned(), "c".to_owned()]);
    let text = "xabyc".repeat(bytes / 5);
    move || drop(black_box(tokenizer.encode(&text, SPECIAL)))
}

/// Tokens of a thousand lengths, in a text of nothing but what they begin with.
fn split_by_lengths(bytes: usize) -> impl FnMut() {
    let special: Vec<String> = (2..1024).map(|len| "a".repeat(len - 1) + "z").collect();
    let tokenizer = tokenizer(&special);
    let text = "a".repeat(bytes - 1) + "z";
    move || drop(black_box(tokenizer.encode(&text, SPECIAL)))
}

/// Tokens of a thousand lengths, each of which ends in all the shorter ones.
fn split_by_suffixes(bytes: usize) -> impl FnMut() {
    let special: Vec<String> = (1..1024).map(|len| "a".repeat(len)).collect();
    let tokenizer = tokenizer(&special);
    let text = format!("{}x", "a".repeat(1534)).repeat(bytes / 1535);
    move || drop(black_box(tokenizer.encode(&text, SPECIAL)))
}

fn build_special(count: usize) -> impl FnMut() {
    let special: Vec<String> = (0..count).map(|i| format!("<|special_{i}|>")).collect();
    move || drop(black_box(tokenizer(&special)))
}

/// A safetensors file of zeros.
fn safetensors(path: &Path, tensors: &[(&str, &[usize])]) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::from(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    std::fs::write(path, bytes).expect("a file");
}

/// A checkpoint of `count` merges, as many tokens that were added and replace others, and as many
/// names of special tokens.
fn convert_added(count: usize) -> impl FnMut() {
    let side = count.isqrt();
    let letter = |i: usize| char::from_u32(0x4e00 + i as u32).expect("a letter");
    let mut tokens: Vec<String> = (0..side).map(|i| letter(i).to_string()).collect();
    let pairs = || (0..side).flat_map(|i| (0..side).map(move |k| (letter(i), letter(k))));
    tokens.extend(pairs().map(|(a, b)| format!("{a}{b}")));
    let first = tokens.len();
    tokens.extend((0..count).map(|i| format!("u{i}")));
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.iter().enumerate().map(|(id, text)| (text.clone(), id.into())).collect();
    let added: Vec<_> =
        (0..count).map(|i| json!({"id": first + i, "content": format!("w{i}")})).collect();
    let merges: Vec<String> = pairs().map(|(a, b)| format!("{a} {b}")).collect();
    let names: Vec<String> = (0..count).map(|i| format!("n{i}")).collect();

    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, value: serde_json::Value| {
        std::fs::write(folder.path().join(name), value.to_string()).expect("a file");
    };
    write("special_tokens_map.json", json!({"additional_special_tokens": names}));
    write(
        "tokenizer.json",
        json!({
            "added_tokens": added,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }),
    );
    write(
        "config.json",
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1,
            "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 2, "vocab_size": tokens.len(),
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": true,
        }),
    );
    let layer: Vec<(String, Vec<usize>)> = [
        ("input_layernorm", vec![1]),
        ("self_attn.q_proj", vec![2, 1]),
        ("self_attn.k_proj", vec![2, 1]),
        ("self_attn.v_proj", vec![2, 1]),
        ("self_attn.o_proj", vec![1, 2]),
        ("post_attention_layernorm", vec![1]),
        ("mlp.gate_proj", vec![1, 1]),
        ("mlp.up_proj", vec![1, 1]),
        ("mlp.down_proj", vec![1, 1]),
    ]
    .map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape))
    .to_vec();
    let ends = [[tokens.len(), 1], [1, 1]];
    let mut all: Vec<(&str, &[usize])> =
        vec![("model.embed_tokens.weight", &ends[0]), ("model.norm.weight", &ends[1][..1])];
    all.extend(layer.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())));
    safetensors(&folder.path().join("model.safetensors"), &all);
    move || {
        let out = folder.path().join("out.gguf");
        let converted = convert(folder.path(), &out, None, &mut |_, _, _| true);
        black_box(converted.expect("a checkpoint"));
    }
}

fn main() -> ExitCode {
    println!("{:38} {:>8}", "", "size");
    let all = [
        compare("tensors found by their names", 600, look_up_tensors),
        compare("a file of many keys and tensors opened", 600, open_tensors),
        compare("Writer::set", 600, set_keys),
        compare("bytes with many special tokens", 10_000, split_often),
        compare("bytes that begin long special tokens", 10_000, split_by_lengths),
        compare("bytes of nested special tokens", 20_000, split_by_suffixes),
        compare("a vocabulary of special tokens", 300, build_special),
        compare("convert: added tokens, merges, names", 600, convert_added),
    ];
    match all.into_iter().all(|fine| fine) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
