//! Writing weights into a new GGUF file in the types that they shall have: what `quantize` and
//! the conversion of checkpoints share.
//!
//! Tensors are read, rounded and written one stretch of rows after the other, so that a model need
//! not fit into memory. The new file appears when it is whole ([`crate::files`]).

use std::borrow::Cow;
use std::io::{self, Write};
use std::ops::Range;

use rayon::prelude::*;

use super::{Tensor, Writer};
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::quant::{BlockType, Chosen};

/// Weights that are held as `f32` at a time.
const STRETCH: usize = 1 << 22;

/// What llama.cpp calls the layout of blocks in use today.
pub(crate) const QUANTIZATION_VERSION: u32 = 2;

/// One tensor of the new file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// How many elements it has.
    pub elements: u64,
    /// The type that it had.
    pub was: BlockType,
    /// The type that the recipe wanted; another than `now` if its rows are no whole blocks of it.
    pub wanted: BlockType,
    /// The type that it has.
    pub now: BlockType,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Sum of squared differences between old and new elements.
    pub squared_error: f64,
    /// Sum of squared old elements; 0 for what was copied.
    pub squares: f64,
}

impl Stored {
    pub(crate) fn new(name: &str, elements: u64, was: BlockType, chosen: Chosen) -> Self {
        let Chosen { wanted, used: now } = chosen;
        Stored {
            name: name.to_owned(),
            elements,
            was,
            wanted,
            now,
            bytes: elements / now.block_len() as u64 * now.block_bytes() as u64,
            squared_error: 0.0,
            squares: 0.0,
        }
    }
}

/// Told of each tensor before it is written, and of bytes done and bytes in all while it is.
/// Returning false stops.
pub type Progress<'a> = &'a mut dyn FnMut(&Stored, u64, u64) -> bool;

/// Where the weights of a tensor of the new file come from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// The weights as they lie in the old file.
    pub tensor: Tensor<'a>,
    /// The order in which its rows are taken.
    pub order: Order,
}

/// An order of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// As they lie there.
    Same,
    /// Within every `head_dim` rows a row of the first half, then its partner in the second, and
    /// so on: rotary pairs that were halves become neighbours.
    Interleaved { head_dim: usize },
}

impl<'a> Source<'a> {
    /// The blocks of a range of the new tensor's rows.
    fn rows(&self, rows: Range<usize>) -> Cow<'a, [u8]> {
        let len = self.tensor.row_bytes();
        match self.order {
            Order::Same => Cow::Borrowed(&self.tensor.bytes[rows.start * len..rows.end * len]),
            Order::Interleaved { head_dim } => {
                let mut bytes = Vec::with_capacity(rows.len() * len);
                for row in rows {
                    let (head, i) = (row / head_dim, row % head_dim);
                    let row = head * head_dim + i % 2 * (head_dim / 2) + i / 2;
                    bytes.extend_from_slice(self.tensor.row(row));
                }
                Cow::Owned(bytes)
            }
        }
    }
}

/// Writes a file whose planned tensors are `stored`, in this order, from `sources`. `release` is
/// told of bytes that are not needed any more.
///
/// # Errors
/// What the system says; a weight is no number or does not fit its new type;
/// [`Error::Cancelled`]. Then there is no new file.
pub(crate) fn write(
    mut out: OutputFile,
    writer: &Writer,
    stored: &mut [Stored],
    sources: &[Source<'_>],
    release: &dyn Fn(&[u8]),
    progress: Progress<'_>,
) -> Result<()> {
    let total: u64 = sources.iter().map(|source| source.tensor.bytes.len() as u64).sum();
    let mut done = 0;
    let mut failure = None;
    let mut tensors = stored.iter_mut().zip(sources);
    let written = writer.write_with(&mut out, |_, _, to| {
        let (entry, source) =
            tensors.next().ok_or_else(|| io::Error::other("a tensor has no source"))?;
        let result = store(source, entry, to, release, &mut |entry, bytes| {
            done += bytes;
            progress(entry, done, total)
        });
        release(source.tensor.bytes);
        result.map_err(|error| match error {
            Error::Io { source, .. } => source,
            // The writer knows errors of the system only.
            error => {
                let text = error.to_string();
                failure = Some(error);
                io::Error::other(text)
            }
        })
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, Err(source)) => Err(out.error(source)),
        (None, Ok(())) => out.finish(),
    }
}

/// Writes one tensor.
fn store(
    source: &Source<'_>,
    entry: &mut Stored,
    out: &mut dyn Write,
    release: &dyn Fn(&[u8]),
    step: &mut dyn FnMut(&Stored, u64) -> bool,
) -> Result<()> {
    let tensor = &source.tensor;
    let (was, now) = (entry.was, entry.now);
    let io = |e| Error::io(tensor.file, e);
    let mut proceed = |entry: &Stored, bytes: usize| match step(entry, bytes as u64) {
        true => Ok(()),
        false => Err(Error::Cancelled),
    };
    proceed(entry, 0)?;
    let stretch = (STRETCH / tensor.cols).max(1);
    let bytes_of = |weights: usize| weights / now.block_len() * now.block_bytes();
    for start in (0..tensor.rows).step_by(stretch) {
        let bytes = source.rows(start..tensor.rows.min(start + stretch));
        if was == now {
            out.write_all(&bytes).map_err(io)?;
        } else {
            let mut weights = vec![0f32; bytes.len() / tensor.row_bytes() * tensor.cols];
            let mut blocks = vec![0; bytes_of(weights.len())];
            // Pieces of whole rows, so that there are whole blocks of either type.
            let piece = (4096 / tensor.cols).max(1) * tensor.cols;
            let from = piece / was.block_len() * was.block_bytes();
            let sums = (weights.par_chunks_mut(piece), blocks.par_chunks_mut(bytes_of(piece)))
                .into_par_iter()
                .zip(bytes.par_chunks(from))
                .map(|((weights, blocks), bytes)| {
                    was.dequantize(bytes, weights);
                    now.quantize(weights, blocks);
                    let mut back = vec![0f32; weights.len()];
                    now.dequantize(blocks, &mut back);
                    let square = |x: f32| f64::from(x) * f64::from(x);
                    let error = weights.iter().zip(&back).map(|(x, y)| square(x - y)).sum::<f64>();
                    (error, weights.iter().map(|&x| square(x)).sum::<f64>())
                })
                .reduce(|| (0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
            check(tensor, now, &weights)?;
            entry.squared_error += sums.0;
            entry.squares += sums.1;
            out.write_all(&blocks).map_err(io)?;
        }
        if let Cow::Borrowed(bytes) = bytes {
            release(bytes);
        }
        proceed(entry, bytes.len())?;
    }
    Ok(())
}

/// Refuses weights that a type cannot hold: the scales of blocks are f16.
fn check(tensor: &Tensor<'_>, now: BlockType, weights: &[f32]) -> Result<()> {
    let most = match now {
        BlockType::F32 | BlockType::BF16 => f32::MAX,
        _ => half::f16::MAX.to_f32(),
    };
    let Some(x) = weights.iter().find(|x| x.is_nan() || x.abs() > most) else {
        return Ok(());
    };
    let what = match x.is_finite() {
        true => format!("has the weight {x}, too large for {now}; BF16 would hold it"),
        false => format!("has a weight that is not a finite number ({x})"),
    };
    Err(Error::format(tensor.file, format!("tensor `{}` {what}", tensor.name)))
}
