//! GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): LayerNorm, a part of each head rotated, one matrix
//! for queries, keys and values, GELU, and a feed-forward part beside attention or behind it.

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
    let Config { width, ffn_width, head_dim, epsilon, layers, .. } = config;
    let attention = Attention::scaled(1.0 / (head_dim as f32).sqrt());
    let beside = m.keys().flag("use_parallel_residual", true)?;
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let normed = m.layer_norm(x, "attn_norm", epsilon)?;
        let qkv = m.linear_parts(normed, "attn_qkv", [width; 3])?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        let ffn = |m: &mut Assembler<'_>| {
            let normed = m.layer_norm(x, "ffn_norm", epsilon)?;
            m.activated(normed, ffn_width, Activation::Gelu)
        };
        // (What stands beside attention reads the residual stream before attention is added to it.)
        let up = if beside { Some(ffn(m)?) } else { None };
        m.linear_add(attended, "attn_output", x)?;
        let up = match up {
            Some(up) => up,
            None => ffn(m)?,
        };
        m.linear_add(up, "ffn_down", x)?;
    }
    let last = m.end_layers(x);
    let normed = m.layer_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
