//! The decoder that many families share: RMSNorm before each part, rotary grouped-query attention, and a gated
//! feed-forward part, dense or of experts. A family says where it differs.

use super::Assembler;
use super::config::Config;
use crate::error::Result;
use crate::graph::{Activation, BufferId, Gating, RotaryId, RotaryPairs, Routing};

/// Where a family differs from Llama.
pub struct Decoder {
    /// Which elements of a head are rotated together.
    pub pairs: RotaryPairs,
    /// Whether queries and keys are normed head by head before they are rotated.
    pub head_norms: bool,
    /// Whether a layer rotates queries and keys.
    pub rotates: fn(usize) -> bool,
    /// Multiplies the embedding.
    pub embedding_scale: f32,
    /// Multiplies what attention and feed-forward part add to the residual stream.
    pub residual_scale: f32,
    /// Multiplies scores of attention; `None` for 1 / sqrt(head_dim).
    pub attention_scale: Option<f32>,
    /// Multiplies logits.
    pub logit_scale: f32,
    /// How experts are chosen, of files that have some.
    pub routing: Routing,
}

impl Decoder {
    /// Llama's (Touvron et al. 2023), with rotated pairs of its own.
    pub fn with(pairs: RotaryPairs) -> Self {
        Decoder {
            pairs,
            head_norms: false,
            rotates: |_| true,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            attention_scale: None,
            logit_scale: 1.0,
            routing: Routing::SoftmaxNormalized,
        }
    }

    /// Writes the forward pass down.
    ///
    /// # Errors
    /// What [`Config::read`] and the [`Assembler`] report.
    pub fn assemble(&self, m: &mut Assembler<'_>) -> Result<BufferId> {
        let config = Config::read(&m.keys(), self.pairs)?;
        let x = m.embed(config.width, self.embedding_scale)?;
        let factors = m.floats("rope_freqs.weight", config.rotary.dims / 2)?;
        let rotary = m.rotary(config.rotary.table(factors.as_deref()));
        for i in 0..config.layers {
            let layer = m.begin_layer(i, config.kv());
            let normed = m.rms_norm(x, "attn_norm", config.epsilon)?;
            let rotary = (self.rotates)(i).then_some(rotary);
            let attended = self.attend(m, &config, normed, rotary, layer)?;
            m.project_add(attended, "attn_output", x, self.residual_scale)?;

            let normed = m.rms_norm(x, "ffn_norm", config.epsilon)?;
            match config.experts {
                None => {
                    let gated = m.gated(normed, config.ffn_width, Activation::Silu)?;
                    m.project_add(gated, "ffn_down", x, self.residual_scale)?;
                }
                Some(experts) => {
                    let gating = Gating::Activated(Activation::Silu);
                    let mixed = m.experts(normed, experts, self.routing, gating)?;
                    m.graph().add(x, mixed, self.residual_scale)?;
                    if m.has("ffn_gate_inp_shexp.weight") {
                        let shared = m.shared_expert(normed, gating)?;
                        m.graph().add(x, shared, self.residual_scale)?;
                    }
                }
            }
        }
        let last = m.end_layers(x);
        let normed = m.rms_norm(last, "output_norm", config.epsilon)?;
        let logits = m.logits(normed)?;
        if self.logit_scale != 1.0 {
            m.graph().scale(logits, self.logit_scale);
        }
        Ok(logits)
    }

    fn attend(
        &self,
        m: &mut Assembler<'_>,
        config: &Config,
        x: BufferId,
        rotary: Option<RotaryId>,
        layer: usize,
    ) -> Result<BufferId> {
        let Config { head_dim, epsilon, .. } = *config;
        let [mut q, mut k, v] = m.linear(x, config.qkv())?;
        if self.head_norms {
            q = m.rms_norm_groups(q, "attn_q_norm", head_dim, epsilon)?;
            k = m.rms_norm_groups(k, "attn_k_norm", head_dim, epsilon)?;
        }
        let mut attention = config.attention();
        attention.scale = self.attention_scale.unwrap_or(attention.scale);
        m.attend([q, k, v], rotary, layer, attention)
    }
}
