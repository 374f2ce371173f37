//! OLMo 2 (Team OLMo 2025): norms stand after attention and feed-forward part, and queries and keys are normed as
//! whole rows.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, Attention, BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Halves)?;
    let Config { width, ffn_width, heads, head_dim, epsilon, window, layers, .. } = config;
    let (q_width, kv_width) = (heads * head_dim, config.kv().width());
    let attention = Attention { window, ..Attention::scaled(1.0 / (head_dim as f32).sqrt()) };
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let widths = [("attn_q", q_width), ("attn_k", kv_width), ("attn_v", kv_width)];
        let [q, k, v] = m.linear(x, widths)?;
        let q = m.rms_norm(q, "attn_q_norm", epsilon)?;
        let k = m.rms_norm(k, "attn_k_norm", epsilon)?;
        let attended = m.attend([q, k, v], Some(rotary), layer, attention)?;
        let [made] = m.linear(attended, [("attn_output", width)])?;
        let normed = m.rms_norm(made, "post_attention_norm", epsilon)?;
        m.graph().add(x, normed, 1.0)?;

        let gated = m.gated(x, ffn_width, Activation::Silu)?;
        let [made] = m.linear(gated, [("ffn_down", width)])?;
        let normed = m.rms_norm(made, "post_ffw_norm", epsilon)?;
        m.graph().add(x, normed, 1.0)?;
    }
    m.end_layers();
    let last = m.select_rows(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
