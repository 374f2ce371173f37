//! Damaged and hostile model files: an error that says what is wrong, never a panic, never memory
//! out of proportion.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use common::{sentencepiece, tiny_llama};
use mtad::engine::{Device, Model, SessionOptions};
use mtad::exec::cpu::{Cpu, Isa};
use mtad::gguf::{Gguf, OwnedValue, Writer};
use mtad::lm::{Batch, Row, Want};
use mtad::quant::BlockType;
use mtad::tokenizer::Tokenizer;
use mtad::{Error, LoadOptions, Pair};

fn device() -> Device {
    Device::Cpu(Arc::new(Cpu::with_isa(1, Isa::Scalar).unwrap()))
}

/// Opens, tokenizes and runs a file as far as it goes.
fn use_file(bytes: Vec<u8>, device: &Device) -> Result<(), Error> {
    let file = Arc::new(Gguf::from_vec("damaged.gguf", bytes)?);
    file.metadata().for_each(|(_, value)| drop(value.to_string()));
    Tokenizer::from_gguf(&file)?.encode("Hello, world", Default::default());
    let model = Model::load(file, device, &mut |_, _| true)?;
    let mut lm = model.session(&SessionOptions::default()).unwrap();
    lm.eval(&Batch::chain(&[1, 2, 3], None, Row(0), Want::Logits))?;
    Ok(())
}

/// Runs a file; the panic is the failure.
fn must_not_panic(what: &str, bytes: Vec<u8>, device: &Device) -> Result<(), Error> {
    catch_unwind(AssertUnwindSafe(|| use_file(bytes, device)))
        .unwrap_or_else(|_| panic!("{what}: it panicked"))
}

fn message(writer: &Writer) -> String {
    use_file(writer.to_vec(), &device()).expect_err("it is not fine").to_string()
}

#[test]
fn a_sound_file_is_fine() {
    use_file(tiny_llama().to_vec(), &device()).unwrap();
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = tiny_llama().to_vec();
    let device = device();
    let header = Gguf::from_vec("whole", whole.clone()).unwrap().data_offset() as usize;
    // Every byte of the header, and some of the data.
    let cuts = (0..header).chain((header..whole.len()).step_by(997));
    for cut in cuts {
        let error = must_not_panic(&format!("cut at {cut}"), whole[..cut].to_vec(), &device)
            .expect_err("a file that is cut short is not fine");
        assert!(error.to_string().contains("damaged.gguf"), "cut at {cut}: {error}");
    }
}

#[test]
fn flipped_bits_do_not_panic() {
    let whole = tiny_llama().to_vec();
    let device = device();
    let header = Gguf::from_vec("whole", whole.clone()).unwrap().data_offset() as usize;
    let mut noise = 0x2545_f491_4f6c_dd1du64;
    let mut refused = 0;
    for at in 0..header {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (noise % 8);
        refused +=
            usize::from(must_not_panic(&format!("bit in byte {at}"), bytes, &device).is_err());
        let mut bytes = whole.clone();
        bytes[at] = 0xff;
        refused += usize::from(must_not_panic(&format!("255 at {at}"), bytes, &device).is_err());
    }
    assert!(refused > 100, "only {refused} damages were noticed");
}

#[test]
fn absurd_counts_are_refused_before_memory_is_taken() {
    let whole = tiny_llama().to_vec();
    for (at, what) in [(8, "tensors"), (16, "metadata entries")] {
        for count in [u64::MAX, 1 << 40, 1 << 17] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            let error = use_file(bytes, &device()).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("at most"), "{error}");
        }
    }
    // A string array that claims more elements than the file has bytes.
    let mut bytes = Vec::new();
    bytes.extend(b"GGUF");
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(b"a");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(8u32.to_le_bytes());
    bytes.extend((1u64 << 60).to_le_bytes());
    let error = Gguf::from_vec("x", bytes).unwrap_err().to_string();
    assert!(error.contains("ends inside metadata `a`"), "{error}");
}

#[test]
fn other_files_are_named_for_what_they_are() {
    let open = |bytes: &[u8]| Gguf::from_vec("x", bytes.to_vec()).unwrap_err().to_string();
    assert!(open(b"Once upon a time").contains("starts with \"Once\""));
    assert!(open(b"GGUF\x00\x00\x00\x03rest").contains("big-endian"));
    assert!(open(b"GGUF\x01\x00\x00\x00rest").contains("version 1"));
    assert!(open(b"GGUF\x09\x00\x00\x00rest").contains("version 9"));
    assert!(open(b"").contains("the file ends"));
    let folder = std::env::temp_dir();
    assert!(Gguf::open(&folder).unwrap_err().to_string().contains("is a directory"));
    assert!(matches!(Gguf::open(folder.join("no such file.gguf")), Err(Error::Io { .. })));
}

type Edit = dyn Fn(&mut Writer);

#[test]
fn messages_name_what_is_missing_or_wrong() {
    let edited = |edit: &Edit| {
        let mut writer = tiny_llama();
        edit(&mut writer);
        message(&writer)
    };
    let cases: &[(&Edit, &[&str])] = &[
        (
            &|w| {
                w.set("general.architecture", "gpt9");
            },
            &["gpt9", "`llama`, `qwen2`, ", "`opt` are run"],
        ),
        (
            &|w| {
                w.set("llama.block_count", 3u32);
            },
            &["blk.1.attn_norm.weight", "missing"],
        ),
        (
            &|w| {
                w.set("llama.embedding_length", 128u32);
            },
            &["token_embd.weight", "128"],
        ),
        (
            &|w| {
                w.set("llama.embedding_length", "wide");
            },
            &["llama.embedding_length", "\"wide\""],
        ),
        (
            &|w| {
                w.set("llama.attention.head_count", 0u32);
            },
            &["head_count", "is 0"],
        ),
        (
            &|w| {
                w.set("llama.attention.head_count_kv", 3u32);
            },
            &["cannot share"],
        ),
        (
            &|w| {
                w.set("llama.rope.dimension_count", 7u32);
            },
            &["rotate 7"],
        ),
        (
            &|w| {
                w.set("llama.rope.scaling.type", "longrope");
            },
            &["longrope", "linear", "yarn"],
        ),
        (
            &|w| {
                w.set("llama.expert_count", 8u32);
            },
            &["llama.expert_used_count", "missing"],
        ),
        (
            &|w| {
                w.set("llama.context_length", u32::MAX);
            },
            &["context_length"],
        ),
        (
            &|w| {
                w.tensor("blk.0.attn_q_norm.weight", &[32], BlockType::F32, vec![0; 128]);
            },
            &["blk.0.attn_q_norm.weight", "not part of"],
        ),
        (
            &|w| {
                w.set("tokenizer.ggml.scores", OwnedValue::F32s(vec![0.0]));
            },
            &["scores"],
        ),
    ];
    for (edit, parts) in cases {
        let message = edited(edit);
        for part in *parts {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }
}

#[test]
fn a_type_that_cannot_be_run_is_refused_by_name() {
    let mut writer = tiny_llama();
    // 32 rows of 64 columns cannot be IQ1_S, whose blocks are 256; MXFP4 fits.
    writer.retain_tensors(|name| name != "blk.0.attn_k.weight");
    writer.tensor("blk.0.attn_k.weight", &[64, 32], BlockType::MXFP4, vec![0; 64 * 32 / 32 * 17]);
    let message = message(&writer);
    assert!(message.contains("blk.0.attn_k.weight") && message.contains("MXFP4"), "{message}");
}

#[test]
fn a_draft_of_another_vocabulary_is_refused_with_the_first_difference() {
    let target = Gguf::from_vec("target", tiny_llama().to_vec()).unwrap();
    let other = sentencepiece(&["a", "c", "ab"]);
    let draft = Gguf::from_vec("draft", other.to_vec()).unwrap();
    let error = Pair::from_files(target, Some(draft), &LoadOptions::default(), &mut |_, _| true)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Vocabulary(_)), "{error}");
    let message = error.to_string();
    assert!(
        message.contains("260") && message.contains("\"b\"") && message.contains("\"c\""),
        "{message}"
    );
}

#[test]
fn a_vocabulary_beyond_all_reason_is_refused() {
    let mut writer = tiny_llama();
    let tokens = (0..600_000).map(|i| format!("{i}")).collect();
    writer.set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens));
    let message = message(&writer);
    assert!(message.contains("600000") && message.contains("at most"), "{message}");
}

#[test]
fn loading_can_be_stopped() {
    let file = Arc::new(Gguf::from_vec("x", tiny_llama().to_vec()).unwrap());
    let stopped = Model::load(file, &device(), &mut |_, _| false);
    assert!(matches!(stopped.err(), Some(Error::Cancelled)));
}

/// Moves a tensor's data to another place in the file.
fn moved(mut bytes: Vec<u8>, name: &str, offset: u64) -> Vec<u8> {
    let at = bytes.windows(name.len()).position(|part| part == name.as_bytes()).unwrap();
    let rank = u32::from_le_bytes(bytes[at + name.len()..][..4].try_into().unwrap()) as usize;
    let at = at + name.len() + 4 + 8 * rank + 4;
    bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
    bytes
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let mut writer = Writer::new();
    for name in ["first", "second", "third"] {
        writer.tensor(name, &[16], BlockType::F32, vec![1; 64]);
    }
    let bytes = writer.to_vec();
    assert_eq!(Gguf::from_vec("x", bytes.clone()).unwrap().tensors().len(), 3);
    for (name, offset, words) in [
        // All of another, a part of it, and the first behind the others.
        ("second", 0, "tensors `first` and `second` overlap: the first takes the bytes 0 to 64"),
        ("third", 96, "tensors `second` and `third` overlap: the first takes the bytes 64 to 128"),
        ("first", 96, "tensors `second` and `first` overlap"),
    ] {
        let error = Gguf::from_vec("x", moved(bytes.clone(), name, offset)).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains(words) || offset == 0 && error.contains("overlap"), "{error}");
    }
    // Out of order, but apart.
    let swapped = moved(moved(bytes, "first", 64), "second", 0);
    assert_eq!(Gguf::from_vec("x", swapped).unwrap().tensors().len(), 3);
}

#[test]
fn a_vocabulary_with_a_merge_for_everything_is_refused() {
    // All strings of four letters up to a length: each is all its cuts of two others.
    let mut pieces = vec![String::new()];
    let mut all = Vec::new();
    for _ in 0..8 {
        let longer = |piece: &String| ["a", "b", "c", "d"].map(|letter| format!("{piece}{letter}"));
        pieces = pieces.iter().flat_map(longer).collect();
        all.extend(pieces.iter().cloned());
    }
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let error = message(&sentencepiece(&all));
    assert!(error.contains("ways to join the") && error.contains("no vocabulary"), "{error}");
    // Long tokens of one letter: few ways to join, but each of them is long.
    let long: Vec<String> = (1..=181).map(|n| "a".repeat(n)).collect();
    let long: Vec<&str> = long.iter().map(String::as_str).collect();
    let error = message(&sentencepiece(&long));
    assert!(error.contains("ways to join the 181 tokens"), "{error}");
    // (A model that has neither of them.)
    use_file(tiny_llama().to_vec(), &device()).unwrap();
}

#[test]
fn a_file_that_is_read_is_the_file_that_is_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, tiny_llama().to_vec()).unwrap();
    let (mapped, read) = (Gguf::open(&path).unwrap(), Gguf::read(&path).unwrap());
    assert_eq!(mapped.digest(), read.digest());
    assert_eq!((mapped.name(), mapped.file_len()), (read.name(), read.file_len()));
    // What was read does not change with the file.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(read.digest(), common::gguf(&tiny_llama()).digest());
    assert!(Gguf::read(&path).unwrap_err().to_string().contains("is empty"));
    assert!(Gguf::read(folder.path()).unwrap_err().to_string().contains("is a directory"));
}
