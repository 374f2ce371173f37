//! The C ABI: its header, its symbols, and programs in C and Python that use it.
//!
//! Cargo builds `libmtad.so` and `libmtad.a` with the library that integration tests link, and
//! leaves them beside the test. Programs in C need a compiler; where there is none those tests say
//! that they are skipped (in CI that is a failure).
#![cfg(all(feature = "builtin-pair", target_os = "linux"))]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const SEED: &str = "11";
const PROMPT: &str = "Once upon a time";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the tests' own.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi");
    fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

/// The folder of the libraries: that of this test.
fn libraries() -> PathBuf {
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    assert!(folder.join("libmtad.so").is_file(), "no libmtad.so in {}", folder.display());
    folder
}

/// Whether a program is there; where it is not, a line says what is skipped, and CI fails.
fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    let in_ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(there || !in_ci, "{program} is not there");
    if !there {
        eprintln!("skipped: {program} is not there");
    }
    there
}

/// Runs a program that succeeds; its standard output.
fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    let stdout = String::from_utf8(stdout).unwrap();
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout
}

/// Compiles a C program against the shared library.
fn compile(source: &str, name: &str) -> PathBuf {
    let (program, libraries) = (scratch(name), libraries());
    let strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g"];
    let mut cc = Command::new("cc");
    cc.args(strict).arg("-D_POSIX_C_SOURCE=200809L");
    cc.arg("-I").arg(root().join("include")).arg(root().join(source)).arg("-o").arg(&program);
    // (An rpath of the old kind goes before the folders that cargo puts into the environment, in one
    // of which an older build may have left its library.)
    let rpath = format!("-Wl,--disable-new-dtags,-rpath,{}", libraries.display());
    cc.arg("-L").arg(&libraries).arg(rpath);
    run(cc.args(["-lmtad", "-lpthread", "-lm"]));
    program
}

fn story() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| compile("examples/c/story.c", "story"))
}

/// What the command line says.
fn said(extra: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.args(["run", PROMPT, "--seed", SEED, "--threads", "1"]).args(extra);
    run(&mut command)
}

/// Leaves what only Rust needs out of the comments.
fn without_safety(header: &str) -> String {
    let mut out = String::new();
    let mut skipping = false;
    for line in header.lines() {
        if line == "// # Safety" {
            skipping = true;
            out.truncate(out.trim_end_matches("//\n").len());
        } else if !line.starts_with("//") {
            skipping = false;
        }
        if !(skipping || line.is_empty() && out.ends_with("\n\n")) {
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
    out
}

#[test]
fn the_header_is_that_of_the_code() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let parts = ["types", "status", "pair", "session", "generation"];
    let builder = parts.iter().fold(cbindgen::Builder::new().with_config(config), |b, part| {
        b.with_src(root().join(format!("src/capi/{part}.rs")))
    });
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = without_safety(std::str::from_utf8(&made).unwrap());
    let path = root().join("include/mtad.h");
    if std::env::var_os("MTAD_WRITE_HEADER").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(kept, made, "MTAD_WRITE_HEADER=1 cargo test --test capi the_header writes it anew");
}

#[test]
fn the_shared_library_exports_what_the_header_names() {
    let symbols =
        run(Command::new("nm").args(["-D", "--defined-only"]).arg(libraries().join("libmtad.so")));
    let mut exported: Vec<&str> =
        symbols.lines().filter_map(|line| line.split_whitespace().last()).collect();
    let header = fs::read_to_string(root().join("include/mtad.h")).unwrap();
    let declared = |line: &str| {
        let name =
            line.split(['(', ' ', '*']).find(|w| w.starts_with("mtad_") && *w != "mtad_status")?;
        let declares = line.contains('(') && !line.starts_with([' ', '/', '#']);
        (declares && !line.starts_with("typedef")).then(|| name.to_owned())
    };
    let mut named: Vec<String> = header.lines().filter_map(declared).collect();
    exported.sort_unstable();
    named.sort_unstable();
    assert!(named.len() >= 30, "{named:?}");
    assert_eq!(exported, named);
}

#[test]
fn c_says_what_the_command_line_says() {
    if !have("cc") {
        return;
    }
    let said = said(&["--no-echo", "-n", "40"]);
    let with = ["-s", SEED, "-n", "40", PROMPT];
    assert_eq!(run(Command::new(story()).args(with)), said);

    // The static library, with what a Rust library needs on Linux.
    let program = scratch("story-static");
    let mut cc = Command::new("cc");
    cc.arg("-I").arg(root().join("include")).arg(root().join("examples/c/story.c"));
    cc.arg(libraries().join("libmtad.a")).arg("-o").arg(&program);
    run(cc.args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"]));
    assert_eq!(run(Command::new(&program).args(with)), said);
}

#[test]
fn python_says_what_the_command_line_says() {
    if !have("python3") {
        return;
    }
    let mut python = Command::new("python3");
    python.env("MTAD_LIBRARY", libraries().join("libmtad.so")).env("PYTHONDONTWRITEBYTECODE", "1");
    let text = run(python.arg(root().join("examples/python/mtad.py")).args([PROMPT, SEED, "40"]));
    assert_eq!(text, said(&["--no-echo", "-n", "40"]));

    let script = "
import mtad, sys
file = sys.argv[1]
settings = dict(seed=11, score=1)
with mtad.Pair(threads=1) as pair, pair.session() as session:
    assert pair.detokenize(pair.tokenize('Once upon a time')) == 'Once upon a time'
    session.prompt('Once upon a time')
    assert len(session.logits()) > 100 and len(session.tokens()) > 2
    whole = [token.text for token in session.clone().generate(20, **settings)]
    generation = session.generate(20, **settings)
    first = [next(generation) for _ in range(7)]
    assert any(token.drafted for token in first) and all(token.log_prob <= 0 for token in first)
    try:
        session.save(file)
        sys.exit('a session that is busy was saved')
    except mtad.MtadError as error:
        assert error.code == -13 and 'generation' in str(error), error
    generation.close()
    session.save(file)
    restored = pair.session(file)
    text = [token.text for token in first] + [t.text for t in restored.generate(13, **settings)]
    assert text == whole, (text, whole)
    assert list(session.generate(5, stop=['e', 'a'])) is not None
    try:
        session.generate(gamma=0)
        sys.exit('gamma 0 was taken')
    except mtad.MtadError as error:
        assert 'gamma' in str(error), error
    restored.close()
    try:
        restored.reset()
        sys.exit('a closed session was used')
    except mtad.MtadError as error:
        assert error.code == -2, error
print('fine')
";
    let mut python = Command::new("python3");
    python.env("MTAD_LIBRARY", libraries().join("libmtad.so")).env("PYTHONDONTWRITEBYTECODE", "1");
    python.env("PYTHONPATH", root().join("examples/python")).args(["-c", script]);
    assert_eq!(run(python.arg(scratch("python.session"))), "fine\n");
}

#[test]
fn a_session_goes_on_in_another_process() {
    if !have("cc") {
        return;
    }
    let whole = run(Command::new(story()).args(["-s", SEED, "-n", "24", PROMPT]));
    let file = scratch("story.session");
    let file = file.to_str().unwrap();
    for at in 0..24 {
        let (first, rest) = (at.to_string(), (24 - at).to_string());
        let first = run(Command::new(story()).args(["-s", SEED, "-n", &first, "-w", file, PROMPT]));
        // The seed of later generations is of no account.
        let rest = run(Command::new(story()).args(["-s", "99", "-n", &rest, "-l", file]));
        assert_eq!(first.strip_suffix('\n').unwrap().to_owned() + &rest, whole, "saved at {at}");
    }
}

#[test]
fn c_may_do_what_nobody_should() {
    if !have("cc") {
        return;
    }
    let torture = compile("tests/c/torture.c", "torture");
    let folder = scratch("torture-files");
    fs::create_dir_all(&folder).unwrap();
    let mut torture = Command::new(torture);
    // (Where there is none, Mesa complains on standard error.)
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        torture.env("XDG_RUNTIME_DIR", &folder);
    }
    let output = torture.arg(&folder).arg(root().join("models/target.gguf")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout.is_empty() && stderr.is_empty(), "{stderr}");
}

#[test]
fn valgrind_finds_nothing_in_the_example() {
    if !have("cc") || !have("valgrind") {
        return;
    }
    let mut valgrind = Command::new("valgrind");
    // Valgrind knows no AVX-512. Threads that serve the process to its end are no leak.
    valgrind.env("MTAD_CPU", if cfg!(target_arch = "x86_64") { "avx2" } else { "scalar" });
    valgrind.args(["-q", "--error-exitcode=9", "--leak-check=full"]);
    valgrind
        .args(["--show-leak-kinds=definite,indirect", "--errors-for-leak-kinds=definite,indirect"]);
    run(valgrind.arg(story()).args(["-s", SEED, "-n", "12", PROMPT]));
}
