//! The Llama family: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al. 2023).

use std::sync::Arc;

use super::config::Config;
use super::session::{Architecture, Shape};
use super::weights::Weights;
use crate::backend::{Backend, CacheShape, CacheType, Pass, RotaryPairs};
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
    /// What [`Config::from_gguf`], [`Weights`] and the backend report.
    pub fn load(
        file: &Arc<Gguf>,
        backend: &B,
        loaded: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let config = Config::from_gguf(file)?;
        let mut weights = Weights::new(file);
        let Config { width, ffn_width, heads, kv_heads, head_dim, .. } = config;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let (mut macs, mut weight_bytes) = (0, 0);

        let vocab_size = file.tensor("token_embd.weight").map_or(0, |t| t.rows);
        let table = weights.take("token_embd.weight", vocab_size, width)?;
        // Without an output matrix of its own the model reuses its embedding.
        let output = weights.find("output.weight", vocab_size, width)?;
        let factors = weights.find("rope_freqs.weight", 1, config.rotary_dims / 2)?;

        let vector = |weights: &mut Weights, name: String, len: usize| {
            let tensor = weights.take(&name, 1, len)?;
            backend.vector(&tensor)
        };
        let mut matrix = |weights: &mut Weights, name: String, rows: usize, cols: usize| {
            let tensor = weights.take(&format!("{name}.weight"), rows, cols)?;
            let bias = weights.find(&format!("{name}.bias"), 1, rows)?;
            let matrix = backend.matrix(&tensor, bias.as_ref())?;
            macs += rows * cols;
            weight_bytes += tensor.view().bytes.len();
            loaded(tensor.view().bytes.len() as u64)?;
            Ok(matrix)
        };
        let mut layers = Vec::new();
        for i in 0..config.layers {
            let w = &mut weights;
            let name = |part: &str| format!("blk.{i}.{part}");
            layers.push(Layer {
                attention_norm: vector(w, name("attn_norm.weight"), width)?,
                q: matrix(w, name("attn_q"), q_width, width)?,
                k: matrix(w, name("attn_k"), kv_width, width)?,
                v: matrix(w, name("attn_v"), kv_width, width)?,
                o: matrix(w, name("attn_output"), width, q_width)?,
                ffn_norm: vector(w, name("ffn_norm.weight"), width)?,
                gate: matrix(w, name("ffn_gate"), ffn_width, width)?,
                up: matrix(w, name("ffn_up"), ffn_width, width)?,
                down: matrix(w, name("ffn_down"), width, ffn_width)?,
            });
        }
        let norm = vector(&mut weights, "output_norm.weight".to_owned(), width)?;
        let output = output.as_ref().unwrap_or(&table);
        macs += vocab_size * width;
        weight_bytes += output.view().bytes.len();
        let output_matrix = backend.matrix(output, None)?;
        loaded(output.view().bytes.len() as u64)?;
        weights.finish()?;

        let factors = factors.map(|t| {
            let mut factors = vec![0.0; config.rotary_dims / 2];
            t.view().block_type.dequantize(t.view().bytes, &mut factors);
            factors
        });
        let shape = Shape {
            vocab_size,
            context: config.context,
            macs,
            weight_bytes,
            rotary_frequencies: rotary_frequencies(&config, factors.as_deref()),
            cache: CacheShape {
                layers: config.layers,
                kv_heads,
                head_dim,
                cache_type: CacheType::F16,
            },
        };
        let embedding = backend.embedding(&table)?;
        Ok(Llama { config, shape, embedding, layers, norm, output: output_matrix })
    }
}

/// Radians per position of each rotated pair: base^(-2i/d), divided by the linear scale and by
/// Llama-3's factor of the pair (RoPE; Su et al. 2021, section 3.2.2).
fn rotary_frequencies(config: &Config, factors: Option<&[f32]>) -> Vec<f64> {
    let dims = config.rotary_dims as f64;
    (0..config.rotary_dims / 2)
        .map(|i| {
            let frequency = f64::from(config.rope_base).powf(-2.0 * i as f64 / dims);
            frequency / f64::from(config.rope_scale) / factors.map_or(1.0, |f| f64::from(f[i]))
        })
        .collect()
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
        let epsilon = self.config.epsilon;
        pass.embed(&self.embedding, &mut a.x);
        for (i, layer) in self.layers.iter().enumerate() {
            pass.rms_norm(&a.x, &layer.attention_norm, epsilon, &mut a.normed);
            pass.linear(
                &a.normed,
                &mut [(&layer.q, &mut a.q), (&layer.k, &mut a.k), (&layer.v, &mut a.v)],
            );
            pass.rotate_and_store(&mut a.q, &mut a.k, &a.v, RotaryPairs::Interleaved, cache, i);
            pass.attend(&a.q, cache, i, &mut a.attended);
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
