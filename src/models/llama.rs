//! Llama (Touvron et al. 2023) and what is stored under its name: Mistral, whose rows look back over a window,
//! and Mixtral, whose feed-forward parts are mixtures of experts (Jiang et al. 2024).

use super::{Assembler, Decoder};
use crate::error::Result;
use crate::graph::{BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// As [`Decoder::assemble`].
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    Decoder::with(RotaryPairs::Interleaved).assemble(m)
}
