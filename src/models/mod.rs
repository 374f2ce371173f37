//! Families of models: each file turns the metadata and tensors of a GGUF file into a [`Program`].
//!
//! A family reads its hyperparameters ([`config`]), and then writes its forward pass down once, operation by
//! operation, with an [`Assembler`], which takes tensors by name as they are used. Nothing here knows of
//! hardware.

mod assembler;
mod cohere2;
pub mod config;
pub mod decoder;
mod gemma;
mod glm4;
mod gpt2;
mod gptneox;
mod gptoss;
mod granite;
mod llama;
mod olmo2;
mod opt;
mod phi3;
mod qwen2;
mod qwen3;
pub mod rotary;
mod smollm3;
mod stablelm;
mod starcoder2;
pub mod tensors;

use std::sync::Arc;

use crate::error::Result;
use crate::gguf::Gguf;
use crate::graph::{BufferId, Program};
pub use assembler::Assembler;
use config::Hyperparameters;
use decoder::Decoder;

/// Writes a family's forward pass down; returns the buffer of the logits.
type Family = fn(&mut Assembler<'_>) -> Result<BufferId>;

/// The architectures that are run, by their names in `general.architecture`.
const FAMILIES: &[(&str, Family)] = &[
    ("llama", llama::assemble),
    ("qwen2", qwen2::assemble),
    ("qwen2moe", qwen2::assemble),
    ("qwen3", qwen3::assemble),
    ("qwen3moe", qwen3::assemble),
    ("gemma", gemma::assemble),
    ("gemma2", gemma::assemble_second),
    ("gemma3", gemma::assemble_third),
    ("phi3", phi3::assemble),
    ("smollm3", smollm3::assemble),
    ("granite", granite::assemble),
    ("granitemoe", granite::assemble),
    ("olmo2", olmo2::assemble),
    ("stablelm", stablelm::assemble),
    ("gpt2", gpt2::assemble),
    ("gptneox", gptneox::assemble),
    ("starcoder2", starcoder2::assemble),
    ("cohere2", cohere2::assemble),
    ("glm4", glm4::assemble),
    ("gpt-oss", gptoss::assemble),
    ("opt", opt::assemble),
];

/// Architectures whose layers carry a state from row to row. It cannot be rolled back to a node of a tree yet, so they
/// are refused with that reason.
pub(crate) const RECURRENT: &[&str] = &[
    "mamba",
    "mamba2",
    "falcon-h1",
    "jamba",
    "rwkv6",
    "rwkv6qwen2",
    "rwkv7",
    "arwkv7",
    "plamo2",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "qwen3next",
    "qwen35",
    "qwen35moe",
    "kimi-linear",
];

/// The names of the architectures that are run.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// The forward pass of the model in a file.
///
/// # Errors
/// [`crate::Error::Unsupported`] for an architecture, or a variation of one, that is not run;
/// [`crate::Error::Format`] for metadata or tensors that are missing or do not hold together.
pub fn program(file: &Arc<Gguf>) -> Result<Program> {
    let keys = Hyperparameters::of(file)?;
    let (_, family) = FAMILIES
        .iter()
        .find(|(name, _)| *name == keys.architecture())
        .expect("only architectures of the table have hyperparameters");
    let mut assembler = Assembler::new(file, keys)?;
    let logits = family(&mut assembler)?;
    assembler.finish(logits)
}
