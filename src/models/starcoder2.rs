//! StarCoder2 (Lozhkov et al. 2024): LayerNorm and biases everywhere, rotary grouped-query attention, GELU by tanh.

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
        let normed = m.layer_norm(x, "attn_norm", epsilon)?;
        let qkv = m.linear(normed, config.qkv())?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;

        let normed = m.layer_norm(x, "ffn_norm", epsilon)?;
        let up = m.activated(normed, ffn_width, Activation::GeluTanh)?;
        m.linear_add(up, "ffn_down", x)?;
    }
    let last = m.end_layers(x);
    let normed = m.layer_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
