//! Models in several files: the same model as in one, and errors that name the file that is at
//! fault.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use mtad::engine::{Device, Model};
use mtad::exec::cpu::Cpu;
use mtad::gguf::{Gguf, OwnedValue, ValueType, Writer};
use mtad::{Error, quant::BlockType};

use common::{logits, tiny_llama};

/// The files of a model.
struct Parts {
    folder: tempfile::TempDir,
    whole: Gguf,
    /// What each part holds.
    writers: Vec<Writer>,
}

impl Parts {
    /// A model in three parts as `gguf-split` writes them: the first has the metadata, and four of
    /// the tensors or none.
    fn new(first_has_tensors: bool) -> Self {
        let whole = common::gguf(&tiny_llama());
        let number = |kind, x: u16| OwnedValue::Encoded(kind, x.to_le_bytes().to_vec());
        let mut writers: Vec<Writer> = Vec::new();
        for part in 0..3 {
            let mut writer = Writer::new();
            if part == 0 {
                whole.metadata().for_each(|(key, value)| _ = writer.set(key, value));
            }
            let count = OwnedValue::Encoded(
                ValueType::I32,
                (whole.tensors().len() as i32).to_le_bytes().to_vec(),
            );
            writer
                .set("split.no", number(ValueType::U16, part))
                .set("split.count", number(ValueType::U16, 3))
                .set("split.tensors.count", count);
            writers.push(writer);
        }
        for (i, (tensor, dims)) in whole.tensors().zip(whole.dims()).enumerate() {
            let part = if first_has_tensors { i / 4 } else { 1 + i / 6 };
            writers[part].tensor(tensor.name, dims, tensor.block_type, tensor.bytes.to_vec());
        }
        let folder = tempfile::tempdir().unwrap();
        let parts = Parts { folder, whole, writers };
        (0..3).for_each(|i| parts.write(i));
        parts
    }

    fn path(&self, i: usize) -> PathBuf {
        self.folder.path().join(format!("tiny-{:05}-of-00003.gguf", i + 1))
    }

    fn write(&self, i: usize) {
        std::fs::write(self.path(i), self.writers[i].to_vec()).unwrap();
    }

    /// The path of a part, as messages say it.
    fn name(&self, i: usize) -> String {
        self.path(i).display().to_string()
    }

    fn error(&self) -> String {
        Gguf::open(self.path(0)).unwrap_err().to_string()
    }
}

/// Whether a message begins with a file's name and has some words.
fn check(error: &str, file: &str, words: &[&str]) {
    assert!(error.starts_with(file), "{error} (of {file})");
    assert!(words.iter().all(|words| error.contains(words)), "{error}: {words:?}");
}

fn mtad(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.args(args).stdin(Stdio::null()).output().expect("the binary runs")
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn parts_are_the_same_model_as_the_whole() {
    let device = Device::Cpu(Arc::new(Cpu::new(2).unwrap()));
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 264).collect();
    for first_has_tensors in [true, false] {
        let parts = Parts::new(first_has_tensors);
        let joined = Gguf::open(parts.path(0)).unwrap();
        assert_eq!(joined.files().collect::<Vec<_>>(), [0, 1, 2].map(|i| parts.name(i)));
        let first = if first_has_tensors { 4 } else { 0 };
        let names: Vec<_> = joined.tensors().map(|t| (t.name, t.file)).collect();
        assert!(names[..first].iter().all(|(_, file)| *file == parts.name(0)));
        assert!(names[first..].iter().all(|(_, file)| *file != parts.name(0)));
        for (joined, whole) in joined.tensors().zip(parts.whole.tensors()) {
            assert_eq!((joined.name, joined.rows), (whole.name, whole.rows));
            assert!(joined.bytes == whole.bytes, "{}", joined.name);
        }
        assert_eq!(joined.digest(), parts.whole.digest());
        let len = |i| std::fs::metadata(parts.path(i)).unwrap().len() as usize;
        assert_eq!(joined.file_len(), (0..3).map(len).sum::<usize>());

        let load = |file| Model::load(Arc::new(file), &device, &mut |_, _| true).unwrap();
        let whole = logits(&load(common::gguf(&tiny_llama())), &tokens, 16);
        assert!(logits(&load(joined), &tokens, 16) == whole);
    }
}

#[test]
fn the_command_line_opens_parts_by_the_first_and_quantize_joins_them() {
    let parts = Parts::new(true);
    let at = |name: &str| parts.folder.path().join(name);
    std::fs::write(at("whole.gguf"), tiny_llama().to_vec()).unwrap();
    let run = |args: &[&str]| {
        let output = mtad(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let logits = |model: &Path, out: &Path| {
        let files = ["--model", path(model), "--out", path(out)];
        run(&[&["logits", "--device", "cpu", "--tokens", "1,5,9,200"], &files[..]].concat());
        std::fs::read(out).unwrap()
    };
    let expected = logits(&at("whole.gguf"), &at("a.npy"));
    assert_eq!(logits(&parts.path(0), &at("b.npy")), expected);

    // One file, with nothing of the parts left in it.
    run(&["quantize", path(&parts.path(0)), path(&at("q8.gguf")), "Q8_0", "--requantize"]);
    let joined = Gguf::open(at("q8.gguf")).unwrap();
    assert_eq!(joined.files().len(), 1);
    assert!(joined.metadata().all(|(key, _)| !key.starts_with("split.")));
    assert_eq!(joined.digest(), parts.whole.digest());
    assert_eq!(logits(&at("q8.gguf"), &at("c.npy")), expected);

    // No part is written over, the others as little as the one that was named.
    for i in 0..3 {
        let (input, out) = (parts.name(0), parts.name(i));
        let refused = mtad(&["quantize", &input, &out, "Q4_0", "--requantize"]);
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(&format!("{} is the input", parts.name(i))), "{stderr}");
        assert!(std::fs::read(parts.path(i)).unwrap() == parts.writers[i].to_vec());
    }
    let names = std::fs::read_dir(parts.folder.path()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.contains(".part")));

    let failed = mtad(&["inspect", path(&parts.path(1))]);
    assert_eq!(failed.status.code(), Some(1));
    let stderr = String::from_utf8(failed.stderr).unwrap();
    assert!(stderr.contains(&format!("give the first, {}", parts.name(0))), "{stderr}");
}

#[test]
fn a_part_alone_is_no_model() {
    let parts = Parts::new(true);
    let error = Gguf::from_vec("in memory", parts.writers[0].to_vec()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    check(&error.to_string(), "in memory", &["one of the 3 parts", "open it by its path"]);

    let error = Gguf::open(parts.path(2)).unwrap_err().to_string();
    check(&error, &parts.name(2), &["part 3 of 3", "give the first", &parts.name(0)]);

    // Under another name the other parts are not to be found.
    let renamed = parts.folder.path().join("model.gguf");
    std::fs::copy(parts.path(0), &renamed).unwrap();
    let error = Gguf::open(&renamed).unwrap_err().to_string();
    check(&error, path(&renamed), &["`-00001-of-00003.gguf`", "the names that they came with"]);

    std::fs::remove_file(parts.path(1)).unwrap();
    check(&parts.error(), &parts.name(0), &[&parts.name(1), "cannot be read", "in one folder"]);

    // A whole model in its own words: one part of one.
    let mut writer = tiny_llama();
    writer.set("split.no", 0u32).set("split.count", 1u32);
    assert_eq!(common::gguf(&writer).digest(), common::gguf(&tiny_llama()).digest());
}

#[test]
fn parts_that_do_not_belong_together_are_refused_by_name() {
    // Parts in each other's place.
    let mut parts = Parts::new(true);
    parts.writers.swap(1, 2);
    (1..3).for_each(|i| parts.write(i));
    check(&parts.error(), &parts.name(1), &["is not part 2 of 3", &parts.name(0), "in its place"]);

    // A model of one file in a part's place.
    let parts = Parts::new(true);
    std::fs::write(parts.path(1), tiny_llama().to_vec()).unwrap();
    check(&parts.error(), &parts.name(1), &["is not part 2 of 3"]);

    // A part of a model with more tensors.
    let mut parts = Parts::new(true);
    parts.writers[2].set("split.tensors.count", 99u32);
    parts.write(2);
    check(&parts.error(), &parts.name(2), &["is not part 3 of 3", &parts.name(0)]);

    // A tensor too many, and one twice.
    let mut parts = Parts::new(true);
    parts.writers[2].tensor("more", &[1], BlockType::F32, vec![0; 4]);
    parts.write(2);
    check(&parts.error(), &parts.name(0), &["3 parts have 12 tensors", "11", "of another model"]);
    let mut parts = Parts::new(true);
    let last = parts.whole.tensors().last().unwrap().name.to_owned();
    parts.writers[2].retain_tensors(|name| name != last);
    parts.writers[2].tensor("token_embd.weight", &[1], BlockType::F32, vec![0; 4]);
    parts.write(2);
    check(
        &parts.error(),
        &parts.name(2),
        &["`token_embd.weight` is in another part", "of another"],
    );

    // A part whose tensors share bytes.
    let parts = Parts::new(true);
    let mut bytes = parts.writers[1].to_vec();
    let second = parts.whole.tensors().nth(5).unwrap().name.to_owned();
    let at = bytes.windows(second.len()).position(|part| part == second.as_bytes()).unwrap();
    let at = at + second.len();
    let rank = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let offset = at + 4 + 8 * rank + 4;
    assert_ne!(bytes[offset..offset + 8], [0; 8]);
    bytes[offset..offset + 8].fill(0);
    std::fs::write(parts.path(1), bytes).unwrap();
    check(&parts.error(), &parts.name(1), &["overlap", &second]);

    // A damaged part, and absurd counts.
    let mut parts = Parts::new(true);
    std::fs::write(parts.path(2), &parts.writers[2].to_vec()[..100]).unwrap();
    check(&parts.error(), &parts.name(2), &[]);
    for (key, value) in [("split.no", 3u32), ("split.count", 0), ("split.count", 60_000)] {
        parts.writers[0] = Parts::new(true).writers.swap_remove(0);
        parts.writers[0].set(key, value);
        parts.write(0);
        match (key, value) {
            // No parts: one file.
            ("split.count", 0) => assert_eq!(Gguf::open(parts.path(0)).unwrap().files().len(), 1),
            _ => check(&parts.error(), &parts.name(0), &["claims to be part", "it is damaged"]),
        }
    }
}
