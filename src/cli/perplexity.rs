//! `mtad perplexity`: how well a model foretells a text.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::console::tell;
use super::interrupts::{self, Finishing};
use super::{
    DeviceArgs, VocabularyArgs, load_model, of_option, open_model_as, print_line, print_notes,
    progress_bar, read_text,
};
use crate::decode::Interruptible;
use crate::engine::SessionOptions;
use crate::error::{Error, Result};
use crate::eval::perplexity::perplexity as measure;
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Measure the perplexity of a text under a model, as llama-perplexity defines it
///
/// The text is cut into chunks that do not overlap; the second half of each is scored. The figure
/// is exp(mean -ln p) with its standard error.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// A GGUF file [default: the built-in target]
    #[arg(long, short, value_name = "GGUF")]
    model: Option<PathBuf>,

    /// The text [default: standard input]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Tokens of a chunk
    #[arg(long, value_name = "N", default_value_t = 512)]
    chunk: usize,

    /// The most chunks [default: all of the text]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,

    /// Print one line of JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    vocabulary: VocabularyArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let text = read_text(None, args.file.as_ref(), "text")?;
    let path = args.model.as_deref().unwrap_or("builtin:target".as_ref());
    let options = args.device.load_options()?;
    let file = Arc::new(open_model_as(path, &options)?);
    let tokenizer = Tokenizer::with_pre_tokenizer(&file, args.vocabulary.pre_tokenizer.as_deref())?;
    print_notes(tokenizer.notes().to_vec());
    let device = options.device()?;
    let model = load_model(file, &device, &options)?;
    let context = Some(args.device.context().unwrap_or(args.chunk));
    let mut lm = model.session(&SessionOptions { context, ..SessionOptions::default() })?;
    let add_bos = tokenizer.add_bos();
    let tokens = tokenizer.encode(&text, EncodeOptions { bos: add_bos, special: false });
    let bos = tokenizer.bos().filter(|_| add_bos);

    // What was scored until an interrupt is reported.
    let _finishing = Finishing::first();
    let interrupt = interrupts::flag();
    let mut lm = Interruptible::new(&mut *lm, &interrupt);
    let bar = progress_bar("{bar:40} {pos}/{len} chunks {eta} {msg}");
    let start = Instant::now();
    let most = args.chunks.map(|n| n as usize);
    let mut planned = 0;
    let found = measure(&mut lm, &tokens, bos, args.chunk, most, &mut |so_far, chunks| {
        planned = chunks;
        bar.set_length(chunks as u64);
        bar.set_position(so_far.chunks as u64);
        if so_far.scored > 0 {
            bar.set_message(format!("perplexity {:.4}", so_far.value()));
        }
        !interrupts::asked()
    });
    bar.finish_and_clear();
    let found = found.map_err(|error| match error {
        Error::NotFinite { .. } => Error::NotFinite { model: path.display().to_string() },
        error => of_option("--chunk")(error),
    })?;
    let seconds = start.elapsed().as_secs_f64();
    if found.chunks < planned {
        tell!("mtad: interrupted after {} of {planned} chunks", found.chunks);
    }
    if args.json {
        return print_line(json!({
            "model": path.display().to_string(),
            "device": model.describe(),
            "perplexity": found.value(),
            "standard_error": found.standard_error(),
            "nll": found.mean(),
            "tokens": tokens.len(),
            "chunk": args.chunk,
            "chunks": found.chunks,
            "scored": found.scored,
            "complete": found.chunks == planned,
            "seconds": seconds,
            "tokens_per_second": (found.chunks * args.chunk) as f64 / seconds,
        }));
    }
    print_line(format_args!(
        "perplexity {:.4} ±{:.4} ({} tokens scored, in {} chunks of {})",
        found.value(),
        found.standard_error(),
        found.scored,
        found.chunks,
        args.chunk
    ))
}
