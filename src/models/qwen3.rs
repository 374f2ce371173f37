//! Qwen3 and its mixture of experts (Yang et al. 2025): Qwen2 without biases, with norms of each head.

use super::{Assembler, Decoder};
use crate::error::Result;
use crate::graph::{BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// As [`Decoder::assemble`].
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    Decoder { head_norms: true, ..Decoder::with(RotaryPairs::Halves) }.assemble(m)
}
