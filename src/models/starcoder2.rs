//! StarCoder2 (Lozhkov et al. 2024): LayerNorm and biases everywhere, rotary grouped-query attention, GELU by tanh.

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
        let normed = m.layer_norm(x, "attn_norm", epsilon)?;
        let widths = [("attn_q", q_width), ("attn_k", kv_width), ("attn_v", kv_width)];
        let qkv = m.linear(normed, widths)?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;

        let normed = m.layer_norm(x, "ffn_norm", epsilon)?;
        let [up] = m.linear(normed, [("ffn_up", ffn_width)])?;
        m.graph().activate(Activation::GeluTanh, up);
        m.linear_add(up, "ffn_down", x)?;
    }
    m.end_layers();
    let last = m.select_rows(x);
    let normed = m.layer_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
