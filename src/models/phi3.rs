//! Phi-3 (Abdin et al. 2024): Llama with one matrix for queries, keys and values and one for gates and what they gate;
//! rotations of long contexts are stretched pair by pair (LongRoPE; Ding et al. 2024, arXiv 2402.13753).

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, BufferId, Gating, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Halves)?;
    let Config { width, ffn_width, epsilon, layers, .. } = config;
    let attention = config.attention();
    let x = m.embed(width, 1.0)?;
    let pairs = config.rotary.dims / 2;
    let (short, long) = (
        m.floats("rope_factors_short.weight", pairs)?,
        m.floats("rope_factors_long.weight", pairs)?,
    );
    let original = m.keys().optional("rope.scaling.original_context_length")?;
    let is_long = original.is_some_and(|original| config.context > original);
    let factors = if is_long { long } else { short };
    let rotary = m.rotary(config.rotary.table(factors.as_deref()));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let normed = m.rms_norm(x, "attn_norm", epsilon)?;
        let qkv = m.linear_parts(normed, "attn_qkv", config.qkv().map(|(_, outputs)| outputs))?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;

        let normed = m.rms_norm(x, "ffn_norm", epsilon)?;
        let [gate, up] = m.linear_parts(normed, "ffn_up", [ffn_width, ffn_width])?;
        m.graph().gate(Gating::Activated(Activation::Silu), gate, up)?;
        m.linear_add(gate, "ffn_down", x)?;
    }
    let last = m.end_layers(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
