//! `mtad convert`: a checkpoint in Hugging Face's form as a GGUF file.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::print_notes;
use super::stored::{Report, with_progress};
use crate::convert::convert as write;
use crate::error::Result;
use crate::quant::Recipe;

/// Make a GGUF file of a checkpoint folder (config.json, safetensors, tokenizer)
///
/// Llama, Mistral, Qwen2 and OPT are converted. Weights are read as they are written, so the model
/// need not fit into memory; the output appears when it is whole. Quantized types are made on the
/// way, as `quantize` makes them. Vectors (norms, biases) are always F32. Tokenizers are read from
/// tokenizer.model, tokenizer.json, or vocab.json and merges.txt; a folder without one is converted
/// with a warning. docs/convert.md says what is read and what is written.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The folder of the checkpoint
    #[arg(value_name = "DIR")]
    input: PathBuf,

    /// The GGUF file to write; it appears when it is whole. For /dev/stdout the report goes to
    /// standard error
    #[arg(value_name = "OUT.gguf")]
    output: PathBuf,

    /// What to store weights in, in any case: F32, F16, BF16, Q8_0, or any other type that
    /// `quantize` knows [default: BF16 if most of the checkpoint's weights are, else F16]
    #[arg(long = "type", short = 't', value_name = "TYPE")]
    recipe: Option<Recipe>,

    /// CPU threads [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn convert(args: &ConvertArgs) -> Result<()> {
    let start = Instant::now();
    let converted = with_progress(args.threads, |progress| {
        write(&args.input, &args.output, args.recipe, progress)
    })?;
    print_notes(converted.notes.clone());
    let report = Report {
        input: &args.input,
        output: &args.output,
        recipe: converted.recipe,
        stored: &converted.stored,
        input_bytes: converted.input_bytes,
        seconds: start.elapsed().as_secs_f64(),
    };
    report.print_fallbacks();
    if args.json {
        let mut line = report.json();
        line["architecture"] = converted.architecture.into();
        line["tokenizer"] = match converted.tokenizer {
            Some((model, tokens)) => json!({ "model": model, "tokens": tokens }),
            None => serde_json::Value::Null,
        };
        line["notes"] = converted.notes.into();
        return report.say(line);
    }
    report.print()?;
    match converted.tokenizer {
        Some((model, tokens)) => report
            .say(format_args!("  {} with {tokens} tokens (`{model}`)", converted.architecture)),
        None => report.say(format_args!("  {} without a tokenizer", converted.architecture)),
    }
}
