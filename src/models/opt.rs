//! OPT: LayerNorm with biases, learned positions, ReLU (Zhang et al. 2022, arXiv 2205.01068).
//!
//! Norms stand before what they feed, or, in the model of 350M parameters, after it; there the
//! embedding is also narrower than the layers, with a projection on either side. Key and tensor names
//! are those of `docs/convert.md`.

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
    let word_width = keys.optional("word_embedding_length")?.unwrap_or(width);
    let heads = keys.required("attention.head_count")?;
    let layers = keys.required("block_count")?;
    let ffn_width = keys.required("feed_forward_length")?;
    let head_dim = head_dim(&keys, width, heads)?;
    let before = keys.flag("norm_before", true)?;
    let epsilon = keys.positive("attention.layer_norm_epsilon", 1e-5)?;
    let positions = keys.required("context_length")?;

    let kv = KvShape { heads, head_dim };
    let attention = Attention::scaled(1.0 / (head_dim as f32).sqrt());
    let mut x = m.embed(word_width, 1.0)?;
    if word_width != width {
        [x] = m.linear(x, [("token_embd_proj", width)])?;
    }
    m.add_positions("position_embd.weight", positions, x)?;
    for i in 0..layers {
        let layer = m.begin_layer(i, kv);
        let normed = if before { m.layer_norm(x, "attn_norm", epsilon)? } else { x };
        let qkv = m.linear(normed, [("attn_q", width), ("attn_k", width), ("attn_v", width)])?;
        let attended = m.attend(qkv, None, layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;
        if !before {
            x = m.layer_norm(x, "attn_norm", epsilon)?;
        }

        let normed = if before { m.layer_norm(x, "ffn_norm", epsilon)? } else { x };
        let up = m.activated(normed, ffn_width, Activation::Relu)?;
        m.linear_add(up, "ffn_down", x)?;
        if !before {
            x = m.layer_norm(x, "ffn_norm", epsilon)?;
        }
    }
    let mut last = m.end_layers(x);
    // Models with norms after their parts end in one already; some others were stored without.
    if m.has("output_norm.weight") {
        last = m.layer_norm(last, "output_norm", epsilon)?;
    }
    if word_width != width {
        [last] = m.linear(last, [("output_proj", word_width)])?;
    }
    m.logits(last)
}
