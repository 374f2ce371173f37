//! What a vocabulary costs to build, and a megabyte of text to encode and decode; ten megabytes of
//! stories with GPT-2's vocabulary, if MTAD_SHARED names the reference data.
//!
//!     cargo bench --bench tokenizer

use divan::Bencher;
use divan::counter::BytesCount;
use mtad::gguf::Gguf;
use mtad::tokenizer::{EncodeOptions, Tokenizer};

fn main() {
    divan::main();
}

fn tokenizer() -> Tokenizer {
    let file = mtad::session::pair::builtin_file("target").expect("the built-in pair");
    Tokenizer::from_gguf(&file).expect("a tokenizer")
}

/// A megabyte of words that differ.
fn text() -> String {
    (0..)
        .map(|i| format!("The {i}th little dog ran after ball number {}. ", i * 7919 % 104_729))
        .scan(0, |len, s| {
            *len += s.len();
            (*len < 1 << 20).then_some(s)
        })
        .collect()
}

#[divan::bench]
fn build(bencher: Bencher) {
    let file: Gguf = mtad::session::pair::builtin_file("target").expect("the built-in pair");
    bencher.bench_local(|| Tokenizer::from_gguf(&file));
}

#[divan::bench]
fn encode(bencher: Bencher) {
    let (tokenizer, text) = (tokenizer(), text());
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| tokenizer.encode(&text, EncodeOptions::default()));
}

#[divan::bench(args = ["gpt-2", "llama-bpe", "smollm", "default", "gpt-4o", "deepseek-v3"], sample_count = 5)]
fn encode_stories(bencher: Bencher, pre_tokenizer: &str) {
    let Some(shared) = std::env::var_os("MTAD_SHARED").map(std::path::PathBuf::from) else {
        return;
    };
    let Ok(file) = Gguf::open(shared.join("vectors/tokenizer/ggml-vocab-gpt-2.gguf")) else {
        return;
    };
    let text = std::fs::read_to_string(shared.join("corpus/tinystories_train.txt")).expect("text");
    let mut text = text.repeat(2);
    text.truncate((0..=10 << 20).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0));
    let tokenizer = Tokenizer::with_pre_tokenizer(&file, Some(pre_tokenizer)).expect("a tokenizer");
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| tokenizer.encode(&text, EncodeOptions::default()));
}

#[divan::bench]
fn decode(bencher: Bencher) {
    let (tokenizer, text) = (tokenizer(), text());
    let tokens = tokenizer.encode(&text, EncodeOptions::default());
    bencher.counter(BytesCount::new(text.len())).bench_local(|| tokenizer.decode(&tokens));
}
