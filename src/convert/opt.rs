//! OPT (Zhang et al. 2022). GGUF has no names for it; those used here are in `docs/convert.md`.

use super::Shape;
use super::json::Object;
use super::plan::Plan;
use crate::error::Result;
use crate::gguf::store::Order;

/// Rows of a checkpoint's table of positions that no position uses: they begin behind the
/// padding token's.
const POSITION_OFFSET: u64 = 2;

/// The epsilon of OPT's layer norms, which `config.json` does not state.
const EPSILON: f32 = 1e-5;

/// Describes the model of `config` in `plan` and takes its tensors.
pub(super) fn describe(config: &Object, plan: &mut Plan<'_>) -> Result<Shape> {
    if config.str("activation_function")?.is_some_and(|act| act != "relu") {
        return Err(config.unsupported("activation_function", "`relu` is converted"));
    }
    for key in ["enable_bias", "layer_norm_elementwise_affine"] {
        if config.bool(key)? == Some(false) {
            return Err(config.unsupported(key, "models that have it are converted"));
        }
    }
    let width = config.need_size("hidden_size")?;
    let ffn_width = config.need_size("ffn_dim")?;
    let layers = config.need_size("num_hidden_layers")?;
    let heads = config.need_size("num_attention_heads")?;
    let vocab_size = config.need_size("vocab_size")?;
    let context = config.need_size("max_position_embeddings")?;
    let word_width = config.size("word_embed_proj_dim")?.unwrap_or(width);
    let norm_before = config.bool("do_layer_norm_before")?.unwrap_or(true);
    if !width.is_multiple_of(heads) {
        return Err(config.wrong("hidden_size", "a multiple of num_attention_heads"));
    }

    plan.set_size("context_length", context);
    plan.set_size("embedding_length", width);
    plan.set_size("block_count", layers);
    plan.set_size("feed_forward_length", ffn_width);
    plan.set_size("attention.head_count", heads);
    plan.set("attention.layer_norm_epsilon", EPSILON);
    plan.set("norm_before", norm_before);
    if word_width != width {
        plan.set_size("word_embedding_length", word_width);
    }
    plan.set_size("vocab_size", vocab_size);

    let same = Order::Same;
    plan.matrix("token_embd.weight", "embed_tokens.weight", [vocab_size, word_width], same)?;
    let positions = "embed_positions.weight";
    plan.matrix_behind("position_embd.weight", positions, [context, width], POSITION_OFFSET)?;
    if word_width != width {
        plan.matrix("token_embd_proj.weight", "project_in.weight", [width, word_width], same)?;
        plan.matrix("output_proj.weight", "project_out.weight", [word_width, width], same)?;
    }
    let norm = |plan: &mut Plan<'_>, to: &str, from: &str| {
        plan.vector(&format!("{to}.weight"), &format!("{from}.weight"), width, same)?;
        plan.vector(&format!("{to}.bias"), &format!("{from}.bias"), width, same)
    };
    for i in 0..layers {
        let name = |to: &str, from: &str| (format!("blk.{i}.{to}"), format!("layers.{i}.{from}"));
        let linear = |plan: &mut Plan<'_>, to: &str, from: &str, shape: [u64; 2]| {
            let (to, from) = name(to, from);
            plan.matrix(&format!("{to}.weight"), &format!("{from}.weight"), shape, same)?;
            plan.vector(&format!("{to}.bias"), &format!("{from}.bias"), shape[0], same)
        };
        let (to, from) = name("attn_norm", "self_attn_layer_norm");
        norm(plan, &to, &from)?;
        linear(plan, "attn_q", "self_attn.q_proj", [width, width])?;
        linear(plan, "attn_k", "self_attn.k_proj", [width, width])?;
        linear(plan, "attn_v", "self_attn.v_proj", [width, width])?;
        linear(plan, "attn_output", "self_attn.out_proj", [width, width])?;
        let (to, from) = name("ffn_norm", "final_layer_norm");
        norm(plan, &to, &from)?;
        linear(plan, "ffn_up", "fc1", [ffn_width, width])?;
        linear(plan, "ffn_down", "fc2", [width, ffn_width])?;
    }
    if norm_before && config.bool("_remove_final_layer_norm")? != Some(true) {
        norm(plan, "output_norm", "final_layer_norm")?;
    }
    let tied = config.bool("tie_word_embeddings")?.unwrap_or(true);
    match tied {
        true => plan.skip("lm_head.weight"),
        false => plan.matrix("output.weight", "lm_head.weight", [vocab_size, word_width], same)?,
    }
    Ok(Shape { layers, group: 1, tied, vocab_size })
}
