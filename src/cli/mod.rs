//! The command line: one file per subcommand, over the library's facade.
//!
//! Human output goes to standard output, progress and diagnostics to standard error. Exit codes:
//! 0 done, 1 failed, 2 usage, 130 ended by a signal before there was anything to report. With
//! `--json` standard output holds exactly one line.

mod bench;
mod chat;
mod console;
mod convert;
mod cost_tables;
mod devices;
mod energy;
mod eval;
#[cfg(feature = "grammar")]
mod grammar;
mod inspect;
mod interrupts;
mod logits;
mod metering;
mod perplexity;
mod quantize;
mod run;
#[cfg(feature = "serve")]
mod serve;
mod stored;
mod template;
mod tokenize;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use indicatif::{ProgressBar, ProgressStyle};

use crate::decode::Strategy;
use crate::engine::{CacheType, Device, Isa, Model, NoteListener};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::session::pair::{LoadOptions, builtin_file};
use crate::tokenizer::Tokenizer;
use console::{print_line, reader_left, tell, visible_name};

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
    #[cfg(feature = "serve")]
    Serve(Box<serve::ServeArgs>),
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
    /// Answer queries for another process of this program
    #[cfg(feature = "spider")]
    #[command(name = crate::eval::ANSWER_QUERIES, hide = true)]
    AnswerQueries,
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let result = match parse() {
        Ok(Ok(command)) => {
            interrupts::watch();
            run_command(&command)
        }
        Ok(Err(code)) => return code,
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough.
        Err(error) if reader_left(&error) => ExitCode::SUCCESS,
        Err(Error::Cancelled) if interrupts::asked() => {
            tell!("mtad: interrupted");
            ExitCode::from(interrupts::CODE)
        }
        Err(error) => {
            tell!("mtad: {error}{}", hint(&error));
            match error {
                Error::Invalid(_) | Error::Quantized { .. } | Error::Grammar(_) => {
                    ExitCode::from(2)
                }
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The command, or the exit code where the command line asked for help or was wrong.
fn parse() -> Result<Result<Command, ExitCode>> {
    let error = match Cli::try_parse() {
        Ok(cli) => return Ok(Ok(cli.command)),
        Err(error) => error,
    };
    if !error.use_stderr() {
        error.print().map_err(|source| Error::io(console::STDOUT, source))?;
        return Ok(Err(ExitCode::SUCCESS));
    }
    // An argument may be the name of a file that a shell filled in: the error is that of arguments
    // in which control characters are shown.
    let shown = |argument: OsString| visible_name(&argument.to_string_lossy()).into_owned();
    let error = match Cli::try_parse_from(std::env::args_os().map(shown)) {
        Ok(_) => error,
        Err(error) => error,
    };
    // That it cannot be said changes nothing.
    let _ = error.print();
    Ok(Err(ExitCode::from(2)))
}

fn run_command(command: &Command) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Chat(args) => chat::chat(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::serve(args),
        Command::Template(args) => template::template(args),
        Command::Bench(args) => bench::bench(args),
        Command::Eval(args) => eval::eval(args),
        Command::Perplexity(args) => perplexity::perplexity(args),
        Command::Logits(args) => logits::logits(args),
        Command::Tokenize(args) => tokenize::tokenize(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Convert(args) => convert::convert(args),
        Command::Quantize(args) => quantize::quantize(args),
        Command::Energy(args) => energy::energy(args),
        Command::Devices(args) => devices::devices(args),
        #[cfg(feature = "spider")]
        Command::AnswerQueries => crate::eval::answer_queries(),
    }
}

/// What the command line has to add to an error of the library, which knows of no options.
fn hint(error: &Error) -> &'static str {
    match error {
        Error::ContextFull { .. } => " (--ctx-size)",
        Error::Quantized { .. } => " (--requantize)",
        Error::Unsupported { what, .. } if what.starts_with("pre-tokenizer ") => {
            " (--pre-tokenizer NAME)"
        }
        _ => "",
    }
}

/// An error of an option's value, with the option's name.
fn of_option(option: &str) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Invalid(what) => Error::Invalid(format!("{option}: {what}")),
        Error::Grammar(what) => Error::Grammar(format!("{option}: {what}")),
        error => error,
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

    /// The most memory that weights, caches and activations may take together, such as 6G or 500M; a model that
    /// does not fit runs from its file, which is slower [default: what the system has free]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    memory: Option<u64>,
    /// Read model files into memory instead of mapping them: more memory and a slower start, but a
    /// file that another program cuts short or rewrites meanwhile does no harm
    #[arg(long)]
    no_mmap: bool,

    /// The most tokens that prompt and text may have together [default: what the model was
    /// trained for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx_size: Option<u32>,
}

impl DeviceArgs {
    fn load_options(&self) -> Result<LoadOptions> {
        Ok(LoadOptions {
            isa: Isa::from_env()?,
            device: self.device.clone(),
            draft_device: None,
            gpu_layers: self.gpu_layers.map(|n| n as usize),
            threads: self.threads.map_or(0, usize::from),
            repack: !self.no_repack,
            memory: self.memory,
            mmap: !self.no_mmap,
            pre_tokenizer: None,
        })
    }

    fn context(&self) -> Option<usize> {
        self.ctx_size.map(|n| n as usize)
    }
}

/// A number of bytes: digits, perhaps with a fraction, and perhaps K, M, G or T (of 1,024), with or without B or iB.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..]
        .to_ascii_lowercase()
        .trim_end_matches("ib")
        .trim_end_matches('b')
    {
        "" => 1.0,
        "k" => 1024.0,
        "m" => f64::from(1 << 20),
        "g" => f64::from(1 << 30),
        "t" => 1024.0 * f64::from(1 << 30),
        _ => return Err("give a number of bytes such as 500M, 6G or 6GiB".to_owned()),
    };
    match digits.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok((number * unit) as u64),
        _ => Err("give a number of bytes such as 500M, 6G or 6GiB".to_owned()),
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

/// Prints what a person should know of where models run, or of what was converted.
fn print_notes(notes: Vec<String>) {
    notes.iter().for_each(|note| tell!("mtad: {note}"));
}

/// Says so if a prompt begins with two tokens that begin a text.
fn warn_of_doubled_bos(tokenizer: &Tokenizer, ids: &[u32]) {
    if tokenizer.doubles_bos(ids) {
        let name = tokenizer.bos().map_or("", |id| tokenizer.token(id));
        tell!(
            "mtad: warning: the text begins with {name:?}, and one more was put before it, as the \
             model expects of a text without it; leave one out"
        );
    }
}

/// The names of strategies, each with its line in the help.
fn strategies() -> impl TypedValueParser<Value = Strategy> {
    let values = Strategy::ALL
        .map(|(strategy, name)| PossibleValue::new(name).help(strategy.descriptor().summary));
    PossibleValuesParser::new(values).try_map(|name| name.parse::<Strategy>())
}

/// The names of types of caches.
fn cache_types() -> impl TypedValueParser<Value = CacheType> {
    let names = PossibleValuesParser::new(CacheType::ALL.map(|(_, name)| name));
    let found = |name: String| CacheType::ALL.into_iter().find(|(_, known)| *known == name);
    names.map(move |name| found(name).map_or(CacheType::default(), |(cache_type, _)| cache_type))
}

/// Prints such notes as they come up: where no text is being written that they would fall into.
fn note_listener() -> NoteListener {
    Arc::new(|note| tell!("mtad: {note}"))
}

/// Opens a model file, or a part of the built-in pair by the name `builtin:target` or
/// `builtin:draft`.
fn open_model(path: &std::path::Path) -> Result<Gguf> {
    open_model_as(path, &LoadOptions::default())
}

/// The same as the options say.
fn open_model_as(path: &std::path::Path, options: &LoadOptions) -> Result<Gguf> {
    match path.to_str().and_then(|p| p.strip_prefix("builtin:")) {
        Some(name) => builtin_file(name),
        None => options.open(path),
    }
}

/// Loads a model within the memory that the options allow, and has its notes printed.
fn load_model(file: Arc<Gguf>, device: &Device, options: &LoadOptions) -> Result<Model> {
    let model = Model::load_within(file, device, &options.budget(), &mut loading_bar())?;
    model.on_note(note_listener());
    Ok(model)
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
        !interrupts::asked()
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
