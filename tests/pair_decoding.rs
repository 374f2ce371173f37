//! The decoders on the built-in pair: greedy text, and caches that hold what was kept.
#![cfg(feature = "builtin-pair")]

use std::sync::Arc;

use mtad::decode::{CostTable, Decoding, Models, Settings, Strategy};
use mtad::lm::{Batch, Lm, MAX_TREE, Row, Token, Want};
use mtad::{LoadOptions, Pair, Request, SessionOptions, StopReason, Warp};

fn pair() -> Pair {
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    Pair::builtin(true, &options, &mut |_, _| true).unwrap()
}

fn prompt(pair: &Pair) -> Vec<Token> {
    pair.tokenizer().encode("One day a girl named Lily went to", Default::default())
}

fn settings(strategy: Strategy) -> Settings {
    let costs = CostTable::new(vec![(1, 10.0), (32, 20.0)], vec![(1, 1.0), (8, 1.2)]).unwrap();
    Settings { strategy, costs: Some(Arc::new(costs)), ..Settings::default() }
}

#[test]
fn at_temperature_0_drafts_do_not_change_the_text() {
    let pair = pair();
    let (mut target, mut draft) = {
        let options = SessionOptions::default();
        (pair.target().session(&options).unwrap(), pair.draft().unwrap().session(&options).unwrap())
    };
    let prompt = prompt(&pair);
    let mut text = |strategy| {
        let warp = Warp { temperature: 0.0, ..Warp::default() };
        let mut models = Models::pair(&mut *target, &mut *draft);
        models.target.truncate(0).unwrap();
        models.draft.as_mut().unwrap().truncate(0).unwrap();
        let mut decoding = Decoding::new(Settings { warp, ..settings(strategy) }).unwrap();
        decoding.start(&mut models, &prompt).unwrap();
        while decoding.generated().len() < 80 {
            decoding.next_block(&mut models).unwrap().unwrap();
        }
        decoding.generated()[..80].to_vec()
    };
    let greedy = text(Strategy::Greedy);
    for (strategy, _) in Strategy::ALL {
        if !matches!(strategy, Strategy::Beam | Strategy::Mtjd) {
            assert_eq!(text(strategy), greedy, "{strategy}");
        }
    }
}

/// The logits of a few tokens after the line, as bits; the line stays as it is.
fn probe(lm: &mut dyn Lm) -> Vec<u32> {
    let mut batch = Batch::new();
    batch.push(300, None, Want::Logits);
    batch.push(400, Some(Row(0)), Want::Logits);
    let outputs = lm.eval(&batch).unwrap();
    let bits = (0..2).flat_map(|i| outputs.logits(i).iter().map(|x| x.to_bits())).collect();
    lm.commit(None).unwrap();
    bits
}

#[test]
fn what_was_kept_is_in_the_cache_as_if_it_had_been_evaluated_plainly() {
    let pair = pair();
    let options = SessionOptions::default();
    let prompt = prompt(&pair);
    for (strategy, _) in Strategy::ALL {
        let mut target = pair.target().session(&options).unwrap();
        let mut draft = pair.draft().unwrap().session(&options).unwrap();
        let mut decoding = Decoding::new(settings(strategy)).unwrap();
        {
            let mut models = Models::pair(&mut *target, &mut *draft);
            decoding.start(&mut models, &prompt).unwrap();
            while decoding.generated().len() < 150 {
                decoding.next_block(&mut models).unwrap().unwrap();
            }
        }
        for (model, lm) in [(pair.target(), &mut target), (pair.draft().unwrap(), &mut draft)] {
            let line = &decoding.text()[..lm.committed()];
            for size in [MAX_TREE, 7] {
                let mut fresh = model.session(&options).unwrap();
                for piece in line.chunks(size) {
                    let last = Row(piece.len() as u32 - 1);
                    fresh.eval(&Batch::chain(piece, None, Row(0), Want::Nothing)).unwrap();
                    fresh.commit(Some(last)).unwrap();
                }
                assert!(probe(&mut **lm) == probe(&mut *fresh), "{strategy}, pieces of {size}");
            }
        }
    }
}

/// What a generation gave: its text, its tokens and why it ended.
fn generate(
    session: &mut mtad::Session,
    strategy: Strategy,
    max_tokens: usize,
    stop: &[&str],
) -> (String, Vec<Token>, StopReason) {
    let warp = Warp { temperature: 0.0, ..Warp::default() };
    let request = Request {
        settings: Settings { warp, ..settings(strategy) },
        max_tokens: Some(max_tokens),
        stop: stop.iter().map(|stop| (*stop).to_owned()).collect(),
        ..Request::default()
    };
    let mut generation = session.generate("Once upon a time there was a little", &request).unwrap();
    let text = generation.by_ref().map(|piece| piece.unwrap().text).collect();
    (text, generation.tokens().to_vec(), generation.stop_reason().unwrap())
}

#[test]
fn a_generation_ends_where_it_should_also_inside_a_draft() {
    let pair = pair();
    let mut session = pair.session(&SessionOptions::default()).unwrap();
    let (all, ids, reason) = generate(&mut session, Strategy::Greedy, 400, &[]);
    assert_eq!(reason, StopReason::Eos);
    // In the middle of a word, some tokens on.
    let stop = &all[all.len() / 3..][..5];
    let before = &all[..all.find(stop).unwrap()];
    for (strategy, _) in Strategy::ALL {
        if matches!(strategy, Strategy::Beam | Strategy::Mtjd) {
            continue;
        }
        let (text, found, reason) = generate(&mut session, strategy, 400, &[]);
        assert_eq!((text.as_str(), &found, reason), (&*all, &ids, StopReason::Eos), "{strategy}");
        for n in [1, 2, 3, 6, 11] {
            let (_, found, reason) = generate(&mut session, strategy, n, &[]);
            assert_eq!((&found[..], reason), (&ids[..n], StopReason::MaxTokens), "{strategy}");
        }
        let (text, _, reason) = generate(&mut session, strategy, 400, &[stop]);
        assert_eq!((text.as_str(), reason), (before, StopReason::Stop), "{strategy}");
    }
    for strategy in [Strategy::Beam, Strategy::Mtjd] {
        let (_, found, reason) = generate(&mut session, strategy, 5, &[]);
        assert_eq!((found.len(), reason), (5, StopReason::MaxTokens));
    }
}

#[test]
fn the_command_line_replays_a_cost_table_and_refuses_what_is_out_of_range() {
    let run = |options: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_mtad"));
        command.env("MTAD_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"));
        command.args(["run", "Once upon a time", "-n", "60", "--seed", "3", "--threads", "2"]);
        command.args(options).output().unwrap()
    };
    let json = |options: &[&str]| -> serde_json::Value {
        let output = run(options);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("costs.json");
    let first = json(&["--strategy", "auto", "--json"]);
    std::fs::write(&table, first.to_string()).unwrap();
    let again = json(&["--strategy", "auto", "--json", "--cost-table", table.to_str().unwrap()]);
    assert_eq!(first["strategy"], "auto");
    assert_eq!(first["text"], again["text"]);
    assert_eq!(first["cost_table"], again["cost_table"]);
    assert_eq!(first["auto"], again["auto"]);
    assert!(first["auto"]["choices"].as_array().is_some_and(|choices| !choices.is_empty()));
    for (options, name) in [
        (["--strategy", "specinfer", "--branching", "9,9,9"], "branching"),
        (["--strategy", "bild", "--fallback", "2"], "fallback"),
        (["--strategy", "bild", "--rollback", "nan"], "rollback"),
        (["--strategy", "typical", "--epsilon", "nan"], "epsilon"),
        (["--strategy", "mmtad", "--beam-width", "40"], "beam-width"),
    ] {
        let output = run(&options.map(|option| option));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(name), "{message}");
    }
    let specinfer = json(&["--strategy", "specinfer", "--branching", "3,2", "--json"]);
    assert_eq!(specinfer["drafted"].as_u64(), specinfer["rounds"].as_u64().map(|r| 2 * r));
}
