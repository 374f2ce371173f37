//! The built-in pair, decoded in earnest.
#![cfg(feature = "builtin-pair")]

use std::sync::Arc;

use mtad::engine::{Device, Model};
use mtad::exec::cpu::{Cpu, Isa};
use mtad::lm::{Batch, Row, Token, Want, extend};
use mtad::session::pair::builtin_file;
use mtad::{LoadOptions, Pair, Request, Session, SessionOptions, Settings, Strategy, Warp};

const PROMPTS: [&str; 20] = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and his dog",
    "The cat sat on",
    "\"Hello,\" said the bear.",
    "There was a big red ball",
    "In the forest",
    "Mom said",
    "It was raining",
    "A bird",
    "The boy wanted to",
    "Sara likes to play",
    "They went to the park and",
    "He was very sad because",
    "The sun was",
    "Ben had a toy car.",
    "\"Can I help you?\" asked",
    "The old man",
    "At night",
    "Zebras, 12 of them, and a café",
];

fn pair() -> Pair {
    Pair::builtin(true, &LoadOptions::default(), &mut |_, _| true).unwrap()
}

/// The generated tokens, and the generation's block efficiency.
fn generate(session: &mut Session, prompt: &str, request: &Request) -> (Vec<Token>, f64, Vec<f64>) {
    let mut generation = session.generate(prompt, request).unwrap();
    generation.by_ref().for_each(|piece| drop(piece.unwrap()));
    let efficiency = generation.statistics().block_efficiency();
    (generation.tokens().to_vec(), efficiency, generation.scores().to_vec())
}

#[test]
fn greedy_strategies_write_the_greedy_text() {
    let pair = pair();
    let request = |strategy, gamma, tau| Request {
        settings: Settings {
            strategy,
            gamma,
            tau,
            warp: Warp { temperature: 0.0, ..Warp::default() },
            ..Settings::default()
        },
        max_tokens: Some(200),
        ..Request::default()
    };
    // One session for all: a new prompt must not be disturbed by what the last one left behind.
    let mut session = pair.session(&SessionOptions::default()).unwrap();
    let (mut tokens, mut best) = (0, 0.0f64);
    for prompt in PROMPTS {
        let (greedy, ..) = generate(&mut session, prompt, &request(Strategy::Greedy, 1, 0.0));
        tokens += greedy.len();
        for (strategy, gamma, tau) in [
            (Strategy::Speculative, 4, 0.0),
            (Strategy::Mtad, 4, 0.1),
            (Strategy::Mtad, 7, 0.9),
            (Strategy::Mtad, 1, 0.0),
        ] {
            let (text, efficiency, _) =
                generate(&mut session, prompt, &request(strategy, gamma, tau));
            assert_eq!(text, greedy, "{strategy}, gamma {gamma}, tau {tau}: {prompt:?}");
            best = best.max(efficiency);
        }
    }
    assert!(tokens > 1500, "the texts are short: {tokens} tokens");
    assert!(best > 1.5, "the draft helps nowhere: {best}");
}

#[test]
fn mtad_writes_likelier_text_in_fewer_passes_than_speculative_sampling() {
    let pair = pair();
    let mut session = pair.session(&SessionOptions::default()).unwrap();
    let mut measure = |strategy| {
        let (mut sum, mut count, mut efficiency) = (0.0, 0, 0.0);
        for (i, prompt) in PROMPTS.iter().cycle().take(60).enumerate() {
            let request = Request {
                settings: Settings { strategy, seed: i as u64, score: true, ..Settings::default() },
                max_tokens: Some(100),
                ..Request::default()
            };
            let (_, e, scores) = generate(&mut session, prompt, &request);
            sum += scores.iter().sum::<f64>();
            count += scores.len();
            efficiency += e / 60.0;
        }
        ((-sum / count as f64).exp(), efficiency)
    };
    let (speculative, mtad) = (measure(Strategy::Speculative), measure(Strategy::Mtad));
    println!("perplexity and block efficiency: speculative {speculative:?}, mtad {mtad:?}");
    assert!(mtad.0 < speculative.0 && mtad.1 > speculative.1, "{speculative:?} {mtad:?}");
}

/// How many of the held-out questions are answered rightly, and how many there are.
fn right_answers(pair: &Pair, request: &Request) -> (usize, usize) {
    let mut session = pair.session(&SessionOptions::default()).unwrap();
    let questions = include_str!("../models/questions.jsonl").lines();
    let right = questions.clone().filter(|line| {
        let question: serde_json::Value = serde_json::from_str(line).unwrap();
        let generation = session.generate(question["prompt"].as_str().unwrap(), request).unwrap();
        let text: String = generation.map(|piece| piece.unwrap().text).collect();
        text.lines().next().unwrap_or("").trim() == question["answer"]
    });
    (right.count(), questions.count())
}

#[test]
fn questions_find_their_answers() {
    let greedy = Settings {
        strategy: Strategy::Greedy,
        warp: Warp { temperature: 0.0, ..Warp::default() },
        ..Settings::default()
    };
    let request = Request { settings: greedy, max_tokens: Some(8), ..Request::default() };
    let small = builtin_file("draft").unwrap();
    let alone = Pair::from_files(small, None, &LoadOptions::default(), &mut |_, _| true).unwrap();
    let (target, draft) = (right_answers(&pair(), &request), right_answers(&alone, &request));
    println!("right answers: target {target:?}, draft {draft:?}");
    assert!(target.0 > draft.0 && target.0 * 4 > target.1, "{target:?} {draft:?}");
}

#[test]
fn rows_give_the_same_bits_in_any_company() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let device = Device::Cpu(Arc::new(Cpu::with_isa(2, isa).unwrap()));
        for name in ["target", "draft"] {
            let file = Arc::new(builtin_file(name).unwrap());
            let model = Model::load(file, &device, &mut |_, _| true).unwrap();
            let tokens: Vec<Token> = (0..200).map(|i| 300 + i * 37 % 1500).collect();
            let options = SessionOptions::default();

            // A line, and a tree of three branches on it that share nodes.
            let mut lm = model.session(&options).unwrap();
            extend(&mut *lm, &tokens[..150]).unwrap();
            let mut batch = Batch::new();
            let mut branches = Vec::new();
            for b in 0..3u32 {
                let mut parent = None;
                let mut branch = Vec::new();
                for d in 0..20u32 {
                    let token = 400 + b * 100 + d;
                    parent = Some(Row(batch.push(token, parent, Want::Logits) as u32));
                    branch.push((token, parent.unwrap()));
                }
                branches.push(branch);
            }
            let outputs = lm.eval(&batch).unwrap();
            let tree: Vec<Vec<f32>> = (0..60).map(|i| outputs.logits(i).to_vec()).collect();

            for branch in &branches {
                let mut alone = model.session(&options).unwrap();
                extend(&mut *alone, &tokens[..150]).unwrap();
                for (token, row) in branch {
                    let outputs = alone.eval(&Batch::chain(&[*token], None, Row(0), Want::Logits));
                    assert!(outputs.unwrap().logits(0) == tree[row.0 as usize], "{name} on {isa}");
                    alone.commit(Some(Row(0))).unwrap();
                }
            }
            // Keeping the middle branch moves its rows; what follows is as if it had been a line.
            lm.commit(Some(branches[1].last().unwrap().1)).unwrap();
            let mut fresh = model.session(&options).unwrap();
            let line: Vec<Token> =
                tokens[..150].iter().copied().chain(branches[1].iter().map(|b| b.0)).collect();
            extend(&mut *fresh, &line).unwrap();
            let next = Batch::chain(&tokens[150..], None, Row(0), Want::Logits);
            let moved = lm.eval(&next).unwrap().logits(49).to_vec();
            assert!(fresh.eval(&next).unwrap().logits(49) == moved, "{name} on {isa} after keep");
        }
    }
}

#[test]
fn a_wide_prompt_is_the_same_as_single_rows() {
    let pair = pair();
    let mut sessions = [
        pair.target().session(&SessionOptions::default()).unwrap(),
        pair.target().session(&SessionOptions::default()).unwrap(),
    ];
    let tokens: Vec<Token> = (0..128).map(|i| 300 + i * 11 % 1500).collect();
    let mut batch = Batch::new();
    for (i, &token) in tokens.iter().enumerate() {
        batch.push(token, i.checked_sub(1).map(|p| Row(p as u32)), Want::Logits);
    }
    let wide: Vec<Vec<f32>> = {
        let outputs = sessions[0].eval(&batch).unwrap();
        (0..128).map(|i| outputs.logits(i).to_vec()).collect()
    };
    for (i, token) in tokens.iter().enumerate() {
        let one = Batch::chain(&[*token], None, Row(0), Want::Logits);
        assert!(sessions[1].eval(&one).unwrap().logits(0) == wide[i], "row {i}");
        sessions[1].commit(Some(Row(0))).unwrap();
    }
}

#[test]
fn a_session_goes_on_with_another_prompt_and_stays_itself() {
    let pair = pair();
    let request = |seed| Request {
        settings: Settings { seed, ..Settings::default() },
        max_tokens: Some(40),
        ..Request::default()
    };
    let mut fresh = pair.session(&SessionOptions::default()).unwrap();
    let expected = generate(&mut fresh, "Once upon a time there was a dog", &request(5)).0;
    let mut used = pair.session(&SessionOptions::default()).unwrap();
    generate(&mut used, "Once upon a time there was a cat", &request(1));
    let generation = used.generate("Once upon a time there was a dog", &request(5)).unwrap();
    assert!(generation.prefill().reused >= 4, "{:?}", generation.prefill());
    drop(generation);
    assert_eq!(generate(&mut used, "Once upon a time there was a dog", &request(5)).0, expected);

    // Sessions of one pair run side by side.
    let texts: Vec<_> = std::thread::scope(|scope| {
        let run = || {
            let mut session = pair.session(&SessionOptions::default()).unwrap();
            generate(&mut session, "Once upon a time there was a dog", &request(5)).0
        };
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(texts.iter().all(|text| *text == expected));
}
