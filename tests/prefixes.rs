//! Prefixes of texts that sessions share: nobody sees whether a row was evaluated or taken up.
#![cfg(feature = "builtin-pair")]

mod common;

use std::sync::Arc;

use mtad::decode::Origin;
use mtad::engine::Device;
use mtad::engine::device::OnGpu;
use mtad::exec::CacheType;
use mtad::exec::cpu::Cpu;
use mtad::exec::wgpu::{Gpu, Variants};
use mtad::session::pair::builtin_file;
use mtad::{
    Error, LoadOptions, Pair, Prefix, Request, Session, SessionOptions, Settings, Strategy, Warp,
};

use common::adapter;

const STRATEGIES: [Strategy; 5] =
    [Strategy::Greedy, Strategy::Sample, Strategy::Speculative, Strategy::Mtad, Strategy::Mmtad];

/// What many prompts begin with: more than two blocks of the CPU's cache.
const SYSTEM: &str = "Once upon a time there was a little dog. His name was Max and he had a red \
                      ball. He lived with a girl named Lily in a big house near the park. Every day \
                      they went to the park to play with the ball, and every day they met an old cat \
                      who did not like to play. When it rained they stayed at home and ate cake. ";

const QUESTIONS: [&str; 3] = ["One day the cat said", "Lily wanted to", "Max was very sad because"];

fn pair() -> Pair {
    let options = LoadOptions { threads: 1, device: "cpu".to_owned(), ..LoadOptions::default() };
    Pair::builtin(true, &options, &mut |_, _| true).unwrap()
}

fn options(cache_type: CacheType) -> SessionOptions {
    SessionOptions { cache_type, ..SessionOptions::default() }
}

fn session(pair: &Pair) -> Session {
    pair.session(&SessionOptions::default()).unwrap()
}

fn request(strategy: Strategy) -> Request {
    let warp = Warp { temperature: 0.8, ..Warp::default() };
    let settings = Settings { strategy, seed: 5, score: true, warp, ..Settings::default() };
    Request { settings, max_tokens: Some(40), ..Request::default() }
}

fn prompt(question: &str) -> String {
    format!("{SYSTEM}{question}")
}

/// The tokens of a generation, and the bits of their log-probabilities.
type Told = Vec<(u32, Origin, u64)>;

fn told(generation: mtad::Generation<'_>) -> Told {
    let pieces = generation.map(Result::unwrap);
    pieces
        .filter_map(|piece| Some((piece.token?, piece.origin, piece.log_prob.unwrap().to_bits())))
        .collect()
}

fn whole(pair: &Pair, options: &SessionOptions, question: &str, request: &Request) -> Told {
    let mut session = pair.session(options).unwrap();
    told(session.generate(&prompt(question), request).unwrap())
}

fn prefix(pair: &Pair, options: &SessionOptions) -> Prefix {
    let mut session = pair.session(options).unwrap();
    session.prompt(SYSTEM, false).unwrap();
    session.prefix().unwrap()
}

#[test]
fn a_text_is_the_same_with_any_part_of_a_prefix() {
    let pair = pair();
    for (cache_type, _) in CacheType::ALL {
        let options = options(cache_type);
        let prefix = prefix(&pair, &options);
        let len = prefix.tokens().len();
        assert!(len > 70, "{len}");
        for strategy in STRATEGIES {
            let request = request(strategy);
            let all = whole(&pair, &options, QUESTIONS[0], &request);
            assert_eq!(all.len(), 40);
            // At the end, at the end of a block, in the midst of others, next to nothing, nothing.
            for tokens in [len, 65, 50, 33, 32, 2, 1, 0] {
                let mut session = pair.session(&options).unwrap();
                session.adopt(&prefix, tokens).unwrap();
                assert_eq!(session.tokens(), &prefix.tokens()[..tokens]);
                let generation = session.generate(&prompt(QUESTIONS[0]), &request).unwrap();
                let prefill = generation.prefill();
                // (The end of the text before may be cut into other tokens than the prompt.)
                assert!(prefill.reused + 4 > tokens, "{tokens}: {prefill:?}");
                assert!(prefill.reused <= tokens.saturating_sub(1), "{tokens}: {prefill:?}");
                assert_eq!(prefill.reused + prefill.evaluated + 1, generation.prompt_tokens());
                assert_eq!(told(generation), all, "{strategy}, {cache_type:?}, {tokens} tokens");
            }
        }
    }
}

#[test]
fn what_goes_on_from_a_prefix_disturbs_nobody() {
    let pair = pair();
    for (cache_type, _) in CacheType::ALL {
        let options = options(cache_type);
        let request = request(Strategy::Mtad);
        let all = QUESTIONS.map(|question| whole(&pair, &options, question, &request));
        let mut first = pair.session(&options).unwrap();
        first.prompt(SYSTEM, false).unwrap();
        let prefix = first.prefix().unwrap();
        let mut sessions =
            [first, pair.session(&options).unwrap(), pair.session(&options).unwrap()];
        for session in &mut sessions[1..] {
            session.adopt(&prefix, prefix.tokens().len()).unwrap();
        }
        // Token by token in turns.
        let mut generations: Vec<_> = sessions
            .iter_mut()
            .zip(QUESTIONS)
            .map(|(session, question)| session.generate(&prompt(question), &request).unwrap())
            .collect();
        let mut found = [const { Vec::new() }; 3];
        for _ in 0..40 {
            for (generation, found) in generations.iter_mut().zip(&mut found) {
                let piece = generation.next().unwrap().unwrap();
                found.push((piece.token.unwrap(), piece.origin, piece.log_prob.unwrap().to_bits()));
            }
        }
        drop(generations);
        assert_eq!(found, all);
        // The one that evaluated the prefix ends first; then the prefix; then one that took it up.
        let [first, mut second, mut third] = sessions;
        drop(first);
        let mut fourth = pair.session(&options).unwrap();
        fourth.adopt(&prefix, prefix.tokens().len()).unwrap();
        drop(prefix);
        assert_eq!(told(third.generate(&prompt(QUESTIONS[1]), &request).unwrap()), all[1]);
        drop(third);
        assert_eq!(told(fourth.generate(&prompt(QUESTIONS[2]), &request).unwrap()), all[2]);
        // Back into what was shared, and on from there.
        let short = &SYSTEM[..SYSTEM.len() / 3];
        let mut fresh = pair.session(&options).unwrap();
        let alone = told(fresh.generate(short, &request).unwrap());
        for session in [&mut second, &mut fourth] {
            let generation = session.generate(short, &request).unwrap();
            assert!(generation.prefill().reused > 10);
            assert_eq!(told(generation), alone);
            assert_eq!(told(session.generate(&prompt(QUESTIONS[0]), &request).unwrap()), all[0]);
        }
    }
}

#[test]
fn a_prefix_is_of_any_text_and_a_session_goes_on_with_it() {
    let pair = pair();
    // Of no text.
    let empty = session(&pair).prefix().unwrap();
    assert_eq!((empty.tokens().len(), empty.bytes()), (0, 0));
    for strategy in STRATEGIES {
        let request = request(strategy);
        // Of a text that was left with tokens not handed out, on which a draft was at work.
        let mut first = session(&pair);
        let mut generation = first.generate(SYSTEM, &request).unwrap();
        generation.by_ref().take(7).for_each(drop);
        drop(generation);
        let prefix = first.prefix().unwrap();
        assert!(first.tokens().starts_with(prefix.tokens()));
        assert!(prefix.tokens().len() + 6 > first.tokens().len());
        // A prompt of it is what it is without it.
        let mut second = session(&pair);
        second.adopt(&empty, 0).unwrap();
        assert!(second.tokens().is_empty() && second.resume(&request).is_err());
        second.adopt(&prefix, prefix.tokens().len()).unwrap();
        let found = told(second.resume(&request).unwrap());
        let mut third = session(&pair);
        third.prompt_tokens(prefix.tokens()).unwrap();
        assert_eq!(found, told(third.resume(&request).unwrap()), "{strategy}");
        // In place of another text; and its prefix in turn.
        let again = second.prefix().unwrap();
        second.generate("The dog said", &request).unwrap().take(3).for_each(drop);
        second.adopt(&again, again.tokens().len()).unwrap();
        third.prompt_tokens(again.tokens()).unwrap();
        let [found, expected] = [second, third].map(|mut s| told(s.resume(&request).unwrap()));
        assert_eq!(found, expected, "{strategy}");
    }
}

#[test]
fn threads_share_a_prefix() {
    let pair = pair();
    let request = request(Strategy::Mtad);
    let prefix = prefix(&pair, &SessionOptions::default());
    std::thread::scope(|scope| {
        for question in QUESTIONS {
            let (pair, prefix, request) = (&pair, &prefix, &request);
            scope.spawn(move || {
                let expected = whole(pair, &SessionOptions::default(), question, request);
                for _ in 0..3 {
                    let mut session = session(pair);
                    session.adopt(prefix, prefix.tokens().len()).unwrap();
                    let found = session.generate(&prompt(question), request).unwrap();
                    assert_eq!(told(found), expected);
                }
            });
        }
    });
}

#[test]
fn a_prefix_that_does_not_fit_is_refused() {
    let pair = pair();
    let prefix = prefix(&pair, &SessionOptions::default());
    let len = prefix.tokens().len();
    let refusal = |session: &mut Session, tokens| {
        session.prompt("The dog", false).unwrap();
        let text = session.tokens().to_vec();
        let error = session.adopt(&prefix, tokens).unwrap_err();
        // Nothing has changed.
        assert_eq!(session.tokens(), text);
        assert_eq!(session.prompt_tokens(&text).unwrap().evaluated, 0);
        error
    };
    let invalid = |error: Error, words: &str| {
        assert!(matches!(&error, Error::Invalid(what) if what.contains(words)), "{error}");
    };
    let other = self::pair();
    invalid(refusal(&mut session(&other), len), "other models");
    let single = options(CacheType::F32);
    invalid(refusal(&mut pair.session(&single).unwrap(), len), "f16, and the session's is f32");
    invalid(refusal(&mut session(&pair), len + 1), "which has");
    let small = SessionOptions { context: Some(len - 1), ..SessionOptions::default() };
    let mut small = pair.session(&small).unwrap();
    let error = refusal(&mut small, len);
    assert!(matches!(error, Error::ContextFull { wanted, .. } if wanted == len), "{error}");
    small.adopt(&prefix, len - 1).unwrap();
}

#[test]
fn a_prefix_takes_memory_and_gives_it_back() {
    let load = |memory| {
        let options =
            LoadOptions { threads: 1, memory, device: "cpu".into(), ..Default::default() };
        Pair::builtin(true, &options, &mut |_, _| true).unwrap()
    };
    let options = SessionOptions { context: Some(512), ..SessionOptions::default() };
    let pair = load(Some(1 << 30));
    let mut session = pair.session(&options).unwrap();
    session.prompt(SYSTEM, false).unwrap();
    let bytes = session.prefix().unwrap().bytes();
    assert!(bytes > 0);
    // More of them than there is memory for, if each counts; and again, after these are gone.
    for _ in 0..2 {
        let mut kept = Vec::new();
        let error = loop {
            match session.prefix() {
                Ok(prefix) => kept.push(prefix),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Memory { .. }), "{error}");
        assert!(error.to_string().contains("rows that are kept"), "{error}");
        assert!(kept.len() as u64 * bytes < 1 << 30);
        assert!(kept.len() as u64 * bytes > 1 << 28, "{} of {bytes}", kept.len());
    }
    session.prefix().unwrap();
}

/// The built-in pair on a GPU.
fn on_gpu(layers: Option<usize>, may_fall_back: bool) -> Option<(Pair, Arc<Gpu>)> {
    let gpu = Arc::new(Gpu::with(&adapter()?, Variants::parse("").unwrap()).unwrap());
    let cpu = Arc::new(Cpu::new(1).unwrap());
    let device = Device::Gpu(OnGpu { gpu: gpu.clone(), cpu, layers, may_fall_back });
    let [target, draft] = ["target", "draft"].map(|name| builtin_file(name).unwrap());
    let draft = Some((draft, &device));
    Some((Pair::on_devices((target, &device), draft, &mut |_, _| true).unwrap(), gpu))
}

#[test]
fn a_gpu_copies_prefixes() {
    for (layers, may_fall_back) in [(None, false), (None, true), (Some(2), false)] {
        let Some((pair, _)) = on_gpu(layers, may_fall_back) else { return };
        for (cache_type, _) in CacheType::ALL {
            let options = options(cache_type);
            let mut first = pair.session(&options).unwrap();
            first.prompt(SYSTEM, false).unwrap();
            let prefix = first.prefix().unwrap();
            let len = prefix.tokens().len();
            // (A software adapter takes its time.)
            let request = Request { max_tokens: Some(8), ..request(Strategy::Mtad) };
            let all = [0, 1].map(|i| whole(&pair, &options, QUESTIONS[i], &request));
            for tokens in [len, 40] {
                let mut second = pair.session(&options).unwrap();
                second.adopt(&prefix, tokens).unwrap();
                for (adopts, i) in [(false, 0), (true, 1), (true, 0)] {
                    let session = if adopts { &mut second } else { &mut first };
                    let generation = session.generate(&prompt(QUESTIONS[i]), &request).unwrap();
                    assert!(generation.prefill().reused + 4 > tokens);
                    assert_eq!(told(generation), all[i], "{layers:?} on a GPU");
                }
            }
        }
    }
}

#[test]
fn a_prefix_on_a_device_that_was_lost_is_evaluated_again() {
    let Some((pair, gpu)) = on_gpu(None, true) else { return };
    let options = SessionOptions::default();
    let request = request(Strategy::Mtad);
    let prefix = prefix(&pair, &options);
    let [mut first, mut second] = [session(&pair), session(&pair)];
    second.adopt(&prefix, 50).unwrap();
    gpu.destroy();
    let expected = whole(&self::pair(), &options, QUESTIONS[0], &request);
    for session in [&mut first, &mut second] {
        session.adopt(&prefix, prefix.tokens().len()).unwrap();
        assert_eq!(session.tokens(), prefix.tokens());
        let generation = session.generate(&prompt(QUESTIONS[0]), &request).unwrap();
        assert!(generation.prefill().reused > 60);
        assert_eq!(told(generation), expected);
    }
    // What is kept there is shared there, and is of no use where it is not.
    let moved = second.prefix().unwrap();
    for (session, prefix) in [(&mut first, &moved), (&mut second, &prefix)] {
        session.adopt(prefix, prefix.tokens().len()).unwrap();
        assert_eq!(told(session.generate(&prompt(QUESTIONS[0]), &request).unwrap()), expected);
    }
}
