//! Qwen2 (Yang et al. 2024): Llama with other rotary pairs and biases; and its mixture of experts, in which weights
//! of experts are not divided by their sum and an expert that all rows share is weighed by a gate of its own.

use super::{Assembler, Decoder};
use crate::error::Result;
use crate::graph::{BufferId, RotaryPairs, Routing};

/// Writes the forward pass down.
///
/// # Errors
/// As [`Decoder::assemble`].
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let routing = Routing::Softmax;
    Decoder { routing, ..Decoder::with(RotaryPairs::Halves) }.assemble(m)
}
