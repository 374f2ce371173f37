//! Cohere's Command R7B: one LayerNorm without bias for attention and the feed-forward part beside it; of four layers
//! three have windows and rotations, the fourth neither; scaled logits.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, Attention, BufferId, RotaryPairs};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Interleaved)?;
    let Config { width, ffn_width, epsilon, window, layers, .. } = config;
    let logit_scale = m.keys().positive("logit_scale", 1.0)?;
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let is_local = i % 4 != 3;
        let normed = m.layer_norm_groups(x, "attn_norm", width, epsilon)?;
        let qkv = m.linear(normed, config.qkv())?;
        let window = window.filter(|_| is_local);
        let attention = Attention { window, ..config.attention() };
        let attended = m.attend(qkv, is_local.then_some(rotary), layer, attention)?;
        let gated = m.gated(normed, ffn_width, Activation::Silu)?;
        m.linear_add(attended, "attn_output", x)?;
        m.linear_add(gated, "ffn_down", x)?;
    }
    let last = m.end_layers(x);
    let normed = m.layer_norm_groups(last, "output_norm", width, epsilon)?;
    let logits = m.logits(normed)?;
    m.graph().scale(logits, logit_scale);
    Ok(logits)
}
