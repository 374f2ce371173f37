//! Sessions that are left and resumed, cloned, saved and restored.
#![cfg(feature = "builtin-pair")]

use std::fs;
use std::path::PathBuf;

use mtad::exec::CacheType;
use mtad::{
    Error, LoadOptions, Pair, Piece, Request, Session, SessionOptions, Settings, StopReason,
    Strategy,
};

const PROMPT: &str = "One day a girl named Lily went to";
const TOKENS: usize = 24;

/// Strategies that remember nothing from round to round.
const STRATEGIES: [Strategy; 9] = [
    Strategy::Greedy,
    Strategy::Sample,
    Strategy::Speculative,
    Strategy::Mtad,
    Strategy::Mmtad,
    Strategy::SpecInfer,
    Strategy::Bild,
    Strategy::Typical,
    Strategy::Mtjd,
];

fn pair() -> Pair {
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    Pair::builtin(true, &options, &mut |_, _| true).unwrap()
}

fn session(pair: &Pair) -> Session {
    pair.session(&SessionOptions::default()).unwrap()
}

fn request(strategy: Strategy) -> Request {
    let settings = Settings { strategy, seed: 5, score: true, ..Settings::default() };
    Request { settings, max_tokens: Some(TOKENS), ..Request::default() }
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.session"))
}

/// Everything that is handed out, put together.
#[derive(Debug, Default, PartialEq)]
struct Told {
    text: String,
    tokens: Vec<(u32, mtad::Origin, Option<f64>)>,
}

impl Told {
    fn hear(&mut self, piece: Piece) {
        self.text.push_str(&piece.text);
        self.tokens.extend(piece.token.map(|token| (token, piece.origin, piece.log_prob)));
    }
}

fn whole(pair: &Pair, request: &Request) -> Told {
    let mut told = Told::default();
    let mut session = session(pair);
    session.generate(PROMPT, request).unwrap().for_each(|piece| told.hear(piece.unwrap()));
    told
}

#[test]
fn a_session_saved_at_any_token_goes_on_with_the_same_text() {
    let pair = pair();
    let file = file("any-token");
    for strategy in STRATEGIES {
        let request = request(strategy);
        let all = whole(&pair, &request);
        assert_eq!(all.tokens.len(), TOKENS, "{strategy}");
        for at in 0..TOKENS {
            let mut told = Told::default();
            let mut first = session(&pair);
            let generation = first.generate(PROMPT, &request).unwrap();
            generation.take(at).for_each(|piece| told.hear(piece.unwrap()));
            first.save(&file).unwrap();
            let mut second = pair.load_session(&file, &SessionOptions::default()).unwrap();
            assert_eq!(second.tokens(), first.tokens());
            let rest = Request { max_tokens: Some(TOKENS - at), ..request.clone() };
            second.resume(&rest).unwrap().for_each(|piece| told.hear(piece.unwrap()));
            assert_eq!(told, all, "{strategy} at {at}");
        }
    }
}

#[test]
fn limits_and_clones_do_not_change_the_text() {
    let pair = pair();
    let request = Request { stop: vec![" the xyz".into()], ..request(Strategy::Mtad) };
    let all = whole(&pair, &request);
    let mut told = Told::default();
    let mut session = session(&pair);
    session.prompt(PROMPT, false).unwrap();
    for most in [1, 2, 3, 4, 5, 6, 3] {
        // Asking for logits in between changes nothing.
        let logits = session.logits().unwrap();
        assert_eq!(logits.len(), pair.target().shape().vocab_size);
        session = session.try_clone().unwrap();
        assert_eq!(session.logits().unwrap(), logits);
        let mut generation =
            session.resume(&Request { max_tokens: Some(most), ..request.clone() }).unwrap();
        generation.by_ref().for_each(|piece| told.hear(piece.unwrap()));
        assert_eq!(generation.tokens().len(), most);
        assert_eq!(generation.scores().len(), most);
        assert_eq!(generation.statistics().emitted, most as u64);
        assert_eq!(generation.stop_reason(), Some(StopReason::MaxTokens));
    }
    assert_eq!(told.tokens, all.tokens);
    assert_eq!(told.text, all.text);
}

#[test]
fn a_stop_text_is_found_across_a_break() {
    let pair = pair();
    let request = request(Strategy::Sample);
    let all = whole(&pair, &request).text;
    let stop = all.char_indices().skip(all.len() / 2).take(6).map(|(_, c)| c).collect::<String>();
    let request = Request { stop: vec![stop.clone()], ..request };
    let stopped = whole(&pair, &request);
    assert_eq!(stopped.text, all[..all.find(&stop).unwrap()]);
    for at in 0..stopped.tokens.len() {
        let mut told = Told::default();
        let mut session = session(&pair);
        let generation = session.generate(PROMPT, &request).unwrap();
        generation.take(at).for_each(|piece| told.hear(piece.unwrap()));
        let mut generation = session.resume(&request).unwrap();
        generation.by_ref().for_each(|piece| told.hear(piece.unwrap()));
        assert_eq!(generation.stop_reason(), Some(StopReason::Stop));
        assert_eq!(told, stopped, "left at {at}");
    }
}

#[test]
fn a_generation_can_own_its_session() {
    let pair = pair();
    let request = request(Strategy::Mtad);
    let all = whole(&pair, &request);
    let (session, error) =
        Box::new(session(&pair)).into_generation(&request).err().expect("there is no text");
    assert!(error.to_string().contains("give a prompt"), "{error}");
    let mut session = session;
    session.prompt(PROMPT, false).unwrap();
    let mut generation = session.into_generation(&request).ok().unwrap();
    let mut told = Told::default();
    generation.by_ref().for_each(|piece| told.hear(piece.unwrap()));
    assert_eq!(told, all);
    let mut session = generation.into_session().unwrap();
    session.reset().unwrap();
    assert!(session.tokens().is_empty() && session.resume(&request).is_err());
    session.generate(PROMPT, &request).unwrap().for_each(drop);
    let generated: Vec<u32> = all.tokens.iter().map(|t| t.0).collect();
    assert!(session.tokens().ends_with(&generated));
}

fn refusal(pair: &Pair, file: &PathBuf, options: &SessionOptions) -> Error {
    let error = pair.load_session(file, options).err().expect("the file is refused");
    assert!(error.to_string().starts_with(file.to_str().unwrap()), "{error}");
    error
}

#[test]
fn files_that_are_cut_flipped_or_of_another_model_are_refused() {
    let pair = pair();
    let options = SessionOptions::default();
    let whole = file("whole");
    let mut first = session(&pair);
    first.generate(PROMPT, &request(Strategy::Mtad)).unwrap().take(2).for_each(drop);
    first.save(&whole).unwrap();
    let bytes = fs::read(&whole).unwrap();
    let damaged = file("damaged");

    for len in [0, 3, 8, 20, 100, 135, 136, 200, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&damaged, &bytes[..len]).unwrap();
        let error = refusal(&pair, &damaged, &options);
        let wanted = if len == 0 { "not a session" } else { "cut short" };
        assert!(matches!(error, Error::Format { .. }), "{error}");
        assert!(error.to_string().contains(wanted), "{len}: {error}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    fs::write(&damaged, &longer).unwrap();
    assert!(refusal(&pair, &damaged, &options).to_string().contains("where its header says"));
    for at in (0..bytes.len()).step_by(bytes.len() / 300).chain(0..200) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&damaged, &flipped).unwrap();
        let error = refusal(&pair, &damaged, &options).to_string();
        let named = ["damaged", "not a session", "version"].iter().any(|name| error.contains(name));
        assert!(named, "byte {at}: {error}");
    }

    // The target as its own draft; the draft alone.
    let load = |target: &str, draft: Option<&str>| {
        let builtin = |name: &str| mtad::session::pair::builtin_file(name).unwrap();
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        Pair::from_files(builtin(target), draft.map(builtin), &options, &mut |_, _| true).unwrap()
    };
    let error = refusal(&load("target", Some("target")), &whole, &options).to_string();
    assert!(error.contains("another draft model"), "{error}");
    let error = refusal(&load("draft", None), &whole, &options).to_string();
    assert!(error.contains("another target model"), "{error}");
    assert!(load("target", None).load_session(&whole, &options).is_ok());

    let single = SessionOptions { cache_type: CacheType::F32, ..options };
    assert!(refusal(&pair, &whole, &single).to_string().contains("cache of type f16, not f32"));
    let small = SessionOptions { context: Some(5), ..options };
    let error = pair.load_session(&whole, &small).err().unwrap();
    assert!(matches!(error, Error::ContextFull { capacity: 5, .. }), "{error}");
    let missing = file("missing");
    assert!(matches!(refusal(&pair, &missing, &options), Error::Io { .. }));
    assert!(matches!(refusal(&pair, &std::env::temp_dir(), &options), Error::Format { .. }));
    assert!(first.save(missing.join("x")).is_err());
}

#[test]
fn single_precision_and_empty_sessions_are_restored_too() {
    let pair = pair();
    let options = SessionOptions { cache_type: CacheType::F32, ..SessionOptions::default() };
    let file = file("single");
    let mut first = pair.session(&options).unwrap();
    first.save(&file).unwrap();
    let mut empty = pair.load_session(&file, &options).unwrap();
    assert!(empty.tokens().is_empty());
    let request = request(Strategy::Mtad);
    let mut told = Told::default();
    empty.generate(PROMPT, &request).unwrap().for_each(|piece| told.hear(piece.unwrap()));
    let mut resumed = Told::default();
    first.prompt(PROMPT, false).unwrap();
    first.save(&file).unwrap();
    let mut second = pair.load_session(&file, &options).unwrap();
    second.resume(&request).unwrap().for_each(|piece| resumed.hear(piece.unwrap()));
    assert_eq!(resumed, told);
}

#[test]
fn a_prompt_that_was_stopped_is_the_same_text_in_the_end() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    let pair = Pair::builtin(true, &LoadOptions::default(), &mut |_, _| true).unwrap();
    // Longer than what a round evaluates by itself.
    let prompt = "Once upon a time there was a little dog. ".repeat(20);
    for strategy in [Strategy::Mtad, Strategy::Speculative, Strategy::Sample] {
        let stopped = Arc::new(AtomicBool::new(true));
        let mut request = Request { max_tokens: Some(30), ..Request::default() };
        request.settings = Settings { strategy, seed: 5, score: true, ..Settings::default() };
        let text = |generation: mtad::Generation<'_>| -> String {
            generation.map(|piece| piece.unwrap().text).collect()
        };
        let whole = text(
            pair.session(&SessionOptions::default()).unwrap().generate(&prompt, &request).unwrap(),
        );

        let mut session = pair.session(&SessionOptions::default()).unwrap();
        let asked = Request { cancel: stopped.clone(), ..request.clone() };
        let mut generation = session.generate(&prompt, &asked).unwrap();
        assert_eq!(generation.stop_reason(), Some(mtad::StopReason::Interrupt));
        assert_eq!((generation.prefill().evaluated, generation.tokens().len()), (0, 0));
        assert!(generation.next().is_none());
        drop(generation);
        // While it is still to stop, nothing is evaluated.
        assert_eq!(text(session.resume(&asked).unwrap()), "");
        let file = tempfile::NamedTempFile::new().unwrap();
        session.save(file.path()).unwrap();
        assert_eq!(text(session.resume(&request).unwrap()), whole, "{strategy}");
        let mut restored = pair.load_session(file.path(), &SessionOptions::default()).unwrap();
        assert_eq!(text(restored.resume(&request).unwrap()), whole, "{strategy}");

        // Without a request.
        let mut session = pair.session(&SessionOptions::default()).unwrap();
        session.cancel_prompts(stopped.clone());
        assert!(matches!(session.prompt(&prompt, false), Err(mtad::Error::Cancelled)));
        stopped.store(false, Ordering::Relaxed);
        assert_eq!(text(session.resume(&request).unwrap()), whole, "{strategy}");
    }
}

/// A saved session whose header says something else, with the checksum that goes with it; as long
/// as the header says, without taking space.
fn forged(bytes: &[u8], at: usize, claim: u64, len: u64) -> PathBuf {
    let mut header = bytes[..136].to_vec();
    header[at..at + 8].copy_from_slice(&claim.to_le_bytes());
    let sum = xxhash_rust::xxh3::xxh3_64(&header[..128]);
    header[128..].copy_from_slice(&sum.to_le_bytes());
    let path = file("forged");
    fs::write(&path, [&header, &bytes[136..]].concat()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
    path
}

#[test]
fn no_memory_is_taken_for_what_a_file_claims() {
    let pair = pair();
    let options = SessionOptions::default();
    let whole = file("claims");
    let mut first = session(&pair);
    first.generate(PROMPT, &request(Strategy::Mtad)).unwrap().take(2).for_each(drop);
    first.save(&whole).unwrap();
    let bytes = fs::read(&whole).unwrap();
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let [text, ahead, draft_rows, draft_bytes] = [72, 88, 112, 120].map(number);
    assert!(draft_rows > 0);

    // 320 GB of tokens beyond the text; 32 GB of text; rows of 1 GB, of a draft that is not there.
    let most = 20_000_000_000;
    let len = |at: u64, each: u64, claim: u64| bytes.len() as u64 + each * (claim - at);
    let beyond = forged(&bytes, 88, most, len(ahead, 16, most));
    let error = refusal(&pair, &beyond, &options).to_string();
    assert!(error.contains("20000000000 tokens beyond its text"), "{error}");
    let most = 1 << 33;
    let long = forged(&bytes, 72, most, len(text, 4, most));
    let error = pair.load_session(&long, &options).err().unwrap();
    assert!(matches!(error, Error::ContextFull { .. }), "{error}");
    let load = LoadOptions { threads: 1, ..LoadOptions::default() };
    let target = mtad::session::pair::builtin_file("target").unwrap();
    let alone = Pair::from_files(target, None, &load, &mut |_, _| true).unwrap();
    let most = 1 << 30;
    let wide = forged(&bytes, 120, most, len(draft_bytes, draft_rows, most));
    let error = refusal(&alone, &wide, &options).to_string();
    assert!(error.contains("its rows are not those of its text"), "{error}");
    assert!(alone.load_session(&whole, &options).is_ok());
}
