//! The command line's contract, through the binary.
#![cfg(feature = "builtin-pair")]

mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{read_npy, sentencepiece, shared, tiny_llama};
use serde_json::Value;

fn mtad(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    // Nothing is kept where a user's own tables are.
    command.env("MTAD_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"));
    let command = command.args(args).stdin(Stdio::null()).output();
    command.expect("the binary runs")
}

/// Runs a command that succeeds; its standard output.
fn stdout(args: &[&str]) -> String {
    let output = mtad(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that prints one line of JSON.
fn json(args: &[&str]) -> Value {
    let out = stdout(args);
    assert_eq!(out.matches('\n').count(), 1, "{out}");
    serde_json::from_str(&out).unwrap()
}

/// Runs a command that fails; exit code and standard error.
fn failure(args: &[&str]) -> (i32, String) {
    let output = mtad(args);
    assert!(
        output.stdout.is_empty(),
        "{args:?} prints {:?}",
        String::from_utf8_lossy(&output.stdout)
    );
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked"), "{stderr}");
    (output.status.code().unwrap(), stderr)
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_prompt_cache_changes_no_text() {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prompt.cache");
    let _ = std::fs::remove_file(&file);
    let args = ["run", "Once upon a time there was", "-n", "20", "--seed", "7", "--json"];
    let plain = json(&args);
    let with = [&args[..], &["--prompt-cache", path(&file)]].concat();
    let (first, second) = (json(&with), json(&with));
    assert_eq!((&first["text"], &second["text"]), (&plain["text"], &plain["text"]));
    assert_eq!(first["prompt_tokens_reused"], 0);
    let reused = second["prompt_tokens_reused"].as_u64().unwrap();
    assert_eq!(reused + 1, plain["prompt_tokens"].as_u64().unwrap());
    let other = [&with[..], &["--model", "builtin:draft", "--strategy", "sample"]].concat();
    let (code, message) = failure(&other);
    assert!(code == 1 && message.contains("another target model"), "{message}");
    std::fs::remove_file(file).unwrap();
}

#[test]
fn run_reports_what_the_contract_names() {
    for (strategy, drafts) in
        [("greedy", false), ("sample", false), ("speculative", true), ("mtad", true)]
    {
        let args = ["run", "Once upon a time", "--strategy", strategy, "--seed", "7", "--json"];
        let out = json(&[&args[..], &["--max-tokens", "40", "--score", "--gamma", "3"]].concat());
        let count = |key: &str| out[key].as_u64().unwrap_or_else(|| panic!("{key}: {out}"));
        assert_eq!(out["strategy"], strategy);
        assert_eq!(count("seed"), 7);
        let ids = out["token_ids"].as_array().unwrap();
        assert_eq!(count("tokens"), ids.len() as u64);
        assert!(count("prompt_tokens") >= 5 && !out["text"].as_str().unwrap().contains("Once"));
        let rounds = count("rounds");
        assert_eq!(count("drafted"), if drafts { 3 * rounds } else { 0 });
        let efficiency = 1.0 + count("accepted") as f64 / rounds as f64;
        assert!((out["block_efficiency"].as_f64().unwrap() - efficiency).abs() < 1e-12);
        if drafts {
            let rate = count("accepted") as f64 / count("drafted") as f64;
            assert!((out["acceptance_rate"].as_f64().unwrap() - rate).abs() < 1e-12);
        } else {
            assert!(out["acceptance_rate"].is_null());
            assert_eq!(rounds, ids.len() as u64);
        }
        assert!(out["perplexity"].as_f64().unwrap() > 1.0);
        assert!(out["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(out["prompt_tokens_per_second"].as_f64().unwrap() > 0.0);
        for phase in ["load", "prefill", "draft", "verify", "sample"] {
            assert!(out["seconds"][phase].as_f64().unwrap() >= 0.0, "{phase}");
        }
        let stop = out["stop"].as_str().unwrap();
        assert!(matches!(stop, "max_tokens" | "eos"), "{stop}");
    }
}

#[test]
fn a_seed_gives_one_text_whatever_the_thread_count() {
    let base = ["run", "The dog", "--json", "-n", "60", "--seed", "3", "--threads"];
    let texts: Vec<_> = ["1", "2", "3"]
        .iter()
        .map(|threads| json(&[&base[..], &[threads]].concat())["token_ids"].clone())
        .collect();
    assert!(texts[0] == texts[1] && texts[1] == texts[2], "{texts:?}");
    let other = json(&["run", "The dog", "--json", "-n", "60", "--seed", "4"]);
    assert_ne!(other["token_ids"], texts[0]);
}

#[test]
fn auto_keeps_its_cost_table_and_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        let output = Command::new(env!("CARGO_BIN_EXE_mtad"))
            .env("MTAD_CACHE_DIR", folder.path().join("new"))
            .args(["run", "The dog", "-s", "auto", "--seed", "5", "-n", "80", "--json"])
            .output()
            .unwrap();
        assert!(
            output.stderr.is_empty() || String::from_utf8_lossy(&output.stderr).contains("plain")
        );
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let (first, second) = (run(), run());
    assert_eq!(first["cost_table"], second["cost_table"]);
    assert_eq!(first["token_ids"], second["token_ids"]);
    let kept: Vec<_> = std::fs::read_dir(folder.path().join("new")).unwrap().collect();
    assert_eq!(kept.len(), 1);
    // A damaged table is said to be so and measured anew.
    std::fs::write(kept[0].as_ref().unwrap().path(), "{").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_mtad"))
        .env("MTAD_CACHE_DIR", folder.path().join("new"))
        .args(["run", "The dog", "-s", "auto", "-n", "5", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("measuring anew"));
}

#[test]
fn text_comes_from_argument_file_or_input_and_is_echoed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "A cat").unwrap();
    let tail = ["-n", "12", "--seed", "1"];
    let from_file = stdout(&[&["run", "--file", path(&file)], &tail[..]].concat());
    let from_argument = stdout(&[&["run", "A cat"], &tail[..]].concat());
    assert_eq!(from_file, from_argument);
    assert!(from_file.starts_with("A cat") && from_file.ends_with('\n'));
    let plain = stdout(&[&["run", "A cat", "--no-echo"], &tail[..]].concat());
    assert_eq!(format!("A cat{plain}"), from_file);
    let parsed = json(&[&["run", "A cat", "--json"], &tail[..]].concat());
    assert_eq!(format!("{}\n", parsed["text"].as_str().unwrap()), plain);
}

#[test]
fn a_stop_text_ends_the_generation_and_is_not_part_of_it() {
    let whole = json(&["run", "Once", "--json", "-s", "greedy", "-n", "60"]);
    let whole = whole["text"].as_str().unwrap();
    // Some words from the middle, which tokens do not respect.
    let words: Vec<&str> = whole.split(' ').collect();
    let stop = format!("{} {}", &words[4][1..], words[5]);
    let out = json(&[
        "run",
        "Once",
        "--json",
        "-s",
        "mtad",
        "--temperature",
        "0",
        "-n",
        "60",
        "--stop",
        &stop,
    ]);
    let text = out["text"].as_str().unwrap();
    assert_eq!(out["stop"], "stop");
    assert_eq!(text, &whole[..whole.find(&stop).unwrap()]);
}

#[test]
fn the_context_is_a_limit_that_is_reported() {
    let out = json(&[
        "run",
        "Once upon a time",
        "--json",
        "--ctx-size",
        "24",
        "-n",
        "100",
        "--seed",
        "1",
    ]);
    let total = out["tokens"].as_u64().unwrap() + out["prompt_tokens"].as_u64().unwrap();
    assert!(out["stop"] == "context" && total == 25 || out["stop"] == "eos", "{out}");
    let long = "Once upon a time there was a dog. ".repeat(10);
    let (code, message) = failure(&["run", &long, "--ctx-size", "16"]);
    assert_eq!(code, 1);
    assert!(message.contains("--ctx-size") && message.contains("16"), "{message}");
}

#[test]
fn stats_go_to_standard_error() {
    let output = mtad(&["run", "Hi", "-n", "20", "--seed", "1", "--stats"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    for word in ["rounds", "drafted", "accepted", "block efficiency", "tokens/s", "verify"] {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    assert!(!String::from_utf8(output.stdout).unwrap().contains("block efficiency"));
}

#[test]
fn usage_errors_exit_with_2_and_name_the_option() {
    for (args, word) in [
        (&["run", "x", "--gamma", "0"][..], "gamma"),
        (&["run", "x", "--tau", "-1"], "tau"),
        (&["run", "x", "--top-p", "1.5"], "top-p"),
        (&["run", "x", "--temperature", "nan"], "temperature"),
        (&["run", "x", "--beam-width", "500"], "beam-width"),
        (&["run", "x", "--strategy", "magic"], "magic"),
        (&["run", "x", "--device", "abacus"], "abacus"),
        (&["run", "x", "--device", "gpu:99"], "there is no device `gpu:99`; there is `cpu`"),
        (&["run", "x", "--draft-device", "abacus"], "abacus"),
        (&["run", "x", "--draft", "d.gguf"], "--model"),
        (&["run", "x", "--stop", ""], "stop"),
        (&["run", "x", "--model", "builtin:target", "--strategy", "mtad"], "--draft"),
        (&["run", "x", "--threads", "0"], "threads"),
        (
            &["logits", "--model", "builtin:draft", "--tokens", "1,99999", "--out", "/dev/null"],
            "99999",
        ),
        (&["frobnicate"], "frobnicate"),
    ] {
        let (code, message) = failure(args);
        assert_eq!(code, 2, "{args:?}: {message}");
        assert!(message.contains(word), "{args:?}: {message}");
    }
}

#[test]
fn bad_files_exit_with_1_and_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("story.gguf");
    std::fs::write(&text, "Once upon a time there was no model here.").unwrap();
    let other = folder.path().join("other.gguf");
    std::fs::write(&other, sentencepiece(&["x", "y"]).to_vec()).unwrap();
    let absent = folder.path().join("absent.gguf");
    for file in [text.as_path(), absent.as_path(), folder.path()] {
        for args in [
            &["inspect", path(file)][..],
            &["run", "x", "--model", path(file)],
            &["tokenize", "--model", path(file), "x"],
            &["logits", "--model", path(file), "--tokens", "1", "--out", "never.npy"],
        ] {
            let (code, message) = failure(args);
            assert_eq!(code, 1, "{message}");
            assert!(message.contains(path(file)), "{message}");
        }
    }
    let args = ["run", "x", "--model", "builtin:target", "--draft", path(&other)];
    let (code, message) = failure(&args);
    assert_eq!(code, 1);
    assert!(message.contains("vocabulary"), "{message}");
    assert!(!Path::new("never.npy").exists());
}

#[test]
fn logits_are_the_same_bytes_in_any_batch() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    std::fs::write(&model, tiny_llama().to_vec()).unwrap();
    let tokens: Vec<String> = (0..150).map(|i| (1 + i * 7 % 260).to_string()).collect();
    let tokens = tokens.join(",");
    let write_with = |batch: &str, options: &[&str]| {
        let out = folder.path().join(format!("{batch}.npy"));
        let args = ["logits", "--model", path(&model), "--tokens", &tokens, "--batch", batch];
        stdout(&[&args[..], &["--out", path(&out)], options].concat());
        std::fs::read(out).unwrap()
    };
    let write = |batch: &str| write_with(batch, &[]);
    let one = write("1");
    for batch in ["2", "7", "64", "1000"] {
        assert!(write(batch) == one, "--batch {batch}");
    }
    // Where the weights lie makes no difference either.
    assert!(write_with("64", &["--no-repack"]) == one, "--no-repack");
    let numbers = read_npy(&folder.path().join("1.npy"));
    assert_eq!(numbers.len(), 150 * 264);
    assert!(String::from_utf8_lossy(&one[..128]).contains("(150, 264)"));
}

#[test]
fn tokenize_needs_only_a_vocabulary() {
    let out = json(&["tokenize", "--json", "Once upon a time"]);
    let ids = out["ids"].as_array().unwrap();
    let pieces: String =
        out["pieces"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    assert_eq!(pieces, " Once upon a time");
    let with = json(&["tokenize", "--bos", "--json", "Once upon a time"]);
    assert_eq!(with["ids"].as_array().unwrap().len(), ids.len() + 1);
    let Some(vocabulary) = shared("vectors/tokenizer/ggml-vocab-gpt-2.gguf") else { return };
    let out = json(&["tokenize", "--model", path(&vocabulary), "--json", "Hello world"]);
    assert_eq!(out["ids"], serde_json::json!([15496, 995]));
}

#[test]
fn inspect_lists_metadata_and_tensors() {
    let out = json(&["inspect", "builtin:target", "--json"]);
    assert_eq!(out["metadata"]["general.architecture"], "llama");
    assert!(out["tensors"].as_array().unwrap().iter().any(|t| t["name"] == "token_embd.weight"));
    let text = stdout(&["inspect", "builtin:draft"]);
    assert!(text.contains("llama.block_count") && text.contains("blk.0.attn_q.weight"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_text_and_still_reports() {
    use std::io::Read;
    let mut child = Command::new(env!("CARGO_BIN_EXE_mtad"))
        // Greedy and scored at a repeat penalty, so that it goes on for long.
        .args(["run", "Once", "-n", "100000", "--ctx-size", "100000", "--stats", "--seed", "1"])
        .args(["--strategy", "sample", "--temperature", "5"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 64];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("ended by interrupt") || stderr.contains("ended by eos"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mtad"))
        .args(["run", "Once upon a time", "-n", "200", "--seed", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[cfg(feature = "grammar")]
#[test]
fn text_can_be_held_to_a_form() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let schema = r#"{"type": "object", "properties": {"name": {"enum": ["Max", "Spot"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 15}},
        "required": ["name", "age"], "additionalProperties": false}"#;
    let schema_file = file("dog.json", schema);
    let gbnf = file("a.gbnf", "root ::= \" \" (\"yes\" | \"no\") \"!\"");
    let lark = file("b.lark", "start: \" \" (\"yes\" | \"no\") \"!\"");
    let unnamed = file("c", "root ::= \" yes!\" | \" no!\"");
    let args = ["run", "There was a dog.", "--seed", "7", "--json", "-n", "100"];
    for schema in [schema, &schema_file] {
        let out = json(&[&args[..], &["--json-schema", schema, "-s", "mmtad"]].concat());
        assert_eq!(out["stop"], "eos");
        let dog: Value = serde_json::from_str(out["text"].as_str().unwrap()).unwrap();
        assert!(dog["name"] == "Max" || dog["name"] == "Spot");
        assert!((1..=15).contains(&dog["age"].as_i64().unwrap()));
        assert!(out["forced"].as_u64().unwrap() > 0);
    }
    for with in [
        &["--regex", " (yes|no)!"],
        &["--grammar", &gbnf[..]],
        &["--grammar", &lark[..]],
        &["--grammar", &unnamed[..]],
    ] {
        let out = json(&[&args[..], with].concat());
        let text = out["text"].as_str().unwrap();
        assert!(text == " yes!" || text == " no!", "{with:?}: {text:?}");
    }
    let broken = file("d.lark", "start: b");
    for (with, what) in [
        (&["--regex", "("][..], "--regex: the regular expression cannot be used: "),
        (&["--grammar", &broken], "--grammar: the Lark grammar cannot be used: "),
        (&["--json-schema", "{"], "--json-schema: it is no JSON: "),
        (
            &["--json-schema", "{\"type\": \"what\"}"],
            "--json-schema: the JSON schema cannot be used: ",
        ),
        (&["--regex", "a", "--json-schema", "{}"], "cannot be used with"),
    ] {
        let (code, message) = failure(&[&args[..], with].concat());
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(what), "{message}");
    }
    let (code, message) = failure(&[&args[..], &["--grammar", "no-such-file"]].concat());
    assert!(code == 1 && message.contains("no-such-file"), "{message}");
}
