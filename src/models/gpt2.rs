//! GPT-2 (Radford et al. 2019): LayerNorm, learned positions, one matrix for queries, keys and values, GELU by tanh.

use super::Assembler;
use super::config::head_dim;
use crate::error::Result;
use crate::graph::{Activation, Attention, BufferId, KvShape};

/// Writes the forward pass down.
///
/// # Errors
/// [`crate::Error::Format`] for missing or impossible values; what the [`Assembler`] reports.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let keys = m.keys();
    let width = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let (layers, ffn_width) =
        (keys.required("block_count")?, keys.required("feed_forward_length")?);
    let head_dim = head_dim(&keys, width, heads)?;
    let epsilon = keys.positive("attention.layer_norm_epsilon", 1e-5)?;
    let positions = keys.required("context_length")?;
    let attention = Attention::scaled(1.0 / (head_dim as f32).sqrt());

    let x = m.embed(width, 1.0)?;
    m.add_positions("position_embd.weight", positions, x)?;
    for i in 0..layers {
        let layer = m.begin_layer(i, KvShape { heads, head_dim });
        let normed = m.layer_norm(x, "attn_norm", epsilon)?;
        let qkv = m.linear_parts(normed, "attn_qkv", [width; 3])?;
        let attended = m.attend(qkv, None, layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;

        let normed = m.layer_norm(x, "ffn_norm", epsilon)?;
        let up = m.activated(normed, ffn_width, Activation::GeluTanh)?;
        m.linear_add(up, "ffn_down", x)?;
    }
    let last = m.end_layers(x);
    let normed = m.layer_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
