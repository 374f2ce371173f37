//! Checkpoints of Hugging Face's form as GGUF files: a folder with `config.json`, weights in
//! safetensors and a tokenizer in, one file out.
//!
//! Weights stay in their mapped files and go through one stretch of rows at a time, so that a
//! model need not fit into memory. Whatever would change a model's arithmetic and is not known
//! here is refused by name. `docs/convert.md` says what is read and what is written.

mod checkpoint;
mod json;
mod llama;
mod opt;
mod plan;
mod rope;
mod tokenizer;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::gguf::Writer;
use crate::gguf::store::{self, QUANTIZATION_VERSION};
use crate::quant::{BlockType, Chosen, ModelFacts, Recipe};

use checkpoint::Checkpoint;
use json::Object;
use llama::Member;
use plan::{Plan, Planned, sixteen_bits};

pub use crate::gguf::store::{Progress, Stored};

/// What the figures of a model's shape have to say beyond its own tensors.
struct Shape {
    layers: u64,
    /// Query heads that share a key/value head.
    group: u64,
    /// Whether the output is the token embedding.
    tied: bool,
    /// Rows of the token embedding.
    vocab_size: u64,
}

/// An architecture of checkpoints.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Llama(Member),
    Opt,
}

/// (what `config.json` calls it, its `model_type`, what GGUF calls it, kind)
const ARCHITECTURES: [(&str, &str, &str, Kind); 4] = [
    ("LlamaForCausalLM", "llama", "llama", Kind::Llama(Member::Llama)),
    ("MistralForCausalLM", "mistral", "llama", Kind::Llama(Member::Mistral)),
    ("Qwen2ForCausalLM", "qwen2", "qwen2", Kind::Llama(Member::Qwen2)),
    ("OPTForCausalLM", "opt", "opt", Kind::Opt),
];

/// What was converted.
#[derive(Debug)]
pub struct Converted {
    /// GGUF's name of the architecture.
    pub architecture: &'static str,
    /// The types that weights are stored in.
    pub recipe: Recipe,
    /// The tensors of the new file, but for those that were made for it.
    pub stored: Vec<Stored>,
    /// Bytes of the checkpoint's weights.
    pub input_bytes: u64,
    /// GGUF's name of the tokenizer (`llama` or `gpt2`) and its tokens; `None` if the folder has
    /// none.
    pub tokenizer: Option<(&'static str, usize)>,
    /// What a person should know, in sentences.
    pub notes: Vec<String>,
}

/// Writes the checkpoint in `folder` to `out`, its weights stored as `recipe` says, or else in the
/// 16 bits that most of them have (BF16 or F16; F16 for checkpoints in F32).
///
/// Vectors are always F32; matrices whose rows are no whole blocks of a type are stored in
/// another, as [`crate::gguf::quantize`] does it.
///
/// # Errors
/// The folder lacks a file, or one does not hold together; the model is of a kind that is not
/// converted; a weight that is rounded is no number or does not fit its new type; `out` is one of
/// the folder's files or cannot be written;
/// [`Error::Cancelled`]. Then `out` is as it was.
pub fn convert(
    folder: &Path,
    out: &Path,
    recipe: Option<Recipe>,
    progress: Progress<'_>,
) -> Result<Converted> {
    let config = open(folder)?;
    let (_, _, architecture, kind) = architecture(&config)?;
    if config.get("quantization_config").is_some() {
        let what = "weights that were quantized for another program are not converted; begin with \
                    the model in F32, F16 or BF16";
        return Err(config.unsupported("quantization_config", what));
    }
    let checkpoint = Checkpoint::open(folder)?;
    let prefixes: &[&str] = match kind {
        Kind::Llama(_) => &["model.", ""],
        Kind::Opt => &["model.decoder.", "decoder.", ""],
    };
    let mut plan = Plan::new(&checkpoint, architecture, prefixes);
    let shape = match kind {
        Kind::Llama(member) => llama::describe(member, &config, &mut plan)?,
        Kind::Opt => opt::describe(&config, &mut plan)?,
    };
    let (metadata, tensors) = plan.finish()?;

    let generation = Object::read(&folder.join("generation_config.json"))?;
    let model = tokenizer::Model {
        architecture,
        vocab_size: shape.vocab_size,
        config: &config,
        generation: generation.as_ref(),
    };
    let tokenizer = tokenizer::read(folder, &model)?;
    let notes = match &tokenizer {
        Some(tokenizer) => tokenizer.notes.clone(),
        None => vec![format!(
            "{} has no tokenizer (tokenizer.model, tokenizer.json, or vocab.json with merges.txt): \
             the file will do for token ids (`mtad logits`), not for text",
            folder.display()
        )],
    };

    let main = checkpoint.main_type();
    let recipe = recipe.unwrap_or_else(|| Recipe::of_type(sixteen_bits(main)));
    let mut writer = Writer::new();
    writer.set("general.architecture", architecture);
    writer.set("general.type", "model");
    writer.set("general.name", name(folder));
    writer.set("general.file_type", recipe.file_type());
    writer.set("general.quantization_version", QUANTIZATION_VERSION);
    for (key, value) in metadata {
        writer.set(&key, value);
    }
    let tokens = tokenizer.as_ref().map(|tokenizer| (tokenizer.model, tokenizer.tokens));
    for (key, value) in tokenizer.into_iter().flat_map(|tokenizer| tokenizer.metadata) {
        writer.set(&key, value);
    }

    let facts = ModelFacts { layers: shape.layers, group: shape.group, tied: shape.tied };
    let (mut stored, mut sources) = (Vec::new(), Vec::new());
    for tensor in &tensors {
        match tensor {
            Planned::Made { name, values } => {
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.tensor(name, &[values.len() as u64], BlockType::F32, bytes);
            }
            Planned::Taken { name, dims, source } => {
                let chosen = choose(recipe, name, dims, main, &facts);
                let elements = dims.iter().product();
                stored.push(Stored::new(name, elements, source.tensor.block_type, chosen));
                writer.plan(name, dims, chosen.used);
                sources.push(*source);
            }
        }
    }
    let files = files(folder)?;
    let inputs = files.iter().map(PathBuf::as_path).chain(checkpoint.paths());
    let out = OutputFile::create(out, inputs)?;
    let release = |bytes: &[u8]| checkpoint.release(bytes);
    store::write(out, &writer, &mut stored, &sources, &release, progress)?;
    let input_bytes = checkpoint.len();
    Ok(Converted { architecture, recipe, stored, input_bytes, tokenizer: tokens, notes })
}

/// The folder's `config.json`.
fn open(folder: &Path) -> Result<Object> {
    let name = folder.display().to_string();
    let meta = std::fs::metadata(folder).map_err(|error| Error::io(&name, error))?;
    if !meta.is_dir() {
        return Err(Error::format(
            name,
            "is no folder; one with config.json and model.safetensors is needed",
        ));
    }
    Object::read(&folder.join("config.json"))?.ok_or_else(|| {
        let what = "has no config.json; a checkpoint in Hugging Face's form has one beside its \
                    weights";
        Error::format(name, what)
    })
}

/// The entry of [`ARCHITECTURES`] that the config names.
fn architecture(config: &Object) -> Result<(&'static str, &'static str, &'static str, Kind)> {
    const KEY: &str = "architectures";
    let converted = || {
        let names = ARCHITECTURES.map(|(name, ..)| format!("`{name}`"));
        format!("{} are converted", names.join(", "))
    };
    let names = config.array(KEY)?.unwrap_or_default();
    let [name] = names else {
        return Err(config.wrong(KEY, &format!("a list of one name ({})", converted())));
    };
    let found = ARCHITECTURES.iter().find(|(known, ..)| name == known);
    let found = found.ok_or_else(|| config.unsupported(KEY, &converted()))?;
    match config.str("model_type")? {
        Some(model_type) if model_type != found.1 => {
            let what = format!("`{}` goes with {}", found.1, found.0);
            Err(config.unsupported("model_type", &what))
        }
        _ => Ok(*found),
    }
}

/// The type of one tensor.
fn choose(recipe: Recipe, name: &str, dims: &[u64], main: BlockType, facts: &ModelFacts) -> Chosen {
    let of = |block_type| Chosen { wanted: block_type, used: block_type };
    match dims {
        [_] => of(BlockType::F32),
        [cols, ..] if Recipe::applies_to(name, dims.len()) => recipe.choose(name, *cols, facts),
        // A table of positions: too small to be worth rounding.
        _ if recipe.base().is_float() => of(recipe.base()),
        _ => of(sixteen_bits(main)),
    }
}

/// The folder's files, none of which the new one may replace: but for GGUF files, all belong to
/// the checkpoint.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |error| Error::io(folder.display().to_string(), error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_none_or(|extension| extension != "gguf") {
            files.push(path);
        }
    }
    Ok(files)
}

/// The model's name: its folder's.
fn name(folder: &Path) -> String {
    let whole = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
