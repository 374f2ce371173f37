//! Decodes with bigram tables as models, and prints what the decoders reach on them.
//!
//! The tables come from a JSON file: a list of entries, each with the logits of a target and a
//! draft by previous token, and settings. For each entry and strategy one line of JSON goes to
//! standard output. Sequences begin with two random tokens and end with the first block that
//! reaches the entry's length. Block efficiency is the mean over sequences of 1 + accepted /
//! rounds, and `nll` the mean over sequences of the mean negative log-likelihood (in nats) of a
//! generated token under the unwarped target; `_se` are standard errors over sequences.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use mtad::decode::{Decoding, Models, Settings, Strategy};
use mtad::model::table::TableLm;
use mtad::sampling::{Rng, Warp};
use mtad::{Error, Result};
use serde::{Deserialize, Serialize};

/// The strategies to run.
pub const STRATEGIES: [Strategy; 3] = [Strategy::Speculative, Strategy::Mtad, Strategy::Mmtad];

#[derive(Parser)]
#[command(about = "Runs the decoders on bigram tables")]
struct Arguments {
    /// A JSON file with a list of table models.
    file: String,
    /// Sequences per entry and strategy.
    #[arg(long, default_value_t = 600)]
    sequences: usize,
    /// Seed of the sequences' beginnings and of all draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A pair of tables with the settings to decode them with.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    vocab: usize,
    target_logits: Vec<Vec<f32>>,
    draft_logits: Vec<Vec<f32>>,
    gamma: usize,
    beam_width: usize,
    tau: f64,
    temperature: f32,
    /// 0 is off.
    top_k: usize,
    /// 0 is off.
    top_p: f32,
    with_replacement: bool,
    /// Generated tokens of a sequence, at least.
    sequence_tokens: usize,
}

impl Entry {
    /// The logits of target and draft.
    pub fn tables(&self) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
        (self.target_logits.clone(), self.draft_logits.clone())
    }
}

/// What a strategy reached on an entry.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Summary {
    /// Mean over sequences of 1 + accepted / rounds.
    pub block_efficiency: f64,
    /// Its standard error.
    pub block_efficiency_se: f64,
    /// Mean negative log-likelihood of a generated token under the unwarped target, in nats.
    pub nll: f64,
    /// Its standard error.
    pub nll_se: f64,
}

#[derive(Serialize)]
struct Line {
    entry: usize,
    strategy: String,
    sequences: usize,
    #[serde(flatten)]
    summary: Summary,
}

/// Reads the entries of a file.
///
/// # Errors
/// If it cannot be read, is not JSON of this layout, or holds tables of the wrong size.
pub fn read(file: &str) -> Result<Vec<Entry>> {
    let text = std::fs::read_to_string(file).map_err(|error| Error::io(file, error))?;
    let entries: Vec<Entry> = serde_json::from_str(&text)
        .map_err(|error| Error::format(file, format!("not a list of table models: {error}")))?;
    for (i, entry) in entries.iter().enumerate() {
        for (name, table) in [("target", &entry.target_logits), ("draft", &entry.draft_logits)] {
            let square = table.len() == entry.vocab
                && entry.vocab > 0
                && table.iter().all(|row| row.len() == entry.vocab);
            if !square {
                let what = format!(
                    "entry {i} has a {name} table that is not of {0} x {0} logits, as its vocab says",
                    entry.vocab
                );
                return Err(Error::format(file, what));
            }
        }
        if entry.sequence_tokens == 0 {
            return Err(Error::format(file, format!("entry {i} has sequence_tokens 0")));
        }
    }
    Ok(entries)
}

/// Decodes `sequences` sequences.
///
/// # Errors
/// If the entry's settings are out of range.
pub fn run(entry: &Entry, strategy: Strategy, sequences: usize, seed: u64) -> Result<Summary> {
    let mut target = TableLm::new(entry.target_logits.clone())?;
    let mut draft = TableLm::new(entry.draft_logits.clone())?;
    let mut models = Models::pair(&mut target, &mut draft);
    let mut decoding = Decoding::new(Settings {
        strategy,
        gamma: entry.gamma,
        beam_width: entry.beam_width,
        tau: entry.tau,
        with_replacement: entry.with_replacement,
        warp: Warp {
            temperature: entry.temperature,
            top_k: entry.top_k,
            top_p: if entry.top_p == 0.0 { 1.0 } else { entry.top_p },
            ..Warp::default()
        },
        seed,
        score: true,
        ..Settings::default()
    })?;
    // Another stream than that of the draws.
    let mut beginnings = Rng::new(!seed);
    let (mut efficiencies, mut nlls) = (Vec::new(), Vec::new());
    for _ in 0..sequences {
        let vocab = models.target.vocab_size() as u32;
        let prompt = [beginnings.below(vocab), beginnings.below(vocab)];
        decoding.start(&mut models, &prompt)?;
        while decoding.generated().len() < entry.sequence_tokens {
            decoding.next_block(&mut models)?;
        }
        efficiencies.push(decoding.statistics().block_efficiency());
        nlls.push(-decoding.scores().iter().sum::<f64>() / decoding.scores().len() as f64);
    }
    let (block_efficiency, block_efficiency_se) = mean_and_error(&efficiencies);
    let (nll, nll_se) = mean_and_error(&nlls);
    Ok(Summary { block_efficiency, block_efficiency_se, nll, nll_se })
}

/// The mean and its standard error.
fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0) / n).sqrt())
}

fn print_all(arguments: &Arguments) -> Result<()> {
    if arguments.sequences < 2 {
        return Err(Error::invalid("sequences must be 2 or more, or there is no standard error"));
    }
    for (index, entry) in read(&arguments.file)?.iter().enumerate() {
        for strategy in STRATEGIES {
            let summary =
                run(entry, strategy, arguments.sequences, arguments.seed).map_err(|error| {
                    Error::format(&arguments.file, format!("entry {index}: {error}"))
                })?;
            let line = Line {
                entry: index,
                strategy: strategy.to_string(),
                sequences: arguments.sequences,
                summary,
            };
            let json = serde_json::to_string(&line).expect("numbers and names are JSON");
            writeln!(std::io::stdout(), "{json}")
                .map_err(|error| Error::io("standard output", error))?;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match print_all(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("table_model: {error}");
            ExitCode::FAILURE
        }
    }
}
