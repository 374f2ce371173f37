//! The Llama family: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al. 2023).
//!
//! Mistral is one of it whose rows look back over a window; Qwen2 one with biases and other rotary
//! pairs.

use std::sync::Arc;

use super::config::{Config, Hyperparameters};
use super::session::{Architecture, Shape};
use super::weights::{Ends, Loader};
use crate::backend::{Backend, CacheShape, CacheType, Pass};
use crate::error::Result;
use crate::gguf::Gguf;

/// A model's weights on a backend.
pub struct Llama<B: Backend> {
    config: Config,
    shape: Shape,
    embedding: B::Embedding,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    output: B::Matrix,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    q: B::Matrix,
    k: B::Matrix,
    v: B::Matrix,
    o: B::Matrix,
    ffn_norm: B::Vector,
    gate: B::Matrix,
    up: B::Matrix,
    down: B::Matrix,
}

impl<B: Backend> Llama<B> {
    /// Loads a file's weights onto a backend. `loaded` is told the bytes of each tensor done.
    ///
    /// # Errors
    /// What [`Config::read`], [`Loader`] and the backend report.
    pub fn load(
        file: &Arc<Gguf>,
        backend: &B,
        loaded: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let config = Config::read(&Hyperparameters::of(file)?)?;
        let mut w = Loader::new(file, config.width, backend, loaded)?;
        let Config { width, ffn_width, heads, kv_heads, head_dim, .. } = config;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let factors = w.weights().floats("rope_freqs.weight", config.rotary.dims / 2)?;
        let mut layers = Vec::new();
        for i in 0..config.layers {
            let name = |part: &str| format!("blk.{i}.{part}");
            let attention_norm = w.vector(&name("attn_norm.weight"), width)?;
            let (q, k, v) = (name("attn_q"), name("attn_k"), name("attn_v"));
            let (gate, up) = (name("ffn_gate"), name("ffn_up"));
            let [q, k, v] = w.matrices([(&q, q_width), (&k, kv_width), (&v, kv_width)], width)?;
            let [gate, up] = w.matrices([(&gate, ffn_width), (&up, ffn_width)], width)?;
            layers.push(Layer {
                attention_norm,
                q,
                k,
                v,
                o: w.matrix(&name("attn_output"), width, q_width)?,
                ffn_norm: w.vector(&name("ffn_norm.weight"), width)?,
                gate,
                up,
                down: w.matrix(&name("ffn_down"), width, ffn_width)?,
            });
        }
        let norm = w.vector("output_norm.weight", width)?;
        let Ends { embedding, output, vocab_size, macs, weight_bytes } = w.ends()?;
        let shape = Shape {
            vocab_size,
            context: config.context,
            position_limit: None,
            macs,
            weight_bytes,
            rotary_frequencies: config.rotary.frequencies(factors.as_deref()),
            rotary_magnitude: config.rotary.magnitude(),
            cache: CacheShape {
                layers: config.layers,
                kv_heads,
                head_dim,
                cache_type: CacheType::F16,
            },
        };
        Ok(Llama { config, shape, embedding, layers, norm, output })
    }
}

/// The activations of one evaluation.
pub struct Activations<B: Backend> {
    /// The residual stream.
    x: B::Buffer,
    normed: B::Buffer,
    q: B::Buffer,
    k: B::Buffer,
    v: B::Buffer,
    attended: B::Buffer,
    gate: B::Buffer,
    up: B::Buffer,
    /// The rows whose logits are wanted.
    last: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> Architecture<B> for Llama<B> {
    type Activations = Activations<B>;

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn activations(&self, backend: &B) -> Activations<B> {
        let Config { width, ffn_width, heads, kv_heads, head_dim, .. } = self.config;
        let buffer = |width| backend.buffer(width);
        Activations {
            x: buffer(width),
            normed: buffer(width),
            q: buffer(heads * head_dim),
            k: buffer(kv_heads * head_dim),
            v: buffer(kv_heads * head_dim),
            attended: buffer(heads * head_dim),
            gate: buffer(ffn_width),
            up: buffer(ffn_width),
            last: buffer(width),
            logits: buffer(self.shape.vocab_size),
        }
    }

    fn forward(
        &self,
        pass: &mut B::Pass<'_>,
        cache: &mut B::Cache,
        a: &mut Activations<B>,
        wanted: &[u32],
    ) {
        let Config { epsilon, window, .. } = self.config;
        let pairs = self.config.rotary.pairs;
        pass.embed(&self.embedding, &mut a.x);
        for (i, layer) in self.layers.iter().enumerate() {
            pass.rms_norm(&a.x, &layer.attention_norm, epsilon, &mut a.normed);
            pass.linear(
                &a.normed,
                &mut [(&layer.q, &mut a.q), (&layer.k, &mut a.k), (&layer.v, &mut a.v)],
            );
            pass.rotate_and_store(&mut a.q, &mut a.k, &a.v, pairs, cache, i);
            pass.attend(&a.q, cache, i, window, &mut a.attended);
            pass.linear_add(&a.attended, &layer.o, &mut a.x);

            pass.rms_norm(&a.x, &layer.ffn_norm, epsilon, &mut a.normed);
            pass.linear(&a.normed, &mut [(&layer.gate, &mut a.gate), (&layer.up, &mut a.up)]);
            pass.swiglu(&mut a.gate, &a.up);
            pass.linear_add(&a.gate, &layer.down, &mut a.x);
        }
        if !wanted.is_empty() {
            pass.gather(&a.x, wanted, &mut a.last);
            pass.rms_norm(&a.last, &self.norm, epsilon, &mut a.normed);
            pass.linear(&a.normed, &mut [(&self.output, &mut a.logits)]);
        }
    }

    fn logits<'a>(&self, activations: &'a Activations<B>) -> &'a B::Buffer {
        &activations.logits
    }
}
