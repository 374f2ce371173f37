//! The Llama family: Llama, Mistral, Qwen2.

use super::Shape;
use super::json::Object;
use super::plan::Plan;
use super::rope::rope;
use crate::error::Result;
use crate::gguf::store::Order;

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Member {
    Llama,
    Mistral,
    Qwen2,
}

/// Describes the model of `config` in `plan` and takes its tensors.
pub(super) fn describe(member: Member, config: &Object, plan: &mut Plan<'_>) -> Result<Shape> {
    if config.str("hidden_act")?.is_some_and(|act| act != "silu") {
        return Err(config.unsupported("hidden_act", "`silu` is converted"));
    }
    let width = config.need_size("hidden_size")?;
    let ffn_width = config.need_size("intermediate_size")?;
    let layers = config.need_size("num_hidden_layers")?;
    let heads = config.need_size("num_attention_heads")?;
    let vocab_size = config.need_size("vocab_size")?;
    let kv_heads = match config.size("num_key_value_heads")? {
        Some(n) => n,
        // Checkpoints from before the key have as many as heads.
        None if member == Member::Llama => heads,
        None => return Err(config.wrong("num_key_value_heads", "a whole number")),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.wrong("num_key_value_heads", "a divisor of num_attention_heads"));
    }
    let head_dim = match config.size("head_dim")? {
        Some(n) => n,
        None if width.is_multiple_of(heads) => width / heads,
        None => return Err(config.wrong("hidden_size", "a multiple of num_attention_heads")),
    };
    if !head_dim.is_multiple_of(2) {
        return Err(config.wrong("head_dim", "an even number"));
    }

    plan.set_size("context_length", config.need_size("max_position_embeddings")?);
    plan.set_size("embedding_length", width);
    plan.set_size("block_count", layers);
    plan.set_size("feed_forward_length", ffn_width);
    plan.set_size("attention.head_count", heads);
    plan.set_size("attention.head_count_kv", kv_heads);
    let epsilon = config.need_positive("rms_norm_eps")?;
    plan.set("attention.layer_norm_rms_epsilon", epsilon as f32);
    if head_dim * heads != width {
        plan.set_size("attention.key_length", head_dim);
        plan.set_size("attention.value_length", head_dim);
    }
    plan.set_size("vocab_size", vocab_size);
    if let Some(window) = sliding_window(member, config, layers)? {
        plan.set_size("attention.sliding_window", window);
    }
    rope(config, head_dim, plan)?;

    // GGUF's `llama` rotates neighbours, checkpoints rotate an element with its partner in the
    // other half of the head; `qwen2` files keep the checkpoint's order.
    let order = match member {
        Member::Qwen2 => Order::Same,
        _ => Order::Interleaved { head_dim: head_dim as usize },
    };
    let flag = |key: &str| Ok::<_, crate::Error>(config.bool(key)?.unwrap_or(false));
    let (qkv_bias, o_bias, ffn_bias) = match member {
        Member::Llama => (flag("attention_bias")?, flag("attention_bias")?, flag("mlp_bias")?),
        Member::Mistral => (false, false, false),
        Member::Qwen2 => (true, false, false),
    };
    let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    plan.matrix("token_embd.weight", "embed_tokens.weight", [vocab_size, width], Order::Same)?;
    for i in 0..layers {
        let norm = |plan: &mut Plan<'_>, to: &str, from: &str| {
            let (to, from) = (format!("blk.{i}.{to}.weight"), format!("layers.{i}.{from}.weight"));
            plan.vector(&to, &from, width, Order::Same)
        };
        let linear = |plan: &mut Plan<'_>, to: &str, from: &str, shape, bias, order| {
            let (to, from) = (format!("blk.{i}.{to}"), format!("layers.{i}.{from}"));
            plan.matrix(&format!("{to}.weight"), &format!("{from}.weight"), shape, order)?;
            match bias {
                true => {
                    plan.vector(&format!("{to}.bias"), &format!("{from}.bias"), shape[0], order)
                }
                false => Ok(()),
            }
        };
        let same = Order::Same;
        norm(plan, "attn_norm", "input_layernorm")?;
        linear(plan, "attn_q", "self_attn.q_proj", [q_width, width], qkv_bias, order)?;
        linear(plan, "attn_k", "self_attn.k_proj", [kv_width, width], qkv_bias, order)?;
        linear(plan, "attn_v", "self_attn.v_proj", [kv_width, width], qkv_bias, same)?;
        linear(plan, "attn_output", "self_attn.o_proj", [width, q_width], o_bias, same)?;
        norm(plan, "ffn_norm", "post_attention_layernorm")?;
        linear(plan, "ffn_gate", "mlp.gate_proj", [ffn_width, width], ffn_bias, same)?;
        linear(plan, "ffn_up", "mlp.up_proj", [ffn_width, width], ffn_bias, same)?;
        linear(plan, "ffn_down", "mlp.down_proj", [width, ffn_width], ffn_bias, same)?;
    }
    plan.vector("output_norm.weight", "norm.weight", width, Order::Same)?;
    let tied = flag("tie_word_embeddings")?;
    match tied {
        true => plan.skip("lm_head.weight"),
        false => {
            plan.matrix("output.weight", "lm_head.weight", [vocab_size, width], Order::Same)?;
        }
    }
    Ok(Shape { layers, group: heads / kv_heads, tied, vocab_size })
}

/// How many tokens back attention looks, if not to the first.
fn sliding_window(member: Member, config: &Object, layers: u64) -> Result<Option<u64>> {
    // What a config without the keys means to the code that it was written by.
    let window = |default| match config.has("sliding_window") {
        true => config.size("sliding_window"),
        false => Ok(Some(default)),
    };
    match member {
        Member::Llama => Ok(None),
        Member::Mistral => window(4096),
        Member::Qwen2 if config.bool("use_sliding_window")? != Some(true) => Ok(None),
        Member::Qwen2 => {
            let sliding = match config.array("layer_types")? {
                Some(types) => {
                    types.iter().filter(|&layer| layer == "sliding_attention").count() as u64
                }
                None => {
                    let first = match config.get("max_window_layers") {
                        Some(n) => n.as_u64().ok_or_else(|| {
                            config.wrong("max_window_layers", "a whole number >= 0")
                        })?,
                        None => 28,
                    };
                    layers.saturating_sub(first)
                }
            };
            match sliding {
                0 => Ok(None),
                n if n == layers => window(4096),
                n => {
                    let what = format!(
                        "{n} of {layers} layers have a window (`max_window_layers`, `layer_types`), \
                         and models where all or none have one are converted"
                    );
                    Err(config.unsupported("use_sliding_window", &what))
                }
            }
        }
    }
}
