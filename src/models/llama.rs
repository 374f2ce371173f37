//! The Llama family: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al. 2023).
//!
//! Mistral is one of it whose rows look back over a window; Qwen2 one with biases and other rotary
//! pairs.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, Attention, BufferId, KvShape};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let Config {
        layers, width, ffn_width, heads, kv_heads, head_dim, rotary, window, epsilon, ..
    } = Config::read(&m.keys())?;
    let kv = KvShape { heads: kv_heads, head_dim };
    let scale = 1.0 / (head_dim as f32).sqrt();
    let attention = Attention { scale, window, soft_cap: None, sinks: None };
    let x = m.embed(width, 1.0)?;
    let factors = m.floats("rope_freqs.weight", rotary.dims / 2)?;
    let rotary = m.rotary(rotary.table(factors.as_deref()));
    for i in 0..layers {
        let layer = m.begin_layer(i, kv);
        let normed = m.rms_norm(x, "attn_norm", epsilon)?;
        let widths = [("attn_q", heads * head_dim), ("attn_k", kv.width()), ("attn_v", kv.width())];
        let qkv = m.linear(normed, widths)?;
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;

        let normed = m.rms_norm(x, "ffn_norm", epsilon)?;
        m.gated_ffn(normed, ffn_width, Activation::Silu, x)?;
    }
    m.end_layers();
    let last = m.select_rows(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
