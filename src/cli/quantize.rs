//! `mtad quantize`: stores a model's weights in other types.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::open_model;
use super::stored::{Report, with_progress};
use crate::error::Result;
use crate::gguf::quantize::{Options, quantize as write};
use crate::quant::Recipe;

/// Store a model's weights in other types
///
/// Types, from the largest files to the smallest: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0
/// Q4_K_M Q4_K_S Q4_1 IQ4_NL Q4_0 IQ4_XS Q3_K_L Q3_K_M Q3_K_S Q2_K. Mixed recipes (those that end
/// in _S, _M and _L, and Q2_K) store some tensors in more bits, as llama.cpp does, and so does the
/// output of all but Q8_0. Rows that are no whole blocks of a type are stored in another, which is
/// said. F16 and F32 read a quantized model back.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// The GGUF file to read (builtin:target and builtin:draft are the built-in pair)
    #[arg(value_name = "IN.gguf")]
    input: PathBuf,

    /// The GGUF file to write; it appears when it is whole. For /dev/stdout the report goes to
    /// standard error
    #[arg(value_name = "OUT.gguf")]
    output: PathBuf,

    /// What to store weights in, in any case; Q3_K, Q4_K and Q5_K stand for their _M
    #[arg(value_name = "TYPE")]
    recipe: Recipe,

    /// Read and round again what is quantized already
    #[arg(long)]
    requantize: bool,

    /// CPU threads [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn quantize(args: &QuantizeArgs) -> Result<()> {
    let file = open_model(&args.input)?;
    let options = Options { recipe: args.recipe, requantize: args.requantize };
    let start = Instant::now();
    let stored =
        with_progress(args.threads, |progress| write(&file, &args.output, &options, progress))?;
    let report = Report {
        input: &args.input,
        output: &args.output,
        recipe: args.recipe,
        stored: &stored,
        input_bytes: file.file_len() as u64,
        seconds: start.elapsed().as_secs_f64(),
    };
    report.print_fallbacks();
    match args.json {
        true => report.say(report.json()),
        false => report.print(),
    }
}
