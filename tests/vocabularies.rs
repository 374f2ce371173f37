//! Pairs whose vocabularies are not the same to the letter: the text is the target's own.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use common::shared;
use mtad::decode::{Settings, Strategy};
use mtad::gguf::Gguf;
use mtad::{LoadOptions, Pair, Request, SessionOptions, StopReason, Warp};

fn load(target: &str, draft: &str) -> Option<Pair> {
    let [target, draft] = [target, draft].map(|name| shared(&format!("cases/{name}.gguf")));
    let options = LoadOptions { device: "cpu".into(), threads: 1, ..LoadOptions::default() };
    let draft = Gguf::open(draft?).unwrap();
    Some(
        Pair::from_files(Gguf::open(target?).unwrap(), Some(draft), &options, &mut |_, _| true)
            .unwrap(),
    )
}

const PROMPTS: [&str; 4] = ["the cat", "hello", "a dog ran", "what is it?"];

fn request(strategy: Strategy, temperature: f32, max_tokens: usize, seed: u64) -> Request {
    let warp = Warp { temperature, ..Warp::default() };
    let settings = Settings { strategy, warp, seed, ..Settings::default() };
    Request { settings, max_tokens: Some(max_tokens), ..Request::default() }
}

/// The tokens of a generation, and why it ended.
fn generate(pair: &Pair, prompt: &str, request: &Request) -> (Vec<u32>, StopReason) {
    let mut session = pair.session(&SessionOptions::default()).unwrap();
    let mut generation = session.generate(prompt, request).unwrap();
    generation.by_ref().for_each(|piece| drop(piece.unwrap()));
    (generation.tokens().to_vec(), generation.stop_reason().unwrap())
}

#[test]
fn an_end_that_the_draft_does_not_have_is_reached() {
    let Some(pair) = load("im_t", "im_d") else { return };
    let end = pair.tokenizer().eos().unwrap();
    let vocabulary = pair.vocabulary();
    assert_eq!((end, vocabulary.tokens, vocabulary.shared), (303, 304, 303));
    let mut ended = 0;
    for prompt in PROMPTS {
        let greedy = generate(&pair, prompt, &request(Strategy::Greedy, 0.0, 200, 0));
        ended += usize::from(greedy.1 == StopReason::Eos && greedy.0.last() == Some(&end));
        for (strategy, name) in Strategy::ALL {
            if !matches!(strategy, Strategy::Beam | Strategy::Mtjd) {
                let found = generate(&pair, prompt, &request(strategy, 0.0, 200, 0));
                assert_eq!(found, greedy, "{name}, {prompt:?}");
            }
        }
    }
    assert!(ended > 0, "no greedy text ends within 200 tokens");
}

#[test]
fn sampled_text_is_distributed_as_the_target_s_own() {
    let Some(pair) = load("im_t", "im_d") else { return };
    const RUNS: u64 = 3000;
    // The first three tokens of each text, or what there is of them.
    let counts = |strategy, first_seed: u64| {
        let mut session = pair.session(&SessionOptions::default()).unwrap();
        let mut counts = BTreeMap::<Vec<u32>, f64>::new();
        let mut ends = 0;
        for seed in 0..RUNS {
            let request = request(strategy, 0.7, 3, first_seed + seed);
            let mut generation = session.generate("the cat", &request).unwrap();
            generation.by_ref().for_each(|piece| drop(piece.unwrap()));
            ends += usize::from(generation.stop_reason() == Some(StopReason::Eos));
            *counts.entry(generation.tokens().to_vec()).or_default() += 1.0;
        }
        (counts, ends)
    };
    let (own, ends) = counts(Strategy::Sample, 0);
    println!("sample: {} texts, {ends} ended", own.len());
    for strategy in [Strategy::Speculative, Strategy::SpecInfer] {
        let (found, ends) = counts(strategy, 1_000_000);
        // Two samples of one size: sum (a - b)^2 / (a + b), rare texts taken together.
        let (mut statistic, mut freedom, mut rare) = (0.0, -1.0, (0.0, 0.0));
        let both = own.keys().chain(found.keys().filter(|text| !own.contains_key(*text)));
        for text in both {
            let of = |counts: &BTreeMap<Vec<u32>, f64>| counts.get(text).copied().unwrap_or(0.0);
            let (a, b) = (of(&own), of(&found));
            if a + b < 10.0 {
                rare = (rare.0 + a, rare.1 + b);
            } else {
                statistic += (a - b) * (a - b) / (a + b);
                freedom += 1.0;
            }
        }
        if rare.0 + rare.1 > 0.0 {
            statistic += (rare.0 - rare.1) * (rare.0 - rare.1) / (rare.0 + rare.1);
            freedom += 1.0;
        }
        let z = (statistic - freedom) / f64::sqrt(2.0 * freedom);
        println!("{strategy}: {statistic:.1} with {freedom} degrees, {ends} ended, z {z:+.2}");
        assert!(freedom >= 5.0 && z < 4.5, "{strategy}: {z}");
    }
}

#[test]
fn types_of_tokens_do_not_matter() {
    let Some(pair) = load("ty_t", "ty_d") else { return };
    assert_eq!((pair.vocabulary().tokens, pair.vocabulary().shared), (303, 303));
    let greedy = generate(&pair, "the cat", &request(Strategy::Greedy, 0.0, 40, 0));
    assert_eq!(generate(&pair, "the cat", &request(Strategy::Mtad, 0.0, 40, 0)), greedy);
}

fn mtad(arguments: &[&str]) -> (i32, String, String) {
    let run = Command::new(env!("CARGO_BIN_EXE_mtad")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (run.status.code().unwrap(), text(run.stdout), text(run.stderr))
}

#[test]
fn the_command_line_runs_such_pairs() {
    let path = |name: &str| shared(&format!("cases/{name}.gguf"));
    let (Some(target), Some(draft)) = (path("im_t"), path("im_d")) else { return };
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let (target, draft) = (text(target), text(draft));
    let run = |strategy: &str| {
        let arguments = [
            "run",
            "--model",
            &target,
            "--draft",
            &draft,
            "--device",
            "cpu",
            "--temperature",
            "0",
            "--max-tokens",
            "200",
            "--strategy",
            strategy,
            "--json",
            "the cat",
        ];
        let (code, out, err) = mtad(&arguments);
        assert_eq!(code, 0, "{err}");
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        (json["token_ids"].clone(), json["stop"].clone())
    };
    let greedy = run("greedy");
    assert_eq!(run("mtad"), greedy);
    assert_eq!(run("speculative"), greedy);
}
