//! The rules of the house: who may import whom, and where `unsafe` and device crates may appear.

use std::fs;
use std::path::{Path, PathBuf};

/// For each part of the library, what its code may name by `crate::` or `super::`. The map in lib.rs says the
/// same in words.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("files", &["error"]),
    ("cached", &["error", "files"]),
    ("lm", &["error"]),
    ("quant", &[]),
    ("gguf", &["error", "files", "quant"]),
    ("convert", &["error", "files", "quant", "gguf"]),
    ("tokenizer", &["error", "gguf"]),
    ("chat", &["error", "gguf", "tokenizer"]),
    ("graph", &["error", "gguf"]),
    ("models", &["error", "gguf", "graph"]),
    ("exec", &["error", "cached", "quant", "gguf", "graph", "lm"]),
    ("engine", &["error", "gguf", "graph", "models", "exec", "lm"]),
    ("sampling", &["error", "lm"]),
    ("decode", &["error", "lm", "sampling"]),
    ("grammar", &["error", "lm", "sampling", "tokenizer"]),
    ("energy", &["error"]),
];

/// Parts that may import everything but what [`ONLY_FOR`] keeps for others.
const FREE: &[&str] = &["bench", "cli", "capi", "eval", "serve", "session", "lib", "main"];

/// Parts that only these may import.
const ONLY_FOR: &[(&str, &[&str])] = &[("exec", &["engine"]), ("models", &["engine"])];

/// Where `unsafe` may appear: kernels, shaders without checks or compiled before, what Vulkan
/// alone tells, the memory map, and the border to C.
const MAY_BE_UNSAFE: &[&str] = &[
    "src/exec/cpu/",
    "src/exec/wgpu/adapter.rs",
    "src/exec/wgpu/device.rs",
    "src/exec/wgpu/pipelines.rs",
    "src/gguf/mod.rs",
    "src/capi/",
];

/// The only place that knows of wgpu.
const HAS_WGPU: &str = "src/exec/wgpu/";

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
    let all: Vec<_> = found.into_iter().map(describe).collect();
    // Modules that only tests are compiled with are no part of it.
    let tests: Vec<String> = all
        .iter()
        .flat_map(|(name, _, text)| {
            let folder = name.strip_suffix("mod.rs").unwrap_or("").to_owned();
            let after = text.split("#[cfg(test)]\nmod ").skip(1);
            let modules = after.filter_map(|rest| rest.lines().next()?.strip_suffix(';'));
            modules.map(move |module| format!("{folder}{module}.rs")).collect::<Vec<_>>()
        })
        .collect();
    assert!(tests.contains(&"src/exec/cpu/tests.rs".to_owned()), "{tests:?}");
    all.into_iter().filter(|(name, ..)| !tests.contains(name)).collect()
}

/// The lines of a file, by number, without comments and without what only tests are compiled with.
///
/// Files are formatted, so an item ends at the first line that has its indentation and closes it.
fn code(text: &str) -> Vec<(usize, &str)> {
    let mut out = Vec::new();
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    while let Some((number, line)) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        if line.trim_start().starts_with("#[cfg(test)]") {
            // Whatever else is said of the item, and the item itself.
            for (_, line) in lines.by_ref() {
                let ends = line.ends_with(';') || line.ends_with('}');
                let same = line.len() - line.trim_start().len() == indent;
                if same && ends && !line.trim_start().starts_with("#[") {
                    break;
                }
            }
        } else if !line.trim_start().starts_with("//") {
            out.push((number, line));
        }
    }
    out
}

/// The modules of a file, from the crate's root: `src/exec/cpu/pool.rs` is in exec, cpu, pool.
fn modules(file: &str) -> Vec<&str> {
    let path = file.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
    path.split('/').filter(|name| !matches!(*name, "mod" | "lib" | "main")).collect()
}

/// The parts of the library that a line names: by `crate::part`, or by so many `super::` that they lead out of
/// the file's own part.
fn named<'a>(line: &'a str, modules: &[&'a str]) -> Vec<&'a str> {
    let word = |text: &'a str| {
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        &text[..end]
    };
    let mut found: Vec<_> = line.split("crate::").skip(1).map(word).collect();
    let mut rest = line;
    while let Some(at) = rest.find("super::") {
        let mut path = &rest[at..];
        let mut up = 0;
        while let Some(more) = path.strip_prefix("super::") {
            (up, path) = (up + 1, more);
        }
        // (`use super::{...}` from the top of a part leads to the crate's root, too.)
        if up >= modules.len() {
            found.extend(path.trim_start_matches('{').split(", ").map(word));
        }
        rest = path;
    }
    found.retain(|name| !name.is_empty());
    found
}

#[test]
fn imports_go_one_way() {
    let parts: Vec<String> = library().into_iter().map(|(_, part, _)| part).collect();
    let mut seen = 0;
    for (file, part, text) in library() {
        let modules = modules(&file);
        let allowed = MAY_IMPORT.iter().find(|(name, _)| *name == part).map(|(_, allowed)| allowed);
        let is_free = FREE.contains(&part.as_str());
        assert!(allowed.is_some() != is_free, "{file}: this part has no import rule, or two");
        for (number, line) in code(&text) {
            for name in named(line, &modules) {
                if name == part || !parts.iter().any(|part| part == name) {
                    continue;
                }
                seen += 1;
                let fine = allowed.is_none_or(|allowed| allowed.contains(&name));
                assert!(fine, "{file}:{number}: `{part}` may not import `{name}`");
                let kept = ONLY_FOR.iter().find(|(kept, _)| *kept == name);
                let fine = kept.is_none_or(|(_, users)| users.contains(&part.as_str()));
                assert!(fine, "{file}:{number}: `{name}` is not for `{part}`");
            }
        }
    }
    assert!(seen > 200, "the search for imports finds only {seen}");
}

#[test]
fn the_search_sees_all_code() {
    let text = "use crate::a;\n#[cfg(test)]\nmod noise;\nuse crate::b;\n#[cfg(test)]\nmod tests {\n    \
                fn f() {\n    }\n}\nfn g() { crate::c::h() }\n";
    let lines: Vec<_> = code(text).iter().map(|(number, _)| *number).collect();
    assert_eq!(lines, [1, 4, 10]);
    assert_eq!(named("    super::super::gguf::open()", &["exec", "cpu"]), ["gguf"]);
    assert_eq!(named("use super::pool::Pool;", &["exec", "cpu"]), [""; 0]);
    assert_eq!(named("use crate::lm::Lm; crate::error::f()", &["decode"]), ["lm", "error"]);
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
            let line = line.replace("exec::wgpu::", "").replace("place, wgpu", "");
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

#[test]
fn nothing_that_is_printed_can_panic() {
    for (file, _, text) in library() {
        if file.ends_with("/tests.rs") {
            continue;
        }
        for (number, line) in code(&text) {
            let macros = ["println!", "print!", "eprintln!", "eprint!", "dbg!"];
            assert!(
                !macros.iter().any(|name| line.contains(name)),
                "{file}:{number}: print through `cli::console`, which does not panic"
            );
        }
    }
}

#[test]
fn the_library_names_no_options_of_the_command_line() {
    // Pages have styles.
    const EXCEPT: [&str; 3] = ["src/cli/", "src/main.rs", "src/eval/report/html.rs"];
    let mut seen = 0;
    for (file, _, text) in library() {
        for (number, line) in code(&text) {
            let option = line.match_indices("--").any(|(at, _)| {
                line[at + 2..].starts_with(|c: char| c.is_ascii_lowercase())
                    && !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '-')
            });
            seen += usize::from(option);
            assert!(
                !option || EXCEPT.iter().any(|place| file.starts_with(place)),
                "{file}:{number}: the command line adds its options' names, the library has none"
            );
        }
    }
    assert!(seen > 0, "the search for options finds nothing");
}

#[test]
fn the_readme_says_what_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let table = readme.split("| architecture | models |").nth(1).unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let mut listed: Vec<String> = rows
        .flat_map(|row| row.split('|').nth(1).unwrap().split(','))
        .map(|name| name.trim().trim_matches('`').to_owned())
        .collect();
    let mut run: Vec<String> = mtad::models::architectures().map(str::to_owned).collect();
    listed.sort();
    run.sort();
    assert_eq!(listed, run);
}
