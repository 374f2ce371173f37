//! Gemma, Gemma 2 and Gemma 3 (text): Llama with a scaled embedding and GeGLU; the later ones with norms after
//! attention and feed-forward part too, and windows in most layers. Gemma 2 caps scores and logits, Gemma 3 norms
//! queries and keys head by head and rotates layers with windows by a base of their own (Gemma Team 2024, 2025).

use super::Assembler;
use super::config::{Config, Hyperparameters};
use super::rotary::Rotary;
use crate::error::Result;
use crate::graph::{Activation, Attention, BufferId, RotaryPairs};

/// What the three have or have not.
struct Generation {
    /// Norms after attention and feed-forward part.
    post_norms: bool,
    /// Norms of heads, and a second base of rotations.
    third: bool,
    /// Of so many layers the last one has no window; 1 for no windows.
    period: usize,
}

/// Writes Gemma's forward pass down.
///
/// # Errors
/// What [`Config::read`] and the [`Assembler`] report.
pub fn assemble(m: &mut Assembler<'_>) -> Result<BufferId> {
    assemble_generation(m, &Generation { post_norms: false, third: false, period: 1 })
}

/// Writes Gemma 2's forward pass down.
///
/// # Errors
/// As [`assemble`].
pub fn assemble_second(m: &mut Assembler<'_>) -> Result<BufferId> {
    assemble_generation(m, &Generation { post_norms: true, third: false, period: 2 })
}

/// Writes Gemma 3's forward pass down.
///
/// # Errors
/// As [`assemble`].
pub fn assemble_third(m: &mut Assembler<'_>) -> Result<BufferId> {
    assemble_generation(m, &Generation { post_norms: true, third: true, period: 6 })
}

fn assemble_generation(m: &mut Assembler<'_>, generation: &Generation) -> Result<BufferId> {
    let keys = m.keys();
    let config = Config::read(&keys, RotaryPairs::Halves)?;
    let Config { width, ffn_width, head_dim, epsilon, window, layers, .. } = config;
    let attention = Attention {
        soft_cap: keys.optional_positive("attn_logit_softcapping")?,
        ..Attention::scaled(1.0 / (query_divisor(&keys, &config) as f32).sqrt())
    };
    let x = m.embed(width, (width as f32).sqrt())?;
    let global = m.rotary(config.rotary.table(None));
    let local = match generation.third {
        true => {
            let base = keys.positive("rope.freq_base_swa", 10_000.0)?;
            m.rotary(Rotary { base, ..config.rotary.unscaled() }.table(None))
        }
        false => global,
    };
    for i in 0..layers {
        let layer = m.begin_layer(i, config.kv());
        let is_local = (i + 1) % generation.period != 0;
        let normed = m.rms_norm(x, "attn_norm", epsilon)?;
        let [mut q, mut k, v] = m.linear(normed, config.qkv())?;
        if generation.third {
            q = m.rms_norm_groups(q, "attn_q_norm", head_dim, epsilon)?;
            k = m.rms_norm_groups(k, "attn_k_norm", head_dim, epsilon)?;
        }
        let rotary = if is_local { local } else { global };
        let window = window.filter(|_| is_local);
        let attended =
            m.attend([q, k, v], Some(rotary), layer, Attention { window, ..attention })?;
        add_normed(
            m,
            attended,
            "attn_output",
            x,
            generation.post_norms,
            "post_attention_norm",
            epsilon,
        )?;

        let normed = m.rms_norm(x, "ffn_norm", epsilon)?;
        let gated = m.gated(normed, ffn_width, Activation::GeluTanh)?;
        add_normed(m, gated, "ffn_down", x, generation.post_norms, "post_ffw_norm", epsilon)?;
    }
    let last = m.end_layers(x);
    let normed = m.rms_norm(last, "output_norm", epsilon)?;
    let logits = m.logits(normed)?;
    if let Some(cap) = keys.optional_positive("final_logit_softcapping")? {
        m.graph().soft_cap(logits, cap);
    }
    Ok(logits)
}

/// Adds a product to the residual stream, normed if there are norms after the parts.
fn add_normed(
    m: &mut Assembler<'_>,
    from: BufferId,
    matrix: &str,
    x: BufferId,
    post_norms: bool,
    norm: &str,
    epsilon: f32,
) -> Result<()> {
    if !post_norms {
        return m.linear_add(from, matrix, x);
    }
    m.linear_add_normed(from, matrix, norm, epsilon, x)
}

/// Queries are divided by the root of this: elements of a head, but of the largest models the width divided by the
/// heads. (The files do not say it.)
fn query_divisor(keys: &Hyperparameters<'_>, config: &Config) -> usize {
    match (keys.architecture(), config.layers) {
        ("gemma2", 46) | ("gemma3", 62) => config.width / config.heads,
        _ => config.head_dim,
    }
}
