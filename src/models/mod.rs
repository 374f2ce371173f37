//! Families of models: each file turns the metadata and tensors of a GGUF file into a [`Program`].
//!
//! A family reads its hyperparameters ([`config`]), and then writes its forward pass down once, operation by
//! operation, with an [`Assembler`], which takes tensors by name as they are used. Nothing here knows of
//! hardware.

mod assembler;
pub mod config;
mod llama;
mod opt;
mod rotary;
mod tensors;

use std::sync::Arc;

use crate::error::Result;
use crate::gguf::Gguf;
use crate::graph::{BufferId, Program};
pub use assembler::Assembler;
use config::Hyperparameters;

/// Writes a family's forward pass down; returns the buffer of the logits.
type Family = fn(&mut Assembler<'_>) -> Result<BufferId>;

/// The architectures that are run, by their names in `general.architecture`.
const FAMILIES: &[(&str, Family)] =
    &[("llama", llama::assemble), ("qwen2", llama::assemble), ("opt", opt::assemble)];

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
