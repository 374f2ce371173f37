//! OPT: LayerNorm with biases, learned positions, ReLU (Zhang et al. 2022, arXiv 2205.01068).
//!
//! Norms stand before what they feed, or, in the model of 350M parameters, after it; there the
//! embedding is also narrower than the layers, with a projection on either side. Key and tensor names
//! are those of `docs/convert.md`.

use std::sync::Arc;

use super::config::{Hyperparameters, head_dim};
use super::session::{Architecture, Shape};
use super::weights::{Ends, Loader};
use crate::backend::{Backend, CacheShape, CacheType, Pass, RotaryPairs};
use crate::error::Result;
use crate::gguf::Gguf;

/// What an OPT model is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width of the embedding.
    pub word_width: usize,
    /// Width inside the feed-forward part.
    pub ffn_width: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Whether norms stand before attention and feed-forward part, or after them.
    pub norm_before: bool,
    /// Epsilon of LayerNorm.
    pub epsilon: f32,
    /// Learned positions.
    pub context: usize,
}

impl Config {
    /// Reads the hyperparameters of an `opt` file.
    ///
    /// # Errors
    /// [`crate::Error::Format`] for missing or impossible values.
    pub fn read(keys: &Hyperparameters<'_>) -> Result<Self> {
        let width = keys.required("embedding_length")?;
        let heads = keys.required("attention.head_count")?;
        Ok(Config {
            layers: keys.required("block_count")?,
            width,
            word_width: keys.optional("word_embedding_length")?.unwrap_or(width),
            ffn_width: keys.required("feed_forward_length")?,
            heads,
            head_dim: head_dim(keys, width, heads)?,
            norm_before: keys.flag("norm_before", true)?,
            epsilon: keys.positive("attention.layer_norm_epsilon", 1e-5)?,
            context: keys.required("context_length")?,
        })
    }
}

/// A model's weights on a backend.
pub struct Opt<B: Backend> {
    config: Config,
    shape: Shape,
    embedding: B::Embedding,
    positions: B::Embedding,
    project_in: Option<B::Matrix>,
    layers: Vec<Layer<B>>,
    norm: Option<Norm<B>>,
    project_out: Option<B::Matrix>,
    output: B::Matrix,
}

struct Norm<B: Backend> {
    weight: B::Vector,
    bias: B::Vector,
}

impl<B: Backend> Norm<B> {
    fn load(loader: &mut Loader<'_, B>, name: &str, width: usize) -> Result<Self> {
        let mut vector = |part: &str| loader.vector(&format!("{name}.{part}"), width);
        Ok(Norm { weight: vector("weight")?, bias: vector("bias")? })
    }

    fn apply(&self, pass: &mut B::Pass<'_>, epsilon: f32, x: &B::Buffer, out: &mut B::Buffer) {
        pass.layer_norm(x, &self.weight, &self.bias, epsilon, out);
    }

    /// Normalizes `x` itself, by way of `spare`.
    fn replace(
        &self,
        pass: &mut B::Pass<'_>,
        epsilon: f32,
        x: &mut B::Buffer,
        spare: &mut B::Buffer,
    ) {
        self.apply(pass, epsilon, x, spare);
        std::mem::swap(x, spare);
    }
}

struct Layer<B: Backend> {
    attention_norm: Norm<B>,
    q: B::Matrix,
    k: B::Matrix,
    v: B::Matrix,
    o: B::Matrix,
    ffn_norm: Norm<B>,
    up: B::Matrix,
    down: B::Matrix,
}

impl<B: Backend> Opt<B> {
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
        let mut w = Loader::new(file, config.word_width, backend, loaded)?;
        let Config { width, word_width, ffn_width, heads, head_dim, .. } = config;
        let positions = w.weights().take("position_embd.weight", config.context, width)?;
        let positions = backend.embedding(&positions)?;
        let project = |w: &mut Loader<'_, B>, name: &str, rows, cols| match rows == cols {
            true => Ok(None),
            false => w.matrix(name, rows, cols).map(Some),
        };
        let project_in = project(&mut w, "token_embd_proj", width, word_width)?;
        let mut layers = Vec::new();
        for i in 0..config.layers {
            let name = |part: &str| format!("blk.{i}.{part}");
            let (q, k, v) = (name("attn_q"), name("attn_k"), name("attn_v"));
            let [q, k, v] = w.matrices([(&q, width), (&k, width), (&v, width)], width)?;
            layers.push(Layer {
                attention_norm: Norm::load(&mut w, &name("attn_norm"), width)?,
                q,
                k,
                v,
                o: w.matrix(&name("attn_output"), width, width)?,
                ffn_norm: Norm::load(&mut w, &name("ffn_norm"), width)?,
                up: w.matrix(&name("ffn_up"), ffn_width, width)?,
                down: w.matrix(&name("ffn_down"), width, ffn_width)?,
            });
        }
        // Models with norms after their parts end in one already; some others were stored without.
        let has_norm = file.tensor("output_norm.weight").is_some();
        let norm = match has_norm {
            true => Some(Norm::load(&mut w, "output_norm", width)?),
            false => None,
        };
        let project_out = project(&mut w, "output_proj", word_width, width)?;
        let Ends { embedding, output, vocab_size, macs, weight_bytes } = w.ends()?;
        let shape = Shape {
            vocab_size,
            context: config.context,
            position_limit: Some(config.context),
            macs,
            weight_bytes,
            rotary_frequencies: Vec::new(),
            rotary_magnitude: 1.0,
            cache: CacheShape {
                layers: config.layers,
                kv_heads: heads,
                head_dim,
                cache_type: CacheType::F16,
            },
        };
        Ok(Opt {
            config,
            shape,
            embedding,
            positions,
            project_in,
            layers,
            norm,
            project_out,
            output,
        })
    }
}

/// The activations of one evaluation.
pub struct Activations<B: Backend> {
    /// Rows as wide as the embedding.
    word: B::Buffer,
    /// The residual stream.
    x: B::Buffer,
    normed: B::Buffer,
    q: B::Buffer,
    k: B::Buffer,
    v: B::Buffer,
    attended: B::Buffer,
    up: B::Buffer,
    /// The rows whose logits are wanted.
    last: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> Architecture<B> for Opt<B> {
    type Activations = Activations<B>;

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn activations(&self, backend: &B) -> Activations<B> {
        let Config { width, word_width, ffn_width, .. } = self.config;
        let buffer = |width| backend.buffer(width);
        Activations {
            word: buffer(word_width),
            x: buffer(width),
            normed: buffer(width),
            q: buffer(width),
            k: buffer(width),
            v: buffer(width),
            attended: buffer(width),
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
        let Config { norm_before: before, epsilon, .. } = self.config;
        match &self.project_in {
            None => pass.embed(&self.embedding, &mut a.x),
            Some(project) => {
                pass.embed(&self.embedding, &mut a.word);
                pass.linear(&a.word, &mut [(project, &mut a.x)]);
            }
        }
        pass.add_positions(&self.positions, &mut a.x);
        for (i, layer) in self.layers.iter().enumerate() {
            if before {
                layer.attention_norm.apply(pass, epsilon, &a.x, &mut a.normed);
            }
            let x = if before { &a.normed } else { &a.x };
            pass.linear(x, &mut [(&layer.q, &mut a.q), (&layer.k, &mut a.k), (&layer.v, &mut a.v)]);
            // (There are no rotations, so this only stores.)
            pass.rotate_and_store(&mut a.q, &mut a.k, &a.v, RotaryPairs::Halves, cache, i);
            pass.attend(&a.q, cache, i, None, &mut a.attended);
            pass.linear_add(&a.attended, &layer.o, &mut a.x);

            if before {
                layer.ffn_norm.apply(pass, epsilon, &a.x, &mut a.normed);
            } else {
                layer.attention_norm.replace(pass, epsilon, &mut a.x, &mut a.normed);
            }
            let x = if before { &a.normed } else { &a.x };
            pass.linear(x, &mut [(&layer.up, &mut a.up)]);
            pass.relu(&mut a.up);
            pass.linear_add(&a.up, &layer.down, &mut a.x);
            if !before {
                layer.ffn_norm.replace(pass, epsilon, &mut a.x, &mut a.normed);
            }
        }
        if wanted.is_empty() {
            return;
        }
        pass.gather(&a.x, wanted, &mut a.last);
        if let Some(norm) = &self.norm {
            norm.replace(pass, epsilon, &mut a.last, &mut a.normed);
        }
        match &self.project_out {
            None => pass.linear(&a.last, &mut [(&self.output, &mut a.logits)]),
            Some(project) => {
                pass.linear(&a.last, &mut [(project, &mut a.word)]);
                pass.linear(&a.word, &mut [(&self.output, &mut a.logits)]);
            }
        }
    }

    fn logits<'a>(&self, activations: &'a Activations<B>) -> &'a B::Buffer {
        &activations.logits
    }
}
