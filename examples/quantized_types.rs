//! What quantizing does to the built-in target: for each type the file's size, its perplexity on
//! a text, and how well it agrees with the built-in draft.
//!
//!     cargo run --release --example quantized_types -- --text tinystories_valid.txt
//!
//! `--target MODEL.gguf` begins with other weights than the built-in ones, which have been
//! quantized once already; `--chunks N` scores that many chunks of 512 tokens (default 40), `--types
//! Q4_0,Q8_0` some of the types only. Types take turns prompt by prompt where texts are drawn.

use std::path::PathBuf;
use std::process::ExitCode;

use mtad::eval::perplexity::perplexity;
use mtad::gguf::Gguf;
use mtad::gguf::quantize::{Options, quantize};
use mtad::quant::Recipe;
use mtad::session::pair::builtin_file;
use mtad::tokenizer::EncodeOptions;
use mtad::{Error, LoadOptions, Pair, Request, Result, SessionOptions, Settings, Strategy};

const PROMPTS: [&str; 5] = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and his dog",
    "It was raining",
    "The old man",
];
const SEEDS: u64 = 4;
const TOKENS: usize = 150;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// One type's model, and what it came to.
struct Entry {
    recipe: Recipe,
    bytes: usize,
    pair: Pair,
    perplexity: (f64, f64),
    /// (accepted, drafted, rounds) of speculative sampling and of MTAD.
    counts: [(u64, u64, u64); 2],
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1).cloned()
    };
    let Some(text) = value("--text") else {
        return Err(Error::Invalid(
            "--text FILE names the text to measure perplexity on".to_owned(),
        ));
    };
    let chunks = match value("--chunks") {
        Some(n) => n.parse().map_err(|e| Error::Invalid(format!("--chunks {n}: {e}")))?,
        None => 40,
    };
    let recipes: Vec<Recipe> = match value("--types") {
        Some(names) => names.split(',').map(str::parse).collect::<Result<_>>()?,
        None => Recipe::all().collect(),
    };
    let source = match value("--target") {
        Some(path) => Gguf::open(path)?,
        None => builtin_file("target")?,
    };
    let text = std::fs::read_to_string(&text).map_err(|source| Error::Io { path: text, source })?;
    let mut entries = recipes
        .into_iter()
        .map(|recipe| entry(&source, recipe, &text, chunks))
        .collect::<Result<Vec<_>>>()?;
    for seed in 0..SEEDS {
        for prompt in PROMPTS {
            for entry in &mut entries {
                draw(entry, prompt, seed)?;
            }
        }
        eprintln!("drawn {} of {SEEDS} times", seed + 1);
    }
    println!(
        "type       bytes      perplexity        accepted: speculative   mtad   tokens/pass: speculative   mtad"
    );
    for e in &entries {
        let share = |i: usize| 100.0 * e.counts[i].0 as f64 / e.counts[i].1 as f64;
        let efficiency = |i: usize| 1.0 + e.counts[i].0 as f64 / e.counts[i].2 as f64;
        println!(
            "{:7} {:9} {:8.3} ±{:.3} {:28.1}% {:5.1}% {:26.2} {:6.2}",
            e.recipe.name(),
            e.bytes,
            e.perplexity.0,
            e.perplexity.1,
            share(0),
            share(1),
            efficiency(0),
            efficiency(1)
        );
    }
    Ok(())
}

/// Quantizes, loads and scores.
fn entry(source: &Gguf, recipe: Recipe, text: &str, chunks: usize) -> Result<Entry> {
    let out: PathBuf =
        std::env::temp_dir().join(format!("mtad-types-{}-{recipe}.gguf", std::process::id()));
    let options = Options { recipe, requantize: true };
    quantize(source, &out, &options, &mut |_, _, _| true)?;
    let bytes = std::fs::read(&out);
    // Small enough to stay in memory, and gone from the disk whatever comes.
    let removed = std::fs::remove_file(&out);
    let io = |source| Error::Io { path: out.display().to_string(), source };
    removed.map_err(io)?;
    let file = Gguf::from_vec(recipe.name(), bytes.map_err(io)?)?;
    let bytes = file.file_len();
    let draft = Some(builtin_file("draft")?);
    let pair = Pair::from_files(file, draft, &LoadOptions::default(), &mut |_, _| true)?;
    let tokenizer = pair.tokenizer();
    let add_bos = tokenizer.add_bos();
    let tokens = tokenizer.encode(text, EncodeOptions { bos: add_bos, special: false });
    let bos = tokenizer.bos().filter(|_| add_bos);
    let mut lm = pair.target().session(&SessionOptions::default())?;
    let found = perplexity(&mut *lm, &tokens, bos, 512, Some(chunks), &mut |_, _| true)?;
    eprintln!("{recipe}: {bytes} bytes, perplexity {:.3}", found.value());
    let perplexity = (found.value(), found.standard_error());
    Ok(Entry { recipe, bytes, pair, perplexity, counts: [(0, 0, 0); 2] })
}

/// Draws a text with either strategy.
fn draw(entry: &mut Entry, prompt: &str, seed: u64) -> Result<()> {
    for (strategy, counts) in
        [Strategy::Speculative, Strategy::Mtad].into_iter().zip(&mut entry.counts)
    {
        let settings = Settings { strategy, seed, ..Settings::default() };
        let request = Request { settings, max_tokens: Some(TOKENS), ..Request::default() };
        let mut session = entry.pair.session(&SessionOptions::default())?;
        let mut generation = session.generate(prompt, &request)?;
        generation.by_ref().try_for_each(|piece| piece.map(drop))?;
        let s = generation.statistics();
        counts.0 += s.accepted();
        counts.1 += s.drafted();
        counts.2 += s.rounds();
    }
    Ok(())
}
