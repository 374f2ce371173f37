//! Decodes with bigram tables as models, and prints what the decoders reach on them.
//!
//! With `--sweep` it prints instead, for the first entry, a Markdown table of all strategies over
//! thresholds and beam widths.
//!
//! The tables come from a JSON file: a list of entries, each with the logits of a target and a
//! draft by previous token, and settings. For each entry and strategy one line of JSON goes to
//! standard output. Sequences begin with two random tokens and end with the first block that
//! reaches the entry's length. Block efficiency is the mean over sequences of 1 + accepted /
//! rounds, and `nll` the mean over sequences of the mean negative log-likelihood (in nats) of a
//! generated token under the unwarped target; `_se` are standard errors over sequences.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use mtad::decode::{CostTable, Decoding, Models, Settings, Strategy};
use mtad::lm::table::TableLm;
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
    /// Print a table of all strategies over tau and beam width, for the first entry.
    #[arg(long)]
    sweep: bool,
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

impl Entry {
    /// The settings to decode with.
    pub fn settings(&self, strategy: Strategy) -> Settings {
        Settings {
            strategy,
            gamma: self.gamma,
            beam_width: self.beam_width,
            tau: self.tau,
            with_replacement: self.with_replacement,
            warp: Warp {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: if self.top_p == 0.0 { 1.0 } else { self.top_p },
                ..Warp::default()
            },
            ..Settings::default()
        }
    }
}

/// Decodes `sequences` sequences with an entry's tables, scored and from this seed on.
///
/// # Errors
/// If the settings are out of range.
pub fn run(entry: &Entry, settings: &Settings, sequences: usize, seed: u64) -> Result<Summary> {
    let mut target = TableLm::new(entry.target_logits.clone())?;
    let mut draft = TableLm::new(entry.draft_logits.clone())?;
    let mut models = Models::pair(&mut target, &mut draft);
    let mut decoding = Decoding::new(Settings { seed, score: true, ..settings.clone() })?;
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

fn print_line(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| Error::io("standard output", error))
}

fn print_all(arguments: &Arguments) -> Result<()> {
    if arguments.sequences < 2 {
        return Err(Error::invalid("sequences must be 2 or more, or there is no standard error"));
    }
    let entries = read(&arguments.file)?;
    let found = |index: usize, settings: &Settings| {
        run(&entries[index], settings, arguments.sequences, arguments.seed)
            .map_err(|error| Error::format(&arguments.file, format!("entry {index}: {error}")))
    };
    if arguments.sweep {
        let Some(entry) = entries.first() else {
            return Err(Error::format(&arguments.file, "it has no entry to sweep over".to_owned()));
        };
        return sweep(entry, |settings| found(0, settings));
    }
    for (index, entry) in entries.iter().enumerate() {
        for strategy in STRATEGIES {
            let line = Line {
                entry: index,
                strategy: strategy.to_string(),
                sequences: arguments.sequences,
                summary: found(index, &entry.settings(strategy))?,
            };
            print_line(&serde_json::to_string(&line).expect("numbers and names are JSON"))?;
        }
    }
    Ok(())
}

/// Thresholds and beam widths of the table.
const TAUS: [f64; 6] = [0.01, 0.05, 0.1, 0.2, 0.5, 0.9];
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// What a pass of the target and a step of the draft cost, for the controller: one of each row
/// that is nearly free, and a draft that costs a tenth.
fn costs() -> Result<CostTable> {
    CostTable::new(vec![(1, 10.0), (8, 11.0), (32, 14.0)], vec![(1, 1.0), (8, 1.2)])
}

/// Prints a Markdown table of negative log-likelihood and block efficiency.
fn sweep(entry: &Entry, found: impl Fn(&Settings) -> Result<Summary>) -> Result<()> {
    let cell = |settings: &Settings| -> Result<String> {
        let Summary { nll, block_efficiency, .. } = found(settings)?;
        Ok(format!("{nll:.2} / {block_efficiency:.2}"))
    };
    print_line("| strategy | W | tau 0.01 | 0.05 | 0.1 | 0.2 | 0.5 | 0.9 |")?;
    print_line("|---|---|---|---|---|---|---|---|")?;
    for strategy in [Strategy::Mtad, Strategy::Mmtad] {
        for beam_width in WIDTHS {
            let mut line = format!("| `{strategy}` | {beam_width} |");
            for tau in TAUS {
                let settings = Settings { beam_width, tau, ..entry.settings(strategy) };
                line += &format!(" {} |", cell(&settings)?);
            }
            print_line(&line)?;
        }
    }
    let mut line = "| `auto` | its own |".to_owned();
    for tau in TAUS {
        let costs = Some(Arc::new(costs()?));
        let settings = Settings { tau, costs, ..entry.settings(Strategy::Auto) };
        line += &format!(" {} |", cell(&settings)?);
    }
    print_line(&line)?;

    print_line("\n| strategy, which has no tau | W = 1 | 2 | 4 | 8 |\n|---|---|---|---|---|")?;
    for strategy in [Strategy::Dsbd, Strategy::Mtjd, Strategy::Beam] {
        let mut line = format!("| `{strategy}` |");
        for beam_width in WIDTHS {
            let settings = Settings { beam_width, ..entry.settings(strategy) };
            line += &format!(" {} |", cell(&settings)?);
        }
        print_line(&line)?;
    }

    print_line("\n| strategy, which has neither | settings | |\n|---|---|---|")?;
    let of = |strategy| entry.settings(strategy);
    let greedy = Settings {
        warp: Warp { temperature: 0.0, ..entry.settings(Strategy::Greedy).warp },
        ..of(Strategy::Speculative)
    };
    for (name, settings) in [
        ("", of(Strategy::Sample)),
        ("", of(Strategy::Speculative)),
        ("branching 4,2,2", of(Strategy::SpecInfer)),
        (
            "branching 4,2,2, with replacement",
            Settings { with_replacement: true, ..of(Strategy::SpecInfer) },
        ),
        ("branching 2,2,2,2", Settings { branching: vec![2; 4], ..of(Strategy::SpecInfer) }),
        ("fallback 0.5, rollback 3", of(Strategy::Bild)),
        ("fallback 0, rollback 3", Settings { fallback: 0.0, ..of(Strategy::Bild) }),
        ("fallback 0, rollback 5", Settings { fallback: 0.0, rollback: 5.0, ..of(Strategy::Bild) }),
        ("epsilon 0.09, delta 0.3", of(Strategy::Typical)),
        ("epsilon 0.3, delta 0.6", Settings { epsilon: 0.3, delta: 0.6, ..of(Strategy::Typical) }),
        ("", of(Strategy::Greedy)),
        ("temperature 0", greedy),
    ] {
        print_line(&format!("| `{}` | {name} | {} |", settings.strategy, cell(&settings)?))?;
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
