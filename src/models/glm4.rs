//! GLM-4: norms before and after attention and feed-forward part, biases of queries, keys and values, half of a head
//! rotated, and one matrix for gates and what they gate.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, Attention, BufferId, Gating, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Interleaved)?;
    let Config { width, ffn_width, heads, head_dim, epsilon, window, layers, .. } = config;
    let (q_width, kv_width) = (heads * head_dim, config.kv().width());
    let attention = Attention { window, ..Attention::scaled(1.0 / (head_dim as f32).sqrt()) };
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let normed = m.rms_norm(x, "attn_norm", epsilon)?;
        let widths = [("attn_q", q_width), ("attn_k", kv_width), ("attn_v", kv_width)];
        let qkv = m.linear(normed, widths)?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        let [made] = m.linear(attended, [("attn_output", width)])?;
        let normed = m.rms_norm(made, "post_attention_norm", epsilon)?;
        m.graph().add(x, normed, 1.0)?;

        let normed = m.rms_norm(x, "ffn_norm", epsilon)?;
        let [gate, up] = m.linear_parts(normed, "ffn_up", [ffn_width, ffn_width])?;
        m.graph().gate(Gating::Activated(Activation::Silu), gate, up)?;
        let [made] = m.linear(gate, [("ffn_down", width)])?;
        let normed = m.rms_norm(made, "post_ffw_norm", epsilon)?;
        m.graph().add(x, normed, 1.0)?;
    }
    m.end_layers();
    let last = m.select_rows(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
