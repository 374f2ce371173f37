//! gpt-oss (OpenAI 2025): experts with biases and clamped gates, windows in every other layer, and a learned score in
//! each head's softmax that has no value.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Attention, BufferId, Gating, RotaryPairs, Routing};

/// Writes the forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report; a file without experts.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    let config = Config::read(&m.keys(), RotaryPairs::Halves)?;
    let Config { width, heads, epsilon, window, layers, .. } = config;
    let Some(experts) = config.experts else { return Err(m.keys().missing("expert_count")) };
    let x = m.embed(width, 1.0)?;
    let rotary = m.rotary(config.rotary.untruncated().table(None));
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let normed = m.rms_norm(x, "attn_norm", epsilon)?;
        let qkv = m.linear(normed, config.qkv())?;
        let attention = Attention {
            window: window.filter(|_| i % 2 == 0),
            sinks: Some(m.vector("attn_sinks.weight", heads)?),
            ..config.attention()
        };
        let attended = m.attend(qkv, Some(rotary), layer, attention)?;
        m.linear_add(attended, "attn_output", x)?;

        let normed = m.rms_norm(x, "post_attention_norm", epsilon)?;
        let gating = Gating::Clamped { alpha: 1.702, limit: 7.0 };
        let mixed = m.experts(normed, experts, Routing::SoftmaxOfChosen, gating)?;
        m.graph().add(x, mixed, 1.0)?;
    }
    let last = m.end_layers(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    m.logits(normed)
}
