//! StableLM: Llama with LayerNorm, a part of each head rotated, and, in some, norms of each head and a feed-forward
//! part beside attention instead of behind it.

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
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let normed = m.layer_norm(x, "attn_norm", epsilon)?;
        let [mut q, mut k, v] = m.linear(normed, config.qkv())?;
        if m.has("attn_q_norm.weight") {
            q = m.layer_norm_groups(q, "attn_q_norm", head_dim, epsilon)?;
            k = m.layer_norm_groups(k, "attn_k_norm", head_dim, epsilon)?;
        }
        let attended = m.attend([q, k, v], Some(rotary), layer, attention)?;
        // (What stands beside attention reads the same rows.)
        let beside = !m.has("ffn_norm.weight");
        let gated = if beside { Some(m.gated(normed, ffn_width, Activation::Silu)?) } else { None };
        m.linear_add(attended, "attn_output", x)?;
        let gated = match gated {
            Some(gated) => gated,
            None => {
                let normed = m.layer_norm(x, "ffn_norm", epsilon)?;
                m.gated(normed, ffn_width, Activation::Silu)?
            }
        };
        m.linear_add(gated, "ffn_down", x)?;
    }
    let last = m.end_layers(x);
    let normed = m.layer_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
