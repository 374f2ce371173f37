//! The command line: one file per subcommand, over the library's facade.
//!
//! Human output goes to standard output, progress and diagnostics to standard error. Exit codes:
//! 0 done, 1 failed, 2 usage. With `--json` standard output holds exactly one line.

mod bench;
mod chat;
mod convert;
mod cost_tables;
mod devices;
mod energy;
mod eval;
mod inspect;
mod logits;
mod metering;
mod perplexity;
mod quantize;
mod run;
mod stored;
mod template;
mod tokenize;

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::pair::{LoadOptions, builtin_file};
use crate::tokenizer::Tokenizer;

/// Run a pair of quantized GGUF models with multi-token joint decoding
#[derive(Debug, Parser)]
#[command(name = "mtad", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunCommand>),
    Chat(Box<chat::ChatArgs>),
    Bench(Box<bench::BenchArgs>),
    Eval(Box<eval::EvalArgs>),
    Perplexity(perplexity::PerplexityArgs),
    Logits(logits::LogitsArgs),
    Tokenize(tokenize::TokenizeArgs),
    Template(template::TemplateArgs),
    Inspect(inspect::InspectArgs),
    Convert(convert::ConvertArgs),
    Quantize(quantize::QuantizeArgs),
    Energy(Box<energy::EnergyArgs>),
    Devices(devices::DevicesArgs),
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    // On a usage error clap prints and exits with 2.
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::chat(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Eval(args) => eval::eval(&args),
        Command::Perplexity(args) => perplexity::perplexity(&args),
        Command::Logits(args) => logits::logits(&args),
        Command::Tokenize(args) => tokenize::tokenize(&args),
        Command::Template(args) => template::template(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Quantize(args) => quantize::quantize(&args),
        Command::Energy(args) => energy::energy(&args),
        Command::Devices(args) => devices::devices(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough.
        Err(Error::Io { path, source })
            if path == STDOUT && source.kind() == io::ErrorKind::BrokenPipe =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mtad: {error}");
            match error {
                Error::Invalid(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Where and how models run: the options of every subcommand that loads one.
#[derive(Debug, Args)]
struct DeviceArgs {
    /// Where the models run: cpu, gpu, gpu:N, a part of a GPU's name, or auto (a GPU if there is
    /// one, else the CPU); `mtad devices` lists them
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,

    /// Run only the last N layers of the model, and its logits, on the GPU, the others on the CPU
    /// [default: all]
    #[arg(long, value_name = "N")]
    gpu_layers: Option<u32>,

    /// CPU threads [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Leave weights in the mapped file instead of packing them for the CPU when they are loaded:
    /// no time to load and no memory beyond the file's, the same results, but much slower
    #[arg(long)]
    no_repack: bool,

    /// The most tokens that prompt and text may have together [default: what the model was
    /// trained for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx_size: Option<u32>,
}

impl DeviceArgs {
    fn load_options(&self) -> LoadOptions {
        LoadOptions {
            device: self.device.clone(),
            draft_device: None,
            gpu_layers: self.gpu_layers.map(|n| n as usize),
            threads: self.threads.map_or(0, usize::from),
            repack: !self.no_repack,
            pre_tokenizer: None,
        }
    }

    fn context(&self) -> Option<usize> {
        self.ctx_size.map(|n| n as usize)
    }
}

/// How text becomes tokens: an option of every subcommand that is given text.
#[derive(Debug, Args)]
struct VocabularyArgs {
    /// Cut words as this pre-tokenizer does, such as llama-bpe or qwen2, whatever the file names
    /// (`tokenizer.ggml.pre`); a name that there is not lists those that there are
    #[arg(long, value_name = "NAME")]
    pre_tokenizer: Option<String>,
}

/// Prints what a person should know of where models run.
fn print_notes(notes: Vec<String>) {
    notes.iter().for_each(|note| eprintln!("mtad: {note}"));
}

/// Says so if a prompt begins with two tokens that begin a text.
fn warn_of_doubled_bos(tokenizer: &Tokenizer, ids: &[u32]) {
    if tokenizer.doubles_bos(ids) {
        let name = tokenizer.bos().map_or("", |id| tokenizer.token(id));
        eprintln!(
            "mtad: warning: the text begins with {name:?}, and one more was put before it, as the \
             model expects of a text without it; leave one out"
        );
    }
}

const STDOUT: &str = "standard output";

fn stdout_error(source: io::Error) -> Error {
    Error::io(STDOUT, source)
}

/// Prints a line to standard output.
fn print_line(line: impl std::fmt::Display) -> Result<()> {
    writeln!(io::stdout().lock(), "{line}").map_err(stdout_error)
}

/// Opens a model file, or a part of the built-in pair by the name `builtin:target` or
/// `builtin:draft`.
fn open_model(path: &std::path::Path) -> Result<Gguf> {
    match path.to_str().and_then(|p| p.strip_prefix("builtin:")) {
        Some(name) => builtin_file(name),
        None => Gguf::open(path),
    }
}

/// The text that a command works on: its argument, a file, or standard input.
fn read_text(argument: Option<&str>, file: Option<&PathBuf>, what: &str) -> Result<String> {
    let utf8 = |name: &str, bytes: Vec<u8>| {
        String::from_utf8(bytes).map_err(|e| {
            Error::format(
                name,
                format!("is not UTF-8 text (at byte {})", e.utf8_error().valid_up_to()),
            )
        })
    };
    if let Some(text) = argument {
        return Ok(text.to_owned());
    }
    if let Some(path) = file {
        let name = path.display().to_string();
        return utf8(&name, std::fs::read(path).map_err(|e| Error::io(&name, e))?);
    }
    let mut stdin = io::stdin().lock();
    if stdin.is_terminal() {
        return Err(Error::invalid(format!(
            "there is no {what}; give it as an argument or on standard input"
        )));
    }
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).map_err(|e| Error::io("standard input", e))?;
    utf8("standard input", bytes)
}

/// A progress bar on standard error.
fn progress_bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A progress bar on standard error for loading; it appears only if loading takes a moment.
fn loading_bar() -> impl FnMut(u64, u64) -> bool {
    let start = std::time::Instant::now();
    let mut bar: Option<ProgressBar> = None;
    move |done, total| {
        if bar.is_none() && start.elapsed() > Duration::from_millis(300) && done < total {
            let new = progress_bar("loading {bar:40} {bytes}/{total_bytes} {eta}");
            new.set_length(total);
            bar = Some(new);
        }
        if let Some(bar) = &bar {
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
        true
    }
}

/// Columns as wide as their widest cell, the first flush left and the others right.
fn table(rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    rows.iter()
        .map(|row| {
            let cells = row.iter().enumerate().map(|(i, cell)| match (i, width(i).unwrap_or(0)) {
                (0, width) => format!("{cell:width$}"),
                (_, width) => format!("{cell:>width$}"),
            });
            cells.collect::<Vec<_>>().join("  ")
        })
        .collect()
}
