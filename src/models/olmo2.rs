//! OLMo 2 (Team OLMo 2025): norms stand after attention and feed-forward part, and queries and keys are normed as
//! whole rows.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Halves)?;
    let Config { width, ffn_width, epsilon, layers, .. } = config;
    let attention = config.attention();
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let [q, k, v] = m.linear(x, config.qkv())?;
        let q = m.rms_norm(q, "attn_q_norm", epsilon)?;
        let k = m.rms_norm(k, "attn_k_norm", epsilon)?;
        let attended = m.attend([q, k, v], Some(rotary), layer, attention)?;
        m.linear_add_normed(attended, "attn_output", "post_attention_norm", epsilon, x)?;

        let gated = m.gated(x, ffn_width, Activation::Silu)?;
        m.linear_add_normed(gated, "ffn_down", "post_ffw_norm", epsilon, x)?;
    }
    let last = m.end_layers(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
