//! A model's hyperparameters, read from GGUF metadata and checked.

use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// What a decoder-only transformer of the Llama family is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// GGUF's `general.architecture`.
    pub architecture: String,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width inside the feed-forward part.
    pub ffn_width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated; even.
    pub rotary_dims: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Positions are divided by this ("linear" scaling); 1 for none.
    pub rope_scale: f32,
    /// Epsilon of RMSNorm.
    pub epsilon: f32,
    /// Positions that the model was trained for.
    pub context: usize,
}

/// Larger values than this in any dimension mean damaged metadata. Tensors are checked against
/// these figures, and tensors fit the file, so memory stays in proportion to it.
const MAX_DIM: u64 = 1 << 24;

impl Config {
    /// Reads the hyperparameters of a `llama` file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another architecture or a variation that is not implemented;
    /// [`Error::Format`] for missing or impossible values.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let architecture = file
            .get_str("general.architecture")?
            .ok_or_else(|| file.missing("general.architecture"))?;
        if architecture != "llama" {
            return Err(Error::unsupported(
                file.name(),
                format!("has the architecture `{architecture}`; `llama` is run"),
            ));
        }
        let key = |name: &str| format!("{architecture}.{name}");
        let optional = |name: &str| -> Result<Option<usize>> {
            let key = key(name);
            match file.get_u64(&key)? {
                Some(n) if n == 0 || n > MAX_DIM => Err(Error::format(
                    file.name(),
                    format!("metadata `{key}` is {n}; a number from 1 to {MAX_DIM} is needed"),
                )),
                n => Ok(n.map(|n| n as usize)),
            }
        };
        let required = |name: &str| optional(name)?.ok_or_else(|| file.missing(&key(name)));
        let positive = |name: &str, default: f32| -> Result<f32> {
            let key = key(name);
            match file.get_f32(&key)? {
                None => Ok(default),
                Some(x) if x.is_finite() && x > 0.0 => Ok(x),
                Some(x) => Err(Error::format(
                    file.name(),
                    format!("metadata `{key}` is {x}; a positive number is needed"),
                )),
            }
        };
        let wrong = |what: String| Err(Error::format(file.name(), what));

        if file.get_u64(&key("expert_count"))?.is_some_and(|n| n > 0) {
            return Err(Error::unsupported(
                file.name(),
                "is a mixture of experts, which is not run; dense models are",
            ));
        }
        let (width, heads) = (required("embedding_length")?, required("attention.head_count")?);
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return wrong(format!("{heads} query heads cannot share {kv_heads} key/value heads"));
        }
        let head_dim = match optional("attention.key_length")? {
            Some(n) => n,
            None if width % heads == 0 => width / heads,
            None => return wrong(format!("a width of {width} does not divide into {heads} heads")),
        };
        let value_dim = optional("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            return Err(Error::unsupported(
                file.name(),
                format!(
                    "has keys of {head_dim} elements and values of {value_dim}; equal lengths are run"
                ),
            ));
        }
        let rotary_dims = optional("rope.dimension_count")?.unwrap_or(head_dim);
        if rotary_dims > head_dim || rotary_dims % 2 != 0 {
            return wrong(format!("cannot rotate {rotary_dims} elements of heads of {head_dim}"));
        }
        let scaling = file.get_str(&key("rope.scaling.type"))?;
        let rope_scale = match scaling {
            None => positive("rope.scale_linear", 1.0)?,
            Some("none") => 1.0,
            Some("linear") => positive("rope.scaling.factor", 1.0)?,
            Some(other) => {
                return Err(Error::unsupported(
                    file.name(),
                    format!(
                        "scales rotary positions by `{other}`; `none`, `linear` and Llama-3's factors are run"
                    ),
                ));
            }
        };
        let epsilon_key = "attention.layer_norm_rms_epsilon";
        if file.get(&key(epsilon_key)).is_none() {
            return Err(file.missing(&key(epsilon_key)));
        }
        Ok(Config {
            architecture: architecture.to_owned(),
            layers: required("block_count")?,
            width,
            ffn_width: required("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            rotary_dims,
            rope_base: positive("rope.freq_base", 10_000.0)?,
            rope_scale,
            epsilon: positive(epsilon_key, 1e-5)?,
            context: required("context_length")?,
        })
    }
}
