//! `mtad logits`: the raw logits of given tokens, as a numpy file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::interrupts::{self, Finishing};
use super::{DeviceArgs, load_model, open_model_as};
use crate::decode::Pieces;
use crate::engine::SessionOptions;
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::lm::{Batch, MAX_TREE, Row, Want};

/// Write the logits after each of some tokens to a numpy file
///
/// Shape (tokens, vocabulary), f4. The tokens are taken exactly as given.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The model, a GGUF file (no tokenizer is needed)
    #[arg(long, short, value_name = "GGUF")]
    model: PathBuf,

    /// Token ids
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', required = true)]
    tokens: Vec<u32>,

    /// The file to write
    #[arg(long, value_name = "NPY")]
    out: PathBuf,

    /// How many tokens to feed at a time; the result does not depend on it
    #[arg(long, value_name = "N", default_value_t = MAX_TREE as u32,
          value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,

    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn logits(args: &LogitsArgs) -> Result<()> {
    let options = args.device.load_options()?;
    let file = Arc::new(open_model_as(&args.model, &options)?);
    let device = options.device()?;
    let model = load_model(file, &device, &options)?;
    let context = args.device.context();
    let mut lm = model.session(&SessionOptions { context, ..SessionOptions::default() })?;
    // Asked first, so that no file is left behind when the tokens do not do.
    if args.tokens.len() > lm.capacity() {
        return Err(Error::ContextFull { wanted: args.tokens.len(), capacity: lm.capacity() });
    }
    if let Some(token) = args.tokens.iter().find(|&&t| t as usize >= lm.vocab_size()) {
        let vocab = lm.vocab_size();
        return Err(Error::invalid(format!("token {token} is outside the vocabulary of {vocab}")));
    }
    let mut out = OutputFile::create(&args.out, model.file().files().map(Path::new))?;
    let header = npy_header(args.tokens.len(), lm.vocab_size());
    out.write_all(&header).map_err(|e| out.error(e))?;
    // What is not whole is removed before an interrupt ends the program.
    let _finishing = Finishing::first();
    let mut pieces = Pieces::of_model(model.shape().macs, Pieces::LONGEST);
    let mut left = &args.tokens[..];
    while !left.is_empty() {
        interrupts::check()?;
        let clock = Instant::now();
        let (piece, rest) = left.split_at(pieces.next(left.len()).min(args.batch as usize));
        left = rest;
        let mut batch = Batch::new();
        for (i, &token) in piece.iter().enumerate() {
            batch.push(token, i.checked_sub(1).map(|p| Row(p as u32)), Want::Logits);
        }
        let outputs = lm.eval(&batch)?;
        for i in 0..piece.len() {
            for x in outputs.logits(i) {
                out.write_all(&x.to_le_bytes()).map_err(|e| out.error(e))?;
            }
        }
        lm.commit(Some(Row(piece.len() as u32 - 1)))?;
        pieces.took(piece.len(), clock.elapsed());
    }
    out.finish()
}

/// The header of a numpy file, version 1.0: padded so that the data begin at a multiple of 64.
fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let mut text =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let len = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text.push_str(&" ".repeat(len - text.len() - 1));
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((len as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header
}
