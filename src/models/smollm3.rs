//! SmolLM3: Llama, of which every fourth layer rotates nothing (NoPE; Yang et al. 2025, arXiv 2501.18795).

use super::{Assembler, Decoder};
use crate::error::Result;
use crate::graph::{BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// As [`Decoder::assemble`].
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let rotates = |layer| (layer + 1) % 4 != 0;
    Decoder { rotates, ..Decoder::with(RotaryPairs::Interleaved) }.assemble(m)
}
