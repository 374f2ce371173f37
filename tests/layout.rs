//! The rules of the house: who may import whom, and where `unsafe` and device crates may appear.

use std::fs;
use std::path::{Path, PathBuf};

/// For each part of the library, what its `use crate::` lines may name. The map in lib.rs says the
/// same in words.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("cached", &[]),
    ("quant", &[]),
    ("gguf", &["error", "quant"]),
    ("convert", &["error", "quant", "gguf"]),
    ("tokenizer", &["error", "gguf"]),
    ("chat", &["error", "gguf", "tokenizer"]),
    ("backend", &["error", "cached", "quant", "gguf", "backend"]),
    ("model", &["error", "quant", "gguf", "backend", "model"]),
    ("sampling", &["error", "model::lm", "sampling"]),
    ("decode", &["error", "model::lm", "sampling", "decode"]),
    ("energy", &["error", "energy"]),
];

/// Parts that may import everything.
const FREE: &[&str] =
    &["bench", "cli", "capi", "eval", "pair", "generation", "saved", "lib", "main"];

/// Where `unsafe` may appear: kernels, shaders without checks or compiled before, what Vulkan
/// alone tells, the memory map, and the border to C.
const MAY_BE_UNSAFE: &[&str] = &[
    "src/backend/cpu/",
    "src/backend/gpu/adapter.rs",
    "src/backend/gpu/device.rs",
    "src/backend/gpu/pipelines.rs",
    "src/gguf/mod.rs",
    "src/capi/",
];

/// The only place that knows of wgpu.
const HAS_WGPU: &str = "src/backend/gpu/";

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// (path from the project's root, part of the library, text) of every source file.
fn library() -> Vec<(String, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    sources(&root.join("src"), &mut found);
    assert!(found.len() > 30, "sources were not found");
    let describe = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
        let part = name["src/".len()..].split('/').next().unwrap().trim_end_matches(".rs");
        (name.clone(), part.to_owned(), fs::read_to_string(&path).unwrap())
    };
    found.into_iter().map(describe).collect()
}

/// The lines before a file's unit tests, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().take_while(|line| *line != "#[cfg(test)]").enumerate();
    lines.filter(|(_, line)| !line.trim_start().starts_with("//")).map(|(i, line)| (i + 1, line))
}

#[test]
fn imports_go_one_way() {
    for (file, part, text) in library() {
        if FREE.contains(&part.as_str()) {
            continue;
        }
        let (_, allowed) = MAY_IMPORT
            .iter()
            .find(|(name, _)| *name == part)
            .unwrap_or_else(|| panic!("{file}: this part of the library has no import rule"));
        for (number, line) in code(&text) {
            for path in line.split("crate::").skip(1) {
                let fine = allowed.iter().chain([&part.as_str()]).any(|rule| {
                    path.strip_prefix(rule).is_some_and(|rest| {
                        !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
                    })
                });
                // Macros and the crate's own error may be named anywhere.
                let fine = fine || path.starts_with("Error") || path.starts_with("Result");
                assert!(fine, "{file}:{number}: `{part}` may not import `{}`", path.trim());
            }
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_place() {
    let mut seen = 0;
    for (file, _, text) in library() {
        for (number, line) in code(&text) {
            if line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe") {
                seen += 1;
                assert!(
                    MAY_BE_UNSAFE.iter().any(|place| file.starts_with(place)),
                    "{file}:{number}: unsafe code belongs in {MAY_BE_UNSAFE:?}"
                );
            }
        }
    }
    assert!(seen > 0, "the search for unsafe code finds nothing");
}

#[test]
fn wgpu_stays_in_its_place() {
    let mut seen = 0;
    for (file, _, text) in library() {
        for (number, line) in code(&text) {
            if line.contains("wgpu::") {
                seen += 1;
                assert!(file.starts_with(HAS_WGPU), "{file}:{number}: wgpu belongs in {HAS_WGPU}");
            }
        }
    }
    assert!(seen > 0, "the search for wgpu finds nothing");
}

#[test]
fn every_module_says_what_it_is_for() {
    for (file, _, text) in library() {
        assert!(text.starts_with("//! "), "{file} does not begin with a module comment");
    }
}
