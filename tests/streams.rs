//! What happens to the program from outside: streams that take nothing more, terminals, signals,
//! pipes where files are expected.
#![cfg(all(target_os = "linux", feature = "builtin-pair"))]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{shared, tiny_llama};
use mtad::gguf::OwnedValue;
use serde_json::Value;

/// The binary with some arguments, no input, and no cache of the user's.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.env("MTAD_CACHE_DIR", env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null()).args(args);
    command
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Waits for at most `most`; a child that takes longer is ended, and that is a failure.
fn finish(mut child: Child, most: Duration) -> Output {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > most {
            child.kill().unwrap();
            panic!("it still ran after {most:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn signal(name: &str, child: &Child) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// A session that a run keeps: the tokens of it that a second run finds evaluated.
fn reused(cache: &Path) -> u64 {
    let args = ["run", "Once upon a time", "-n", "1", "--seed", "1", "--json", "--prompt-cache"];
    let output = command(&args).arg(cache).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    json["prompt_tokens_reused"].as_u64().unwrap()
}

#[test]
fn a_full_standard_error_changes_nothing() {
    let meter = ["--meter", "cmd:echo 5 W", "--allow-no-meter", "--stats"];
    let run = ["run", "Once upon a time", "-n", "20", "--seed", "1"];
    let expected = command(&run).output().unwrap().stdout;
    for (args, code) in [
        (&run[..], 0),
        (&[&run[..], &["--stats"]].concat(), 0),
        (&[&run[..], &["--ctx-size", "100000"]].concat(), 0),
        (&[&run[..], &meter].concat(), 0),
        (&["energy", "x", "--assume-watts", "5", "--repeats", "1", "-n", "4"], 0),
        (&["eval", "-s", "greedy", "-n", "4", "--repeats", "1"], 0),
        (&["run", "x", "--gamma", "0"], 2),
        (&["run", "x", "--frobnicate"], 2),
        (&["run", "x", "--model", "nowhere.gguf"], 1),
        (&["perplexity", "--file", "nowhere.txt"], 1),
    ] {
        let output = command(args).stderr(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(args[0] != "run" || code != 0 || output.stdout == expected, "{args:?}");
    }
}

#[test]
fn a_full_standard_output_is_an_error_that_loses_no_session() {
    for args in [&["--help"][..], &["inspect", "builtin:draft"], &["tokenize", "x", "--json"]] {
        let output = command(args).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(text(&output.stderr).starts_with("mtad: standard output: "), "{output:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, options) in [("text", &[][..]), ("json", &["--json"]), ("stats", &["--stats"])] {
        let cache = folder.path().join(name);
        let args = ["run", "Once upon a time", "-n", "20", "--seed", "1", "--prompt-cache"];
        let mut run = command(&args);
        let output = run.arg(&cache).args(options).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert!(text(&output.stderr).contains("mtad: standard output: "), "{name}: {output:?}");
        assert!(reused(&cache) > 3, "{name}");
    }
}

#[test]
fn a_reader_that_leaves_loses_no_session() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("session");
    let args = ["run", "Once upon a time", "-n", "2000", "--seed", "1", "--ctx-size", "4000"];
    let mut child = command(&args)
        .args(["--temperature", "5", "--prompt-cache"])
        .arg(&cache)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 30];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = finish(child, Duration::from_secs(60));
    assert!(output.status.success(), "{output:?}");
    assert!(reused(&cache) > 3);
}

/// Runs a command whose standard output and error are a terminal; what the terminal shows.
fn at_a_terminal(args: &[&str]) -> String {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut run = command(args);
    run.stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut child = run.spawn().unwrap();
    // What keeps the other side open is the child alone.
    drop(run);
    let (mut master, mut shown, mut piece) = (File::from(master), Vec::new(), [0; 4096]);
    // A terminal whose other side is closed fails to read.
    while let Ok(n @ 1..) = master.read(&mut piece) {
        shown.extend_from_slice(&piece[..n]);
    }
    child.wait().unwrap();
    String::from_utf8(shown).unwrap()
}

/// A model all of whose tokens are what a terminal obeys, and with such names.
fn hostile() -> mtad::gguf::Writer {
    let mut writer = tiny_llama();
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((3..264).map(|i| format!("\u{1b}[{i}m")));
    writer
        .set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens))
        .set("tokenizer.ggml.token_type", OwnedValue::I32s([vec![2, 3, 3], vec![1; 261]].concat()))
        .set("tokenizer.ggml.scores", OwnedValue::F32s(vec![0.0; 264]))
        .set("evil\u{1b}]0;title\u{7}", "first\nsecond\u{9b}31m");
    writer
}

#[test]
fn control_characters_are_shown_and_not_obeyed() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("hostile.gguf");
    fs::write(&model, hostile().to_vec()).unwrap();
    let run = ["run", "\u{1b}[7m", "--model", path(&model), "-n", "5", "--seed", "1"];
    let run = [&run[..], &["--strategy", "sample", "--device", "cpu"]].concat();

    let piped = command(&run).output().unwrap();
    let written = text(&piped.stdout);
    assert!(written.matches('\u{1b}').count() >= 4, "{piped:?}");
    let shown = at_a_terminal(&run);
    assert!(!shown.contains('\u{1b}'), "{shown:?}");
    assert_eq!(shown.replace("\r\n", "\n"), written.replace('\u{1b}', "\\u001b"));
    let raw = at_a_terminal(&[&run[..], &["--raw"]].concat());
    assert_eq!(raw.replace("\r\n", "\n"), written);

    // Names and values of files are never obeyed, wherever they are shown.
    for args in [&["inspect", path(&model)][..], &["inspect", "--json", path(&model)]] {
        let piped = command(args).output().unwrap();
        assert!(piped.status.success());
        for shown in [text(&piped.stdout).to_owned(), at_a_terminal(args)] {
            let shown = shown.replace("\r\n", "\n");
            assert!(shown.contains("evil\\u001b]0;title\\u0007"), "{shown}");
            let obeyed = |c: char| c.is_control() && c != '\n';
            assert!(!shown.contains(obeyed), "{args:?}: {:?}", shown.find(obeyed));
        }
        if args.contains(&"--json") {
            let json: Value = serde_json::from_slice(&piped.stdout).unwrap();
            assert_eq!(json["metadata"]["evil\u{1b}]0;title\u{7}"], "first\nsecond\u{9b}31m");
        }
    }
    // Nor are those of errors, also of the command line's own.
    let bad = folder.path().join("no\u{1b}[2Jmodel.gguf");
    fs::write(&bad, "nothing").unwrap();
    for args in [&["inspect", path(&bad)][..], &["inspect", "builtin:draft", path(&bad)]] {
        let output = command(args).output().unwrap();
        let shown = text(&output.stderr);
        assert!(shown.contains("no\\u001b[2Jmodel.gguf"), "{shown:?}");
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
    }
}

/// A prompt that takes minutes to evaluate.
fn long_prompt(folder: &Path) -> String {
    let file = folder.join("prompt.txt");
    fs::write(&file, "hello the world ".repeat(9000)).unwrap();
    path(&file).to_owned()
}

#[test]
fn a_signal_ends_a_prompt_and_keeps_what_is_evaluated() {
    let Some(model) = shared("cases/longctx.gguf") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (prompt, cache) = (long_prompt(folder.path()), folder.path().join("session"));
    let run = ["run", "-m", path(&model), "-f", &prompt, "--ctx-size", "60000", "--device", "cpu"];
    let run = [&run[..], &["-n", "5", "--json", "--prompt-cache", path(&cache)]].concat();
    let mut reused = 0;
    for name in ["-INT", "-TERM"] {
        let child = command(&run).stdout(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs(3));
        signal(name, &child);
        // A second, and one more for a machine that does other things.
        let output = finish(child, Duration::from_secs(2));
        assert_eq!(output.status.code(), Some(0), "{name}");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&json["stop"], &json["tokens"]), (&"interrupt".into(), &0.into()));
        // The second one finds what the first one has done.
        assert!(json["prompt_tokens_reused"].as_u64().unwrap() >= reused, "{name}: {json}");
        reused = 100;
    }
}

#[test]
fn a_signal_ends_whatever_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let Some(model) = shared("cases/longctx.gguf") else { return };
    let prompt = long_prompt(folder.path());
    let tokens = vec!["5"; 40_000].join(",");
    let npy = folder.path().join("logits.npy");
    let long = ["--ctx-size", "60000", "--device", "cpu", "--model", path(&model)];
    for args in [
        &["energy", "x", "--meter", "cmd:echo 5 W", "--idle", "300"][..],
        &["run", "x", "--meter", "cmd:echo 5 W", "--idle", "300"],
        &[&["perplexity", "-f", &prompt, "--chunk", "20000"], &long[..]].concat(),
        &[&["logits", "--tokens", &tokens, "--out", path(&npy)], &long[..]].concat(),
        // A file that never ends is being read.
        &["tokenize", "--model", "builtin:draft"],
    ] {
        let mut run = command(args);
        if args[0] == "tokenize" {
            run.stdin(File::open("/dev/zero").unwrap());
        }
        let child = run.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        signal("-TERM", &child);
        let output = finish(child, Duration::from_secs(2));
        assert_eq!(output.status.code(), Some(130), "{args:?}: {output:?}");
    }
}

/// The numbers of processes whose command line has a word in it.
fn processes_with(word: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = entries.map(|entry| entry.path().join("cmdline"));
    let with = all.filter(|file| {
        fs::read(file).is_ok_and(|line| String::from_utf8_lossy(&line).contains(word))
    });
    with.map(|file| path(&file).to_owned()).collect()
}

#[test]
fn what_a_meter_starts_ends_with_it() {
    let gone = |word: &str| {
        let start = Instant::now();
        while !processes_with(word).is_empty() {
            assert!(start.elapsed().as_secs() < 10, "{:?} is left", processes_with(word));
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    // A command whose own children outlive it unless they are ended.
    let meter = |sleep: &str| format!("cmd:sleep {sleep} & while echo 5 W; do sleep 0.05; done");
    let run = ["run", "Once", "-n", "20", "--seed", "1", "--allow-no-meter", "--meter"];
    let output = command(&run).arg(meter("98760.1")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    gone("98760.1");
    // Nor does it matter how the program ends.
    for (kill, sleep) in [("-TERM", "98760.2"), ("-KILL", "98760.3")] {
        let energy = ["energy", "x", "--idle", "300", "--meter"];
        let child = command(&energy).arg(meter(sleep)).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while processes_with(&format!("sleep\0{sleep}")).is_empty() {
            assert!(start.elapsed().as_secs() < 60, "the meter does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        signal(kill, &child);
        finish(child, Duration::from_secs(5));
        gone(sleep);
    }
}

#[test]
fn a_fifo_in_the_place_of_a_file_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let make = |fifo: &Path| assert!(Command::new("mkfifo").arg(fifo).status().unwrap().success());
    make(&fifo);
    let run = |args: &[&str]| {
        let mut run = command(args);
        let run = run.env("MTAD_CACHE_DIR", folder.path().join("cache"));
        let child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        finish(child, Duration::from_secs(60))
    };
    let auto = ["run", "The dog", "-s", "auto", "-n", "5", "--seed", "1"];
    for args in [
        &[&auto[..], &["--cost-table", path(&fifo)]].concat()[..],
        &["run", "x", "--prompt-cache", path(&fifo)],
        &["inspect", path(&fifo)],
        &["run", "x", "-n", "5", "--meter", &format!("file:{}", path(&fifo))],
    ] {
        let output = run(args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.contains("regular file") && stderr.contains(path(&fifo)), "{stderr}");
    }
    // One in the place of a kept table is as good as a damaged one.
    assert!(run(&auto).status.success());
    let kept: Vec<_> = fs::read_dir(folder.path().join("cache")).unwrap().flatten().collect();
    let table = kept.iter().find(|f| f.file_name().to_string_lossy().starts_with("costs")).unwrap();
    fs::remove_file(table.path()).unwrap();
    make(&table.path());
    let output = run(&auto);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("measuring anew"), "{output:?}");
}

#[test]
fn logits_that_are_no_numbers_name_their_model() {
    let Some(nan) = shared("cases/nan.gguf") else { return };
    let folder = tempfile::tempdir().unwrap();
    let prompt = folder.path().join("text.txt");
    fs::write(&prompt, "hello the world ".repeat(100)).unwrap();
    let mut all = vec![vec!["perplexity", "-f", path(&prompt), "--chunk", "32"]];
    for strategy in ["greedy", "sample", "beam", "mtjd"] {
        all.push(vec!["run", "hello", "-n", "5", "-s", strategy, "--json"]);
        all.push(vec!["run", "hello", "-n", "5", "-s", strategy, "--score", "--top-k", "9"]);
    }
    for mut args in all {
        args.extend(["--model", path(&nan)]);
        let output = command(&args).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(
            stderr.starts_with(&format!("mtad: {}: its logits are not", path(&nan))),
            "{stderr}"
        );
        assert!(!text(&output.stdout).contains("NaN"), "{args:?}");
    }
    // Which of a pair it is.
    let target = shared("cases/rope_typed.gguf").unwrap();
    for strategy in ["speculative", "specinfer", "mtad", "mmtad", "dsbd", "bild", "typical", "auto"]
    {
        let pairs = [(&nan, &target), (&target, &nan)];
        for (target, draft) in pairs {
            let args = ["run", "hello", "-n", "5", "-s", strategy, "--model", path(target)];
            let output = command(&args).args(["--draft", path(draft)]).output().unwrap();
            let stderr = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
            assert!(stderr.contains(path(&nan)) && stderr.contains("not finite"), "{stderr}");
        }
    }
}
