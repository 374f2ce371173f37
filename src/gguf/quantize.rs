//! Storing a model's weights in other types: a GGUF file in, a GGUF file out.
//!
//! Tensors are read, rounded and written one stretch of rows after the other, so that a model need
//! not fit into memory. The new file is written beside its place and moved there when it is
//! whole: what was there before is either untouched or replaced.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Gguf, OwnedValue, Tensor, Writer};
use crate::error::{Error, Result};
use crate::quant::{BlockType, Chosen, ModelFacts, Recipe};

/// Weights that are held as `f32` at a time.
const STRETCH: usize = 1 << 22;

/// What llama.cpp calls the layout of blocks in use today.
const QUANTIZATION_VERSION: u32 = 2;

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The types to store weights in.
    pub recipe: Recipe,
    /// Whether weights that are quantized already may be read back and rounded again, which adds
    /// the errors of both.
    pub requantize: bool,
}

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

/// Told of each tensor before it is written, and of bytes done and bytes in all while it is.
/// Returning false stops.
pub type Progress<'a> = &'a mut dyn FnMut(&Stored, u64, u64) -> bool;

/// Writes `file` to `out` with its weights stored in other types.
///
/// Metadata are copied; `general.file_type` and `general.quantization_version` say what the new
/// file is. Norms, biases and all else that is no matrix of weights stay as they are.
///
/// # Errors
/// `out` is the file itself or cannot be written; a tensor's type cannot be read, or is quantized
/// and [`Options::requantize`] is not set; a weight is no number or does not fit its new type;
/// [`Error::Cancelled`]. Then `out` is as it was.
pub fn quantize(
    file: &Gguf,
    out: &Path,
    options: &Options,
    progress: Progress<'_>,
) -> Result<Vec<Stored>> {
    let mut stored = plan(file, options)?;
    let part = Part::beside(file, out)?;
    let writer = header(file, options.recipe, &stored);
    let total: u64 = file.tensors().map(|t| t.bytes.len() as u64).sum();
    let mut done = 0;
    let mut failure = None;
    let mut target = BufWriter::with_capacity(1 << 20, part.create()?);
    let mut index = 0;
    let written = writer.write_with(&mut target, |name, _, to| {
        let entry = &mut stored[index];
        index += 1;
        let tensor = file.tensor(name).ok_or_else(|| io::Error::other("no such tensor"))?;
        let result = store(&tensor, entry, to, &mut |entry, bytes| {
            done += bytes;
            progress(entry, done, total)
        });
        file.release(&tensor);
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
    let written =
        written.and_then(|()| target.into_inner().map_err(io::IntoInnerError::into_error));
    let written = written.and_then(|file| file.sync_all());
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, Err(source)) => Err(Error::io(out.display().to_string(), source)),
        (None, Ok(())) => part.publish().map(|()| stored),
    }
}

/// The types of all tensors, in the file's order.
fn plan(file: &Gguf, options: &Options) -> Result<Vec<Stored>> {
    let facts = facts(file)?;
    let mut stored = Vec::new();
    for (tensor, dims) in file.tensors().zip(file.dims()) {
        let was = tensor.block_type;
        let chosen = match Recipe::applies_to(tensor.name, dims.len()) {
            true => options.recipe.choose(tensor.name, tensor.cols as u64, &facts),
            false => Chosen { wanted: was, used: was },
        };
        let now = chosen.used;
        if now != was && !was.can_dequantize() {
            let what = format!("tensor `{}` is {was}, which cannot be read", tensor.name);
            return Err(Error::unsupported(file.name(), what));
        }
        if now != was && !was.is_float() && !options.requantize {
            return Err(Error::invalid(format!(
                "{}: tensor `{}` is {was}, quantized already; begin with an F16 or F32 file, or say \
                 --requantize to add one rounding to the other",
                file.name(),
                tensor.name
            )));
        }
        let elements = (tensor.rows * tensor.cols) as u64;
        stored.push(Stored {
            name: tensor.name.to_owned(),
            elements,
            was,
            wanted: chosen.wanted,
            now,
            bytes: elements / now.block_len() as u64 * now.block_bytes() as u64,
            squared_error: 0.0,
            squares: 0.0,
        });
    }
    Ok(stored)
}

fn facts(file: &Gguf) -> Result<ModelFacts> {
    let architecture = file.get_str("general.architecture")?.unwrap_or_default();
    // Heads may be listed layer by layer; recipes ask for the first's.
    let count = |key: &str| {
        let value = file.get(&format!("{architecture}.{key}"));
        value.and_then(|v| v.as_u64().or_else(|| v.as_array()?.iter().next()?.as_u64()))
    };
    let heads = count("attention.head_count").unwrap_or(1);
    let shared = count("attention.head_count_kv").unwrap_or(heads).max(1);
    Ok(ModelFacts {
        layers: count("block_count").unwrap_or(0),
        group: heads / shared,
        tied: file.tensor("output.weight").is_none(),
    })
}

fn header(file: &Gguf, recipe: Recipe, stored: &[Stored]) -> Writer {
    let mut writer = Writer::new();
    for (key, value) in file.metadata() {
        // The writer has its own alignment: the default, which needs no entry. What it writes is
        // one file.
        if key != "general.alignment" && !key.starts_with("split.") {
            writer.set(key, OwnedValue::from(value));
        }
    }
    writer.set("general.quantization_version", QUANTIZATION_VERSION);
    writer.set("general.file_type", recipe.file_type());
    for (entry, dims) in stored.iter().zip(file.dims()) {
        writer.plan(&entry.name, dims, entry.now);
    }
    writer
}

/// Writes one tensor.
fn store(
    tensor: &Tensor<'_>,
    entry: &mut Stored,
    out: &mut dyn Write,
    step: &mut dyn FnMut(&Stored, u64) -> bool,
) -> Result<()> {
    let (was, now) = (entry.was, entry.now);
    let io = |e| Error::io(tensor.file, e);
    let mut proceed = |entry: &Stored, bytes: usize| match step(entry, bytes as u64) {
        true => Ok(()),
        false => Err(Error::Cancelled),
    };
    proceed(entry, 0)?;
    if was == now {
        out.write_all(tensor.bytes).map_err(io)?;
        return proceed(entry, tensor.bytes.len());
    }
    let rows = (STRETCH / tensor.cols).max(1);
    let stretch = rows * tensor.row_bytes();
    let bytes_of = |weights: usize| weights / now.block_len() * now.block_bytes();
    for bytes in tensor.bytes.chunks(stretch) {
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

/// A file that is not whole yet, removed unless it is published.
struct Part {
    path: PathBuf,
    place: PathBuf,
    published: bool,
}

impl Part {
    fn beside(file: &Gguf, out: &Path) -> Result<Self> {
        let same = |a: &Path, b: &Path| match (fs::canonicalize(a), fs::canonicalize(b)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        };
        if same(file.name().as_ref(), out) {
            let name = file.name();
            return Err(Error::invalid(format!("{name} is the input; name another output file")));
        }
        let Some(name) = out.file_name().filter(|_| !out.is_dir()) else {
            let out = out.display();
            return Err(Error::invalid(format!("{out} is no name for a file to write")));
        };
        let mut part = name.to_owned();
        part.push(format!(".{}.part", std::process::id()));
        Ok(Part { path: out.with_file_name(part), place: out.to_owned(), published: false })
    }

    fn io(&self, error: io::Error) -> Error {
        Error::io(self.place.display().to_string(), error)
    }

    fn create(&self) -> Result<File> {
        File::create_new(&self.path).map_err(|e| self.io(e))
    }

    fn publish(mut self) -> Result<()> {
        fs::rename(&self.path, &self.place).map_err(|e| self.io(e))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.published {
            // It may never have been there.
            let _ = fs::remove_file(&self.path);
        }
    }
}
