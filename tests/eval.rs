//! `mtad perplexity` and `mtad eval`, through the binary.
#![cfg(feature = "builtin-pair")]

mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use mtad::engine::{Model, SessionOptions};
use mtad::eval::perplexity::perplexity;
use mtad::lm::{Batch, Row, Want, log_sum_exp};
use mtad::{LoadOptions, Pair};
use serde_json::Value;

fn mtad(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    command.env("MTAD_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"));
    command.args(args).stdin(Stdio::null()).output().expect("the binary runs")
}

fn json(args: &[&str]) -> Value {
    let output = mtad(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A text of the kind that the built-in pair knows.
fn story() -> String {
    let output = mtad(&["run", "Once upon a time", "-s", "sample", "--seed", "1", "-n", "450"]);
    String::from_utf8(output.stdout).unwrap().repeat(3)
}

#[test]
fn perplexity_is_that_of_the_second_halves() {
    let pair = Pair::builtin(false, &LoadOptions::default(), &mut |_, _| true).unwrap();
    let target: &Model = pair.target();
    let text = story();
    let options = mtad::tokenizer::EncodeOptions { bos: true, special: false };
    let tokens = pair.tokenizer().encode(&text, options);
    let bos = pair.tokenizer().bos();
    let chunk = 50;
    // One token at a time, from whole rows of logits.
    let mut lm = target.session(&SessionOptions::default()).unwrap();
    let mut losses = Vec::new();
    for piece in tokens.chunks_exact(chunk) {
        lm.truncate(0).unwrap();
        for i in 0..chunk - 1 {
            let token = if i == 0 { bos.unwrap() } else { piece[i] };
            let outputs = lm.eval(&Batch::chain(&[token], None, Row(0), Want::Logits)).unwrap();
            if i >= chunk / 2 {
                let logits = outputs.logits(0);
                let log_prob = f64::from(logits[piece[i + 1] as usize]) - log_sum_exp(logits, 1.0);
                losses.push(-log_prob);
            }
            lm.commit(Some(Row(0))).unwrap();
        }
    }
    let n = losses.len() as f64;
    let mean = losses.iter().sum::<f64>() / n;
    let squares = losses.iter().map(|x| x * x).sum::<f64>() / n;
    let error = ((squares - mean * mean) / (n - 1.0)).sqrt() * mean.exp();
    let mut calls = 0;
    let found = perplexity(&mut *lm, &tokens, bos, chunk, None, &mut |_, _| {
        calls += 1;
        true
    })
    .unwrap();
    assert_eq!(found.chunks, tokens.len() / chunk);
    assert_eq!(found.scored as usize, found.chunks * (chunk - 1 - chunk / 2));
    assert_eq!(calls, found.chunks + 1);
    assert!((found.value() / mean.exp() - 1.0).abs() < 1e-9, "{} {}", found.value(), mean.exp());
    assert!((found.standard_error() / error - 1.0).abs() < 1e-6);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, &text).unwrap();
    let args = ["perplexity", "--file", path(&file), "--chunk", "50", "--json"];
    let out = json(&args);
    assert!((out["perplexity"].as_f64().unwrap() / found.value() - 1.0).abs() < 1e-9);
    assert_eq!(out["chunks"], found.chunks);
    assert_eq!(json(&[&args[..], &["--chunks", "2"]].concat())["chunks"], 2);
    // What cannot be measured.
    for (args, code, what) in [
        (&["--file", path(&file), "--chunk", "512", "--ctx-size", "300"][..], 1, "context"),
        (&["--file", path(&file), "--chunk", "3"], 2, "at least 4"),
        (&["--file", "nowhere.txt"], 1, "nowhere.txt"),
    ] {
        let output = mtad(&[&["perplexity"], args].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(what), "{args:?}: {stderr}");
    }
    std::fs::write(&file, "Too short.").unwrap();
    let output = mtad(&["perplexity", "--file", path(&file)]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("two chunks of 512"));
}

fn row<'a>(out: &'a Value, label: &str) -> &'a Value {
    let rows = out["rows"].as_array().unwrap();
    rows.iter().find(|row| row["label"] == label).unwrap_or_else(|| panic!("{label}: {out}"))
}

#[test]
fn an_evaluation_reports_goes_on_and_refuses_to_mix() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.jsonl");
    let lines = "{\"prompt\": \"Once upon a time\"}\n{\"turns\": [\"The dog\"], \"question_id\": 7}\n\
                 {\"prompt\": \"Tom has 2 apples. He eats 1. How many are left?\\nAnswer:\", \"answer\": \"1\"}\n\
                 {\"prompt\": \"Go\", \"answer\": \"never written\"}\n";
    std::fs::write(&prompts, lines).unwrap();
    let out = folder.path().join("out");
    let base = ["eval", "--prompts", path(&prompts), "-n", "24", "--json", "--out", path(&out)];
    let first =
        json(&[&base[..], &["-s", "sample,mtad", "--tau", "0.1,0.5", "--repeats", "2"]].concat());
    assert_eq!(first["complete"], true);
    assert_eq!(first["rows"].as_array().unwrap().len(), 3);
    let mtad_row = row(&first, "mtad tau 0.1 gamma 4 width 4");
    // Texts are those without an answer, and answers those with one.
    assert_eq!((&mtad_row["texts"], &mtad_row["answers"]), (&4.into(), &4.into()));
    assert!(
        mtad_row["perplexity"].as_f64().unwrap()
            < row(&first, "sample")["perplexity"].as_f64().unwrap()
    );
    assert!(mtad_row["block_efficiency"].as_f64().unwrap() > 1.5);
    assert!(mtad_row["ratio_to_plain"].as_f64().unwrap() > 0.0);
    assert_eq!(row(&first, "sample")["ratio_to_plain"], 1.0);
    assert!(mtad_row["score"].as_f64().unwrap() <= 0.5);
    for n in 0..3 {
        let share = mtad_row["distinct"][n].as_f64().unwrap();
        assert!(share > 0.0 && share <= 1.0);
    }
    // No meter was asked for: joules are there or unavailable for a reason, never 0.
    assert!(mtad_row["joules_per_token"].is_null() == first["joules_unavailable"].is_string());

    let journal = out.join("journal.jsonl");
    let lines = || {
        let text = std::fs::read_to_string(&journal).unwrap();
        text.lines().filter(|line| line.contains("\"arm\"")).count()
    };
    assert_eq!(lines(), 3 * 4 * 2);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 2 && page.contains("mtad tau 0.5"));
    assert!(!page.contains("http") && !page.contains("<script"), "the page needs nothing else");
    let csv = std::fs::read_to_string(out.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 4);
    let columns: Vec<_> = csv.lines().map(|line| line.split(',').count()).collect();
    assert!(columns.iter().all(|&n| n == 23), "{columns:?}: {csv}");
    let written: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("results.json")).unwrap()).unwrap();
    assert_eq!(written["rows"], first["rows"]);

    // As if the machine had stopped in the middle of a line: what is missing is done again, with
    // the same result, and nothing else is.
    let text = std::fs::read_to_string(&journal).unwrap();
    let kept: usize = text.lines().take(6).map(|line| line.len() + 1).sum();
    std::fs::write(&journal, &text[..kept + 40]).unwrap();
    let again =
        json(&[&base[..], &["-s", "sample,mtad", "--tau", "0.1,0.5", "--repeats", "2"]].concat());
    assert_eq!(lines(), 3 * 4 * 2);
    for label in ["sample", "mtad tau 0.1 gamma 4 width 4", "mtad tau 0.5 gamma 4 width 4"] {
        for figure in ["perplexity", "tokens", "score", "acceptance_rate", "distinct"] {
            assert_eq!(row(&first, label)[figure], row(&again, label)[figure], "{label} {figure}");
        }
    }
    // More of the same is added; another length is another evaluation.
    json(&[&base[..], &["-s", "sample,greedy", "--repeats", "3"]].concat());
    assert_eq!(lines(), 3 * 4 * 2 + 4 + 4);
    let other = mtad(&[
        "eval",
        "--prompts",
        path(&prompts),
        "-n",
        "25",
        "-s",
        "sample",
        "--out",
        path(&out),
    ]);
    let stderr = String::from_utf8(other.stderr).unwrap();
    assert_eq!(other.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("journal.jsonl is of another"), "{stderr}");
}

#[test]
fn sampling_is_cooled_to_the_perplexity_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "Once upon a time\nThe dog\nIt was raining\nThe old man\n").unwrap();
    let out = json(&[
        "eval",
        "--prompts",
        path(&prompts),
        "-s",
        "sample,mtad",
        "--tau",
        "0.1",
        "--repeats",
        "2",
        "-n",
        "60",
        "--match-perplexity",
        "--json",
    ]);
    assert_eq!(out["cooled_to"], "mtad tau 0.1 gamma 4 width 4");
    let of = |row: &Value| row["perplexity"].as_f64().unwrap();
    let (plain, wanted) = (of(row(&out, "sample")), of(row(&out, "mtad tau 0.1 gamma 4 width 4")));
    let cooled = out["rows"].as_array().unwrap().last().unwrap();
    assert_eq!(cooled["name"], "sample, cooled");
    let temperature = cooled["temperature"].as_f64().unwrap();
    assert!(temperature > 0.0 && temperature < 1.0, "{temperature}");
    let off = |x: f64| (x / wanted).ln().abs();
    assert!(off(of(cooled)) < 0.5 * off(plain), "{} {wanted} {plain}", of(cooled));
}

#[test]
fn a_table_for_people_and_errors_for_what_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "Once upon a time\n").unwrap();
    let output = mtad(&[
        "eval",
        "-p",
        path(&prompts),
        "-s",
        "greedy,speculative",
        "--repeats",
        "1",
        "-n",
        "20",
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "target  builtin:target",
        "perplexity",
        "tokens/pass",
        "J/token",
        "distinct-2",
        "speculative",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let bad = folder.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"prompt\": \"x\"}\n{\"question\": 3}\n").unwrap();
    let long = folder.path().join("long.txt");
    std::fs::write(&long, "word ".repeat(600)).unwrap();
    for (args, code, what) in [
        (&["-p", path(&bad)][..], 1, "bad.jsonl:2"),
        (&["-p", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (&["-p", path(&long)], 2, "no prompt fits the context of 512"),
        (&["-s", "beams"], 2, "beams"),
        (&["--tau", "-1"], 2, "tau"),
        (&["-p", path(&prompts), "--template", "x"], 2, "{prompt}"),
        (&["-p", path(&prompts), "--match-perplexity", "bild"], 2, "bild"),
        (&["--model", "builtin:target", "-p", path(&prompts), "-s", "mtad"], 2, "--draft"),
    ] {
        let output = mtad(&[&["eval"], args].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(what) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_it_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let (prompts, out) = (folder.path().join("prompts.txt"), folder.path().join("out"));
    std::fs::write(&prompts, "Once upon a time\n").unwrap();
    let args =
        ["eval", "-p", path(&prompts), "-s", "sample", "-n", "8", "--json", "--out", path(&out)];
    let mut command = Command::new(env!("CARGO_BIN_EXE_mtad"));
    let command = command.args(args).args(["--repeats", "100000"]).stdout(Stdio::piped());
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    let lines =
        || std::fs::read_to_string(out.join("journal.jsonl")).unwrap_or_default().lines().count();
    let start = std::time::Instant::now();
    while lines() < 5 {
        assert!(start.elapsed().as_secs() < 120, "nothing is generated");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success()
    );
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["complete"], false);
    let texts = report["rows"][0]["texts"].as_u64().unwrap() as usize;
    assert_eq!(texts + 1, lines());
    // It goes on: three are there already.
    let more = json(&[&args[..], &["--repeats", "3"]].concat());
    assert_eq!(more["complete"], true);
    assert_eq!(lines(), texts + 1);
}

/// Files of other people's benchmarks are read as they are, if they are here.
#[test]
fn layouts_in_the_wild_are_read() {
    let Some(folder) = common::shared("prompts") else { return };
    for (file, layout, all) in [
        ("spec_bench.jsonl", "Spec-Bench or MT-bench", 480),
        ("mt_bench.jsonl", "Spec-Bench or MT-bench", 80),
        ("human_eval.jsonl", "HumanEval", 164),
    ] {
        let mut set = mtad::eval::TaskSet::read(&folder.join(file)).unwrap();
        assert!(set.layout.starts_with(layout), "{file}: {}", set.layout);
        assert_eq!(set.tasks.len(), all, "{file}");
        assert!(set.tasks.iter().all(|task| !task.prompt.is_empty() && !task.name.is_empty()));
        set.limit(13);
        assert_eq!(set.tasks.len(), 13);
    }
    #[cfg(feature = "spider")]
    {
        let set = mtad::eval::TaskSet::read(&folder.join("spider")).unwrap();
        assert!(set.tasks.len() > 600, "{} {:?}", set.tasks.len(), set.notes);
        let right = |task: &mtad::eval::Task| task.answer.as_ref().unwrap().score(" 1 WHERE 0");
        assert!(set.tasks.iter().take(50).map(right).sum::<f64>() < 10.0);
    }
}

/// Spider's queries, which run in a process of their own.
#[cfg(feature = "spider")]
mod spider {
    use std::io::{BufRead, BufReader, Write};
    use std::time::{Duration, Instant};

    use mtad::eval::TaskSet;
    use rusqlite::Connection;

    use super::*;

    /// A query of one step that takes minutes: SQLite cannot be asked to end it.
    const ONE_STEP: &str = "sum(instr(hex(zeroblob(499000)), hex(zeroblob(240000)) || '1')) \
                            FROM (VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9))";

    /// A folder of questions about one database.
    fn folder() -> tempfile::TempDir {
        mtad::eval::run_queries_with(env!("CARGO_BIN_EXE_mtad"));
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("database/zoo");
        std::fs::create_dir_all(&place).unwrap();
        let script = "CREATE TABLE animal (id INTEGER PRIMARY KEY, name TEXT, legs INTEGER);
             INSERT INTO animal VALUES (1, 'cat', 4), (2, 'hen', 2), (3, 'dog', 4);";
        Connection::open(place.join("zoo.sqlite")).unwrap().execute_batch(script).unwrap();
        let tables = r#"[{"db_id": "zoo", "table_names_original": ["animal"],
            "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [0, "legs"]],
            "column_types": ["text", "number", "text", "number"], "primary_keys": [1], "foreign_keys": []}]"#;
        std::fs::write(folder.path().join("tables.json"), tables).unwrap();
        let dev = r#"[
            {"db_id": "zoo", "question": "Which animals have four legs?", "query": "SELECT name FROM animal WHERE legs = 4"},
            {"db_id": "zoo", "question": "Sorted?", "query": "SELECT name FROM animal ORDER BY name DESC"},
            {"db_id": "zoo", "question": "Broken", "query": "SELECT wings FROM animal"},
            {"db_id": "zoo", "question": "Harmful", "query": "DELETE FROM animal"},
            {"db_id": "sea", "question": "Gone", "query": "SELECT 1"}]"#;
        std::fs::write(folder.path().join("dev.json"), dev).unwrap();
        folder
    }

    #[test]
    fn answers_are_compared_by_what_they_find() {
        let folder = folder();
        let set = TaskSet::read(folder.path()).unwrap();
        assert_eq!(set.tasks.len(), 2);
        let notes = &set.notes;
        assert!(notes[0].contains("sea") && notes[1].contains("2 questions"), "{notes:?}");
        let prompt = &set.tasks[0].prompt;
        assert!(prompt.starts_with(
            "CREATE TABLE animal (id number, name text, legs number, PRIMARY KEY (id));"
        ));
        assert!(prompt.ends_with("-- Which animals have four legs?\nSELECT"), "{prompt}");
        let score = |task: usize, text: &str| {
            set.tasks[task].answer.as_ref().unwrap().try_score(text).unwrap()
        };
        assert_eq!(score(0, " name FROM animal WHERE legs > 3 ORDER BY id DESC; and more"), 1.0);
        assert_eq!(score(0, " name FROM animal"), 0.0);
        assert_eq!(score(0, " nonsense FROM"), 0.0);
        assert_eq!(score(1, "name from animal order by 1 desc"), 1.0);
        assert_eq!(score(1, "name from animal order by 1"), 0.0);

        // A query that cannot be ended is ended all the same, and the next one is answered.
        let start = Instant::now();
        assert_eq!(score(0, ONE_STEP), 0.0);
        let took = start.elapsed();
        assert!((Duration::from_secs(5)..Duration::from_secs(8)).contains(&took), "{took:?}");
        assert_eq!(score(0, "name FROM animal WHERE legs = 4"), 1.0);
        // As is one of many short steps, by itself.
        let endless = "count(*) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 \
                       FROM n) SELECT i FROM n)";
        assert_eq!(score(0, endless), 0.0);
        assert!(start.elapsed() < Duration::from_secs(16));
    }

    /// The process of the queries, asked directly.
    #[cfg(target_os = "linux")]
    #[test]
    fn queries_have_little_memory_and_end_with_who_asked() {
        let folder = folder();
        let database = folder.path().join("database/zoo/zoo.sqlite");
        let mut process = Command::new(env!("CARGO_BIN_EXE_mtad"))
            .arg("answer-queries")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut requests = process.stdin.take().unwrap();
        let mut answers = BufReader::new(process.stdout.take().unwrap());
        let mut send = |sql: &str| {
            let request = serde_json::json!({"database": database, "sql": sql});
            writeln!(requests, "{request}").unwrap();
        };
        let mut answer = || {
            let mut line = String::new();
            answers.read_line(&mut line).unwrap();
            serde_json::from_str::<Value>(&line).unwrap()
        };
        let many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 5000) ";
        for sql in [
            format!("{many} SELECT hex(zeroblob(450000)) FROM n ORDER BY 1 DESC"),
            format!("{many} SELECT group_concat(hex(zeroblob(450000))) FROM n"),
            format!("{many} SELECT hex(zeroblob(450000)), i FROM n"),
        ] {
            send(&sql);
            let answer = answer();
            assert!(answer["failed"].is_string(), "{sql}: {answer}");
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let most: u64 = most.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(most < 300 << 10, "{most} KiB");
        // In the middle of a query that does not end.
        send(&format!("SELECT {ONE_STEP}"));
        std::thread::sleep(Duration::from_millis(200));
        drop(requests);
        let start = Instant::now();
        while process.try_wait().unwrap().is_none() {
            if start.elapsed() > Duration::from_secs(3) {
                process.kill().unwrap();
                panic!("it goes on");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
