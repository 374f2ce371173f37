//! What the program writes, whatever happens: killed at any moment, a full disk, two at a time,
//! outputs that are inputs, links, devices. What was there before stays until the new file is whole.
#![cfg(all(unix, feature = "builtin-pair"))]

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The program on one thread of the CPU, in a folder.
fn mtad(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.current_dir(folder).args(args).stdin(Stdio::null());
    command.env("MTAD_CACHE_DIR", folder.join("cache"));
    command
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The files of a folder, but for caches.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name != "cache").collect();
    names.sort();
    names
}

/// A command that writes a file.
struct Writes {
    args: &'static [&'static str],
    file: &'static str,
}

const MODEL: Writes =
    Writes { args: &["quantize", "builtin:target", "out", "F32", "--requantize"], file: "out" };
const LOGITS: Writes = Writes {
    args: &[
        "logits",
        "--model",
        "builtin:draft",
        "--tokens",
        "1,5,9,13,17,21,25,29",
        "--out",
        "out",
        "--device",
        "cpu",
        "--threads",
        "1",
    ],
    file: "out",
};
const SESSION: Writes = Writes {
    args: &[
        "run",
        "Once upon a time",
        "--prompt-cache",
        "out",
        "--max-tokens",
        "8",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--threads",
        "1",
    ],
    file: "out",
};
const ALL: [Writes; 3] = [MODEL, LOGITS, SESSION];

impl Writes {
    fn command(&self, folder: &Path) -> Command {
        mtad(folder, self.args)
    }

    /// What it writes when nothing goes wrong, and how long it takes.
    fn whole(&self) -> (Vec<u8>, Duration) {
        let folder = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let done = output(&mut self.command(folder.path()));
        assert!(done.status.success(), "{}", stderr(&done));
        (fs::read(folder.path().join(self.file)).unwrap(), start.elapsed())
    }
}

/// A session of another text than [`SESSION`] writes.
fn other_session() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let args: Vec<&str> = SESSION
        .args
        .iter()
        .map(|arg| if *arg == "Once upon a time" { "The old dog" } else { arg })
        .collect();
    let done = output(&mut mtad(folder.path(), &args));
    assert!(done.status.success(), "{}", stderr(&done));
    fs::read(folder.path().join(SESSION.file)).unwrap()
}

#[test]
fn a_process_killed_at_any_moment_leaves_the_old_file_or_the_new_one() {
    for writes in [MODEL, SESSION] {
        let (whole, duration) = writes.whole();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(writes.file);
        // A session that is there is read: it has to be one, of another text.
        let is_session = writes.args[0] == "run";
        let old = if is_session { other_session() } else { b"precious".to_vec() };
        let (mut before, mut after) = (0, 0);
        const MOMENTS: u32 = 24;
        for moment in 0..MOMENTS {
            fs::write(&path, &old).unwrap();
            let mut child = writes.command(folder.path()).stdout(Stdio::null()).spawn().unwrap();
            std::thread::sleep(duration * moment * 5 / 4 / MOMENTS);
            child.kill().unwrap();
            child.wait().unwrap();
            let now = fs::read(&path).unwrap();
            match () {
                () if now == old => before += 1,
                () if now == whole => after += 1,
                () => panic!("moment {moment}: {} bytes that are neither", now.len()),
            }
            // Nothing but what is being written is beside it, and nobody minds.
            for name in names(folder.path()).iter().filter(|name| *name != writes.file) {
                assert!(name.starts_with("out.") && name.ends_with(".part"), "{name}");
            }
        }
        let parts = names(folder.path()).len() - 1;
        println!("{}: {before} old, {after} new, {parts} left behind", writes.args[0]);
        assert!(before > 0, "every process was done before it was killed");
        let again = output(&mut writes.command(folder.path()));
        assert!(again.status.success(), "{}", stderr(&again));
    }
}

/// Runs a command with files limited to so many KiB; beyond them a write fails, or the process is
/// ended where that signal is not ignored.
fn limited(command: &Command, kib: u32, ends: bool) -> Output {
    let ignore = if ends { "" } else { "trap '' XFSZ; " };
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("{ignore}ulimit -f {}; exec \"$@\"", 2 * kib)).arg("sh");
    shell.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    shell.current_dir(command.get_current_dir().unwrap());
    for (key, value) in command.get_envs() {
        shell.env(key, value.unwrap());
    }
    output(&mut shell)
}

#[test]
fn a_write_that_fails_leaves_the_old_file() {
    for writes in ALL {
        let (whole, _) = writes.whole();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(writes.file);
        let is_session = writes.args[0] == "run";
        let kib = whole.len() as u32 >> 10;
        for at in [0, 1, kib / 2, kib - 1] {
            for ends in [false, true] {
                // A session that is there is read; what it becomes is longer.
                let old = if is_session { whole.clone() } else { b"precious".to_vec() };
                fs::write(&path, &old).unwrap();
                let failed = limited(&writes.command(folder.path()), at, ends);
                assert!(!failed.status.success(), "{at} KiB: {}", writes.args[0]);
                assert!(fs::read(&path).unwrap() == old, "{at} KiB: {}", writes.args[0]);
                if !ends {
                    let stderr = stderr(&failed);
                    assert!(stderr.contains("out: File too large"), "{stderr}");
                    assert_eq!(failed.status.code(), Some(1), "{stderr}");
                    assert_eq!(names(folder.path()), ["out"]);
                }
                for part in names(folder.path()).iter().filter(|name| *name != "out") {
                    fs::remove_file(folder.path().join(part)).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_journal_survives_a_full_disk_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("prompts"), "Once upon a time\nThe dog\nTom and Anna\n").unwrap();
    let args = [
        "eval",
        "--prompts",
        "prompts",
        "-s",
        "sample,mtad",
        "--tau",
        "0.1",
        "-n",
        "16",
        "--repeats",
        "2",
        "--json",
        "--out",
        "eval",
        "--device",
        "cpu",
        "--threads",
        "1",
    ];
    let journal = folder.path().join("eval/journal.jsonl");
    let mut lines = 0;
    for kib in [0, 1, 2, 3] {
        for ends in [false, true] {
            let failed = limited(&mtad(folder.path(), &args), kib, ends);
            assert!(!failed.status.success(), "{kib} KiB");
            let text = fs::read(&journal).unwrap_or_default();
            let whole = text.iter().filter(|byte| **byte == b'\n').count();
            assert!(whole >= lines, "{kib} KiB: lines were lost");
            assert!(ends || text.is_empty() || text.ends_with(b"\n"), "{kib} KiB: half a line");
            lines = whole;
        }
    }
    assert!(lines > 2, "{lines}");
    let done = output(&mut mtad(folder.path(), &args));
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(stderr(&done).contains(&format!("{} generations are done already", lines - 1)));
    let text = fs::read_to_string(&journal).unwrap();
    assert_eq!(text.lines().filter(|line| line.contains("\"arm\"")).count(), 2 * 3 * 2);
    // The report of before stays when a new one does not fit.
    let page = folder.path().join("eval/report.html");
    let before = fs::read(&page).unwrap();
    let failed = limited(&mtad(folder.path(), &args), 5, false);
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    assert_eq!(fs::read(&page).unwrap(), before);
    assert_eq!(
        names(&folder.path().join("eval")),
        ["journal.jsonl", "report.html", "results.csv", "results.json"]
    );
}

/// A small disk in memory, for as long as it is there.
struct Disk(PathBuf);

impl Disk {
    /// None, with a line that says so, where one may not be mounted.
    fn mount(at: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&at)
            .stderr(Stdio::null())
            .status();
        match mount {
            Ok(status) if status.success() => Some(Disk(at)),
            _ => {
                eprintln!("skipped: a disk may not be mounted here");
                None
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_full_disk_keeps_what_is_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(folder.path().join("disk"), "64k") else { return };
    let path = disk.0.join("out");
    for writes in [MODEL, LOGITS] {
        fs::write(&path, "precious").unwrap();
        let failed = output(&mut writes.command(&disk.0));
        let stderr = stderr(&failed);
        assert_eq!(failed.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("out: No space left on device"), "{stderr}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert_eq!(names(&disk.0), ["out"]);
    }
}

#[test]
fn processes_that_write_one_file_do_not_meet() {
    let (whole, _) = LOGITS.whole();
    let folder = tempfile::tempdir().unwrap();
    let start = |_| LOGITS.command(folder.path()).stderr(Stdio::piped()).spawn().unwrap();
    let children: Vec<_> = (0..4).map(start).collect();
    for child in children {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
    }
    assert_eq!(fs::read(folder.path().join("out")).unwrap(), whole);
    assert_eq!(names(folder.path()), ["out"]);
}

#[test]
fn streams_are_written_to_and_devices_stay() {
    for writes in ALL {
        let (whole, _) = writes.whole();
        let folder = tempfile::tempdir().unwrap();
        let args: Vec<&str> =
            writes.args.iter().map(|arg| if *arg == "out" { "/dev/null" } else { arg }).collect();
        // (A session is read first where there is something.)
        if writes.args[0] != "run" {
            let done = output(&mut mtad(folder.path(), &args));
            assert!(done.status.success(), "{}", stderr(&done));
            assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());

            let args: Vec<&str> = args
                .iter()
                .map(|arg| if *arg == "/dev/null" { "/dev/stdout" } else { arg })
                .collect();
            let done = output(&mut mtad(folder.path(), &args));
            assert!(done.status.success(), "{}", stderr(&done));
            assert!(done.stdout == whole, "{}: {} bytes", args[0], done.stdout.len());
            // Redirected to a file: after what is there.
            let log = folder.path().join("log");
            fs::write(&log, "first").unwrap();
            let file = fs::File::options().append(true).open(&log).unwrap();
            let done = mtad(folder.path(), &args).stdout(file).output().unwrap();
            assert!(done.status.success(), "{}", stderr(&done));
            assert!(fs::read(&log).unwrap() == [b"first", &whole[..]].concat());
            fs::remove_file(&log).unwrap();

            let fifo = folder.path().join("out");
            assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
            let mut child = writes.command(folder.path()).stdout(Stdio::null()).spawn().unwrap();
            let mut bytes = Vec::new();
            fs::File::open(&fifo).unwrap().read_to_end(&mut bytes).unwrap();
            assert!(child.wait().unwrap().success() && bytes == whole);
            assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
            assert_eq!(names(folder.path()), ["out"]);
            fs::remove_file(&fifo).unwrap();
        }
        // A link is followed, and stays.
        symlink("there", folder.path().join("out")).unwrap();
        let done = output(&mut writes.command(folder.path()));
        assert!(done.status.success(), "{}", stderr(&done));
        assert!(fs::read(folder.path().join("there")).unwrap() == whole);
        assert!(fs::symlink_metadata(folder.path().join("out")).unwrap().is_symlink());
    }
    // What is not there to be read.
    let full = output(&mut mtad(
        Path::new("."),
        &["quantize", "builtin:draft", "/dev/full", "F32", "--requantize"],
    ));
    assert_eq!(full.status.code(), Some(1));
    assert!(stderr(&full).contains("/dev/full: No space left"), "{}", stderr(&full));
}

#[test]
fn no_output_is_an_input() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m.gguf");
    let made = output(&mut mtad(
        folder.path(),
        &["quantize", "builtin:draft", "m.gguf", "F16", "--requantize"],
    ));
    assert!(made.status.success(), "{}", stderr(&made));
    fs::hard_link(&model, folder.path().join("hard")).unwrap();
    symlink("m.gguf", folder.path().join("soft")).unwrap();
    fs::write(folder.path().join("prompts"), "Once upon a time\n").unwrap();
    fs::create_dir(folder.path().join("eval")).unwrap();
    fs::write(folder.path().join("eval/results.json"), "{\"prompt\": \"x\"}\n").unwrap();
    let cpu = ["--device", "cpu", "--threads", "1"];
    let before = fs::read(&model).unwrap();
    for name in ["m.gguf", "hard", "soft", "./m.gguf"] {
        for args in [
            &["logits", "-m", "m.gguf", "--tokens", "1", "--out", name][..],
            &["energy", "-m", "m.gguf", "--strategies", "greedy", "--csv", name],
        ] {
            let failed = output(&mut mtad(folder.path(), &[args, &cpu].concat()));
            assert_eq!(failed.status.code(), Some(2), "{}", stderr(&failed));
            assert!(stderr(&failed).contains("m.gguf is the input"), "{}", stderr(&failed));
        }
    }
    let args = ["energy", "--prompts", "prompts", "--csv", "prompts"];
    let failed = output(&mut mtad(folder.path(), &[&args, &cpu[..]].concat()));
    assert!(stderr(&failed).contains("prompts is the input"), "{}", stderr(&failed));
    let args = ["eval", "--prompts", "eval/results.json", "--out", "eval", "-n", "2"];
    let failed = output(&mut mtad(folder.path(), &[&args, &cpu[..]].concat()));
    assert!(stderr(&failed).contains("results.json is the input"), "{}", stderr(&failed));

    assert!(fs::read(&model).unwrap() == before);
    assert_eq!(names(folder.path()), ["eval", "hard", "m.gguf", "prompts", "soft"]);
    assert_eq!(names(&folder.path().join("eval")), ["results.json"]);
}

#[test]
fn read_only_files_are_refused() {
    for writes in ALL {
        let (whole, _) = writes.whole();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        fs::write(&path, &whole).unwrap();
        let mut permissions = fs::metadata(&path).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&path, permissions).unwrap();
        let failed = output(&mut writes.command(folder.path()));
        assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
        assert!(
            stderr(&failed).contains("out: is read-only; make it writable"),
            "{}",
            stderr(&failed)
        );
        assert!(fs::read(&path).unwrap() == whole);
        assert_eq!(names(folder.path()), ["out"]);
    }
}

#[test]
fn a_planted_link_in_the_temporary_folder_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("victim"), "precious").unwrap();
    // The process has the number of the shell that it replaces.
    let script = "ln -s victim mtad-bench-$$.gguf; TMPDIR=$PWD exec \"$0\" bench --synthetic 68m:Q4_0 \
                  --device cpu --threads 1 --passes 1 --prompt 0 --generate 0 --rounds 1 --no-repack";
    let shell = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_mtad")])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(shell.status.success(), "{}", stderr(&shell));
    assert_eq!(fs::read(folder.path().join("victim")).unwrap(), b"precious");
    let names = names(folder.path());
    assert!(matches!(&names[..], [link, _] if link.starts_with("mtad-bench-")), "{names:?}");
}

#[test]
fn a_fifo_as_a_cost_table_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Command::new("mkfifo").arg(folder.path().join("costs")).status().unwrap().success());
    let args = ["run", "Once", "--strategy", "auto", "--cost-table", "costs", "--device", "cpu"];
    let failed = output(&mut mtad(folder.path(), &args));
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("costs: is not a regular file"), "{}", stderr(&failed));
}

#[test]
fn models_are_read_into_memory_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let made = output(&mut mtad(
        folder.path(),
        &["quantize", "builtin:draft", "m.gguf", "Q8_0", "--requantize"],
    ));
    assert!(made.status.success(), "{}", stderr(&made));
    let args = ["run", "Once upon a time", "-m", "m.gguf", "--max-tokens", "12", "--seed", "3"];
    let text = |more: &[&str]| {
        let args = [&args[..], &["--device", "cpu", "--threads", "1"], more].concat();
        let done = output(&mut mtad(folder.path(), &args));
        assert!(done.status.success(), "{}", stderr(&done));
        String::from_utf8(done.stdout).unwrap()
    };
    let mapped = text(&[]);
    assert!(mapped.len() > 20);
    for more in [&["--no-mmap"][..], &["--no-mmap", "--no-repack"]] {
        assert_eq!(text(more), mapped);
    }
}
