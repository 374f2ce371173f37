//! Granite and its mixture of experts: Llama with factors for embedding, residual stream, attention and logits.

use super::{Assembler, Decoder};
use crate::error::Result;
use crate::graph::{BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// Factors that are not positive; as [`Decoder::assemble`].
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let keys = m.keys();
    let decoder = Decoder {
        embedding_scale: keys.positive("embedding_scale", 1.0)?,
        residual_scale: keys.positive("residual_scale", 1.0)?,
        attention_scale: keys.optional_positive("attention.scale")?,
        logit_scale: 1.0 / keys.positive("logit_scale", 1.0)?,
        ..Decoder::with(RotaryPairs::Interleaved)
    };
    decoder.assemble(m)
}
