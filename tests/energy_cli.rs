//! `mtad energy`, `mtad run --energy` and `mtad devices --meters` through the binary, with meters
//! that are a fake tree or a command.
#![cfg(all(unix, feature = "builtin-pair"))]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

/// Runs it on one thread: these models are too small for more, and tests run side by side.
fn mtad(arguments: &[&str]) -> Output {
    let threads: &[&str] = if arguments[0] == "devices" { &[] } else { &["--threads", "1"] };
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.args(arguments).args(threads).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The one line of JSON of a run that went well.
fn json(arguments: &[&str]) -> Json {
    let output = mtad(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    let line = text(&output.stdout);
    assert_eq!(line.matches('\n').count(), 1, "{line}");
    serde_json::from_str(&line).unwrap()
}

fn number(value: &Json) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn close(a: f64, b: f64, relative: f64) {
    assert!((a - b).abs() <= relative * b.abs(), "{a} is not within {relative} of {b}");
}

const PACKAGE: &str = "sys/class/powercap/intel-rapl:0";

fn set(path: &Path, text: &str) {
    let whole = path.with_extension("new");
    fs::write(&whole, text).unwrap();
    fs::rename(whole, path).unwrap();
}

/// Runs `f` with a tree in which a package draws 20 W.
fn with_package(f: impl FnOnce(&str)) {
    let tree = tempfile::tempdir().unwrap();
    let package = tree.path().join(PACKAGE);
    fs::create_dir_all(&package).unwrap();
    set(&package.join("name"), "package-0");
    set(&package.join("max_energy_range_uj"), "262143328850");
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, file) = (stop.clone(), package.join("energy_uj"));
    set(&file, "0");
    let writer = std::thread::spawn(move || {
        let start = Instant::now();
        while !stopped.load(Ordering::Relaxed) {
            let microjoules = (20e6 * start.elapsed().as_secs_f64()) as u64;
            set(&file, &microjoules.to_string());
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    f(tree.path().to_str().unwrap());
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn strategies_are_measured_side_by_side() {
    with_package(|root| {
        let csv = format!("{root}/figures.csv");
        let out = json(&[
            "energy",
            "--meter-root",
            root,
            "--idle",
            "0.5",
            "--repeats",
            "2",
            "--max-tokens",
            "120",
            "--strategies",
            "sample,mtad",
            "--seed",
            "7",
            "--csv",
            &csv,
            "--json",
        ]);
        close(number(&out["idle"]["watts"]), 20.0, 0.1);
        assert_eq!(out["meters"][0]["name"], "rapl:package-0");
        assert_eq!(out["meters"][0]["in_total"], true);
        assert_eq!(out["assumed"], false);
        let results = out["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        for result in results {
            // What a machine of 20 W consumes is known, however fast it is; the fake counter is
            // late now and then where many tests share a processor.
            close(number(&result["watts"]), 20.0, 0.3);
            let tokens = number(&result["tokens"]);
            let joules = number(&result["joules"]);
            close(number(&result["joules_per_token"]) * tokens, joules, 1e-9);
            close(number(&result["tokens_per_joule"]) * joules, tokens, 1e-9);
            let phases = result["phases"].as_object().unwrap();
            close(phases.values().map(|p| number(&p["joules"])).sum(), joules, 0.001);
            close(
                phases.values().map(|p| number(&p["seconds"])).sum(),
                number(&result["seconds"]),
                1e-3,
            );
            let per_prompt =
                number(&phases["prefill"]["joules"]) / number(&result["prompt_tokens"]);
            close(number(&result["joules_per_prompt_token"]), per_prompt, 1e-9);
            // It idles at the same power: net of that there is nothing, within what is known.
            let net = number(&result["joules_per_token_net"]).abs();
            assert!(net < 0.4 * number(&result["joules_per_token"]), "{result}");
            assert!(number(&result["joules_uncertainty"]) > 0.0);
        }
        assert_eq!(results[0]["strategy"], "sample");
        assert_eq!(results[0]["block_efficiency"], 1.0);
        assert!(number(&results[1]["block_efficiency"]) > 1.0);
        let csv = fs::read_to_string(csv).unwrap();
        let lines: Vec<_> = csv.lines().collect();
        // Two strategies, two repeats, three prompts.
        assert_eq!(lines.len(), 1 + 12);
        assert!(lines[0].starts_with("strategy,repeat,prompt,tokens,"));
        let columns = lines[0].split(',').count();
        assert!(lines[1..].iter().all(|line| line.split(',').count() == columns), "{csv}");

        let output = mtad(&[
            "energy",
            "--meter-root",
            root,
            "--idle",
            "0.3",
            "--repeats",
            "1",
            "--max-tokens",
            "60",
            "--strategy",
            "mtad",
            "Once upon a time",
        ]);
        assert!(output.status.success());
        let shown = text(&output.stdout);
        for part in ["rapl:package-0: the processor package", "idle ", "J/token", "draft", "verify"]
        {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
    });
}

#[test]
fn run_reports_energy_beside_its_text() {
    with_package(|root| {
        // Long enough to be measured on any machine, and for a fake counter that is late now and then.
        let long = ["--strategy", "beam", "--beam-width", "1", "--seed", "1"];
        let run = [&["run", "Once upon a time", "--meter-root", root][..], &long].concat();
        let out = json(&[&run[..], &["--energy", "--json"]].concat());
        close(number(&out["energy"]["watts"]), 20.0, 0.3);
        let phases = out["energy"]["phases"].as_object().unwrap();
        close(number(&phases["verify"]["seconds"]), number(&out["seconds"]["verify"]), 1e-6);
        assert!(out["energy"]["by_meter"]["rapl:package-0"]["joules"].is_number());
        let file = format!("{root}/power");
        fs::write(&file, "5 W").unwrap();
        let meter = format!("file:{file}");
        let output = mtad(&[&run[..], &["--meter", &meter, "--meter-rate", "500"]].concat());
        let shown = text(&output.stderr);
        assert!(output.status.success() && shown.contains("J/token "), "{shown}");
        // Nobody asked: nobody is told.
        let out = json(&["run", "Once upon a time", "-n", "5", "--json"]);
        assert!(out["energy"].is_null());
    });
}

#[test]
fn a_command_can_be_the_meter_and_an_unreadable_one_is_named() {
    with_package(|root| {
        let meter = "cmd:while echo 5 W; do sleep 0.002; done";
        let out = json(&[
            "run",
            "Once upon a time",
            // Long enough to be measured on any machine.
            "--strategy",
            "beam",
            "--beam-width",
            "64",
            "--meter-root",
            root,
            "--meter",
            meter,
            "--meter",
            "cmd:exit 3",
            "--meter-rate",
            "500",
            "--json",
        ]);
        close(number(&out["energy"]["watts"]), 5.0, 1e-6);
        assert!(
            out["energy"]["meters"][1]["unavailable"].as_str().unwrap().contains("exit status: 3")
        );
        // A name that nothing has is a mistake of usage.
        let output = mtad(&["run", "x", "--meter-root", root, "--meter", "rapple"]);
        assert_eq!(output.status.code(), Some(2));
    });
}

#[test]
fn without_a_meter_there_are_times_and_a_failure_unless_allowed() {
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path().to_str().unwrap();
    let energy = ["energy", "--meter-root", root, "--repeats", "1", "--max-tokens", "20"];
    let output = mtad(&energy);
    assert_eq!(output.status.code(), Some(1));
    let shown = text(&output.stdout);
    for part in ["rapl: unavailable: no intel-rapl", "sample: unavailable: no meter", "verify 0."] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(text(&output.stderr).contains("--allow-no-meter"));
    let allowed = mtad(&[&energy[..], &["--allow-no-meter"]].concat());
    assert!(allowed.status.success());
    let out = json(&[&energy[..], &["--allow-no-meter", "--json"]].concat());
    let result = &out["results"][0];
    assert!(result["joules"].is_null() && result["joules_per_token"].is_null());
    assert_eq!(result["unavailable"], "no meter can be read");
    assert!(number(&result["seconds"]) > 0.0 && number(&result["phase_seconds"]["verify"]) > 0.0);
    let run = mtad(&["run", "x", "-n", "5", "--meter-root", root, "--energy"]);
    assert_eq!(run.status.code(), Some(1));
}

#[test]
fn assumed_figures_are_all_marked() {
    let energy = ["energy", "--assume-watts", "8", "--repeats", "1", "--max-tokens", "20"];
    let out = json(&[&energy[..], &["--json"]].concat());
    fn check(value: &Json, path: &str) {
        match value {
            Json::Object(map) => {
                for (key, value) in map {
                    let figure = key.contains("joule") || key.contains("watt");
                    assert!(!figure || key.starts_with("assumed_"), "{path}.{key}");
                    check(value, &format!("{path}.{key}"));
                }
            }
            Json::Array(all) => all.iter().for_each(|value| check(value, path)),
            _ => {}
        }
    }
    check(&out, "");
    let result = &out["results"][0];
    close(number(&result["assumed_joules"]), 8.0 * number(&result["seconds"]), 1e-6);
    let csv = tempfile::NamedTempFile::new().unwrap();
    let output = mtad(&[&energy[..], &["--csv", csv.path().to_str().unwrap()]].concat());
    assert!(output.status.success());
    let shown = text(&output.stdout);
    for unit in [" J/token, ", " W in "] {
        let (figures, marked) =
            (shown.matches(unit).count(), shown.matches(&format!(" assumed{unit}")).count());
        assert!(figures > 3 && figures == marked, "{shown}");
    }
    assert!(fs::read_to_string(csv.path()).unwrap().contains(",assumed_joules,"));
    let output = mtad(&["energy", "--assume-watts", "-3"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn devices_lists_the_cpu_and_meters() {
    with_package(|root| {
        let out = json(&["devices", "--meters", "--meter-root", root, "--json"]);
        assert_eq!(out["devices"][0]["name"], "cpu");
        assert!(number(&out["devices"][0]["threads"]) >= 1.0);
        let sets = out["devices"][0]["instruction_sets"].as_array().unwrap();
        assert!(sets.contains(&out["devices"][0]["instruction_set"]));
        assert_eq!(out["meters"][0]["name"], "rapl:package-0");
        let absent = out["meters"].as_array().unwrap().iter().skip(1);
        assert!(absent.into_iter().all(|meter| meter["unavailable"].is_string()));
        let shown = text(&mtad(&["devices", "--meters", "--meter-root", root]).stdout);
        assert!(shown.contains("instruction sets: ") && shown.contains("rapl:package-0: "));
        // Meters are asked for, or not looked at.
        assert!(json(&["devices", "--json"])["meters"].is_null());
    });
}

#[test]
fn bench_measures_the_energy_of_generating() {
    let arguments = ["bench", "--passes", "1", "--prompt", "0", "--rounds", "1"];
    let meter = ["--generate", "3000", "--json", "--meter"];
    let meter = [&meter[..], &["cmd:while echo 5 W; do sleep 0.002; done"]].concat();
    let out = json(&[&arguments[..], &meter].concat());
    let (energy, rate) = (&out["energy"], number(&out["generate"]["tokens_per_second"]));
    close(number(&energy["joules_per_token"]) * rate, 5.0, 0.05);
    let none = mtad(&[&arguments[..], &["--generate", "0", "--energy"]].concat());
    assert_eq!(none.status.code(), Some(2));
    assert!(text(&none.stderr).contains("--generate"), "{}", text(&none.stderr));
}
