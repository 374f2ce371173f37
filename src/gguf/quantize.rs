//! Storing a model's weights in other types: a GGUF file in, a GGUF file out.

use std::path::Path;

use super::store::{self, Order, QUANTIZATION_VERSION, Source};
use super::{Gguf, OwnedValue, Writer};
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::quant::{Chosen, ModelFacts, Recipe};

pub use super::store::{Progress, Stored};

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The types to store weights in.
    pub recipe: Recipe,
    /// Whether weights that are quantized already may be read back and rounded again, which adds
    /// the errors of both.
    pub requantize: bool,
}

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
    let out = OutputFile::create(out, file.files().map(Path::new))?;
    let writer = header(file, options.recipe, &stored);
    let sources: Vec<_> =
        file.tensors().map(|tensor| Source { tensor, order: Order::Same }).collect();
    let release = |bytes: &[u8]| file.release_bytes(bytes);
    store::write(out, &writer, &mut stored, &sources, &release, progress)?;
    Ok(stored)
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
            return Err(Error::Quantized {
                file: file.name().to_owned(),
                tensor: tensor.name.to_owned(),
                found: was.to_string(),
            });
        }
        let elements = (tensor.rows * tensor.cols) as u64;
        stored.push(Stored::new(tensor.name, elements, was, chosen));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::faults;
    use crate::quant::BlockType;

    #[test]
    fn a_model_survives_every_failure() {
        let mut writer = Writer::new();
        writer.set("general.architecture", "llama");
        for i in 0..3 {
            // Larger than what is held back, so that the system is asked for each.
            let name = format!("blk.{i}.ffn_up.weight");
            writer.tensor(&name, &[1024, 600], BlockType::F32, vec![0; 4 * 1024 * 600]);
        }
        let file = Gguf::from_vec("in.gguf", writer.to_vec()).unwrap();
        let options = Options { recipe: "F16".parse().unwrap(), requantize: false };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf");
        std::fs::write(&path, "precious").unwrap();
        let requests = faults::at_every_request(
            || quantize(&file, &path, &options, &mut |_, _, _| true),
            |n| {
                assert_eq!(std::fs::read(&path).unwrap(), b"precious", "failure {n}");
                assert_eq!(folder.path().read_dir().unwrap().count(), 1, "failure {n}");
            },
        );
        assert!(requests >= 6, "{requests}");
        assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 3);
        // Stopped in the middle.
        std::fs::write(&path, "precious").unwrap();
        let stopped = quantize(&file, &path, &options, &mut |_, done, _| done == 0);
        assert!(matches!(stopped, Err(Error::Cancelled)));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }
}
