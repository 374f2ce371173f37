//! GLM-4: norms before and after attention and feed-forward part, biases of queries, keys and values, half of a head
//! rotated, and one matrix for gates and what they gate.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, BufferId, Gating, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Interleaved)?;
    let Config { width, ffn_width, epsilon, layers, .. } = config;
    let attention = config.attention();
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let normed = m.rms_norm(x, "attn_norm", epsilon)?;
        let qkv = m.linear(normed, config.qkv())?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        m.linear_add_normed(attended, "attn_output", "post_attention_norm", epsilon, x)?;

        let normed = m.rms_norm(x, "ffn_norm", epsilon)?;
        let [gate, up] = m.linear_parts(normed, "ffn_up", [ffn_width, ffn_width])?;
        m.graph().gate(Gating::Activated(Activation::Silu), gate, up)?;
        m.linear_add_normed(gate, "ffn_down", "post_ffw_norm", epsilon, x)?;
    }
    let last = m.end_layers(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
