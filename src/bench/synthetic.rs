//! Models of real shapes with random weights, so that anyone can time a 7B without a download.

use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::gguf::{OwnedValue, Writer};
use crate::quant::{BlockType, ModelFacts, Recipe};

/// The shape of a model of the Llama family.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shape {
    name: &'static str,
    width: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    ffn: u64,
}

const VOCABULARY: u64 = 32_000;

const fn shape(name: &'static str, width: u64, layers: u64, heads: [u64; 2], ffn: u64) -> Shape {
    Shape { name, width, layers, heads: heads[0], kv_heads: heads[1], ffn }
}

/// Llama-68M and -160M, TinyLlama 1.1B, Llama-3.2 3B (with the smaller vocabulary), Llama-2 7B
/// and 13B.
const SHAPES: [Shape; 6] = [
    shape("68m", 768, 2, [12, 12], 3072),
    shape("160m", 768, 12, [12, 12], 3072),
    shape("1.1b", 2048, 22, [32, 4], 5632),
    shape("3b", 3072, 28, [24, 8], 8192),
    shape("7b", 4096, 32, [32, 32], 11008),
    shape("13b", 5120, 40, [40, 40], 13824),
];

/// A shape and a way to store its weights, such as `1.1b:Q4_K_M`.
#[derive(Debug, Clone, PartialEq)]
pub struct Synthetic {
    shape: Shape,
    recipe: Recipe,
}

impl FromStr for Synthetic {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, recipe) = text.split_once(':').unwrap_or((text, "Q4_0"));
        let shape = SHAPES.iter().find(|s| s.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
            let names = SHAPES.map(|s| s.name).join(", ");
            Error::invalid(format!("there is no shape `{name}`; there are {names}"))
        })?;
        Ok(Synthetic { shape: *shape, recipe: recipe.parse()? })
    }
}

impl Synthetic {
    /// The file with everything but the bytes of its matrices.
    fn plan(&self) -> Writer {
        let Shape { name, width, layers, heads, kv_heads, ffn } = self.shape;
        let mut w = Writer::new();
        w.set("general.architecture", "llama")
            .set("general.name", format!("synthetic {name} {}", self.recipe).as_str())
            .set("llama.context_length", 4096u32)
            .set("llama.embedding_length", width as u32)
            .set("llama.block_count", layers as u32)
            .set("llama.feed_forward_length", ffn as u32)
            .set("llama.attention.head_count", heads as u32)
            .set("llama.attention.head_count_kv", kv_heads as u32)
            .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
            .set("llama.rope.dimension_count", (width / heads) as u32)
            .set("llama.vocab_size", VOCABULARY as u32);
        // A vocabulary of that size: the three special tokens, all bytes, and numbered pieces.
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let mut types = vec![2, 3, 3];
        types.extend([6; 256]);
        tokens.extend((259..VOCABULARY).map(|i| format!("▁{i}")));
        types.resize(VOCABULARY as usize, 1);
        let scores = (0..VOCABULARY).map(|i| -(i as f32)).collect();
        w.set("tokenizer.ggml.model", "llama")
            .set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens))
            .set("tokenizer.ggml.scores", OwnedValue::F32s(scores))
            .set("tokenizer.ggml.token_type", OwnedValue::I32s(types))
            .set("tokenizer.ggml.bos_token_id", 1u32)
            .set("tokenizer.ggml.eos_token_id", 2u32)
            .set("tokenizer.ggml.unknown_token_id", 0u32);

        let kv = width / heads * kv_heads;
        let facts = ModelFacts { layers, group: heads / kv_heads, tied: false };
        let mut matrix = |name: &str, rows: u64, cols: u64| {
            let block_type = self.recipe.choose(name, cols, &facts).used;
            w.plan(name, &[cols, rows], block_type);
        };
        matrix("token_embd.weight", VOCABULARY, width);
        matrix("output.weight", VOCABULARY, width);
        for i in 0..layers {
            let mut matrix = |part: &str, rows: u64, cols: u64| {
                matrix(&format!("blk.{i}.{part}.weight"), rows, cols);
            };
            matrix("attn_q", width, width);
            matrix("attn_k", kv, width);
            matrix("attn_v", kv, width);
            matrix("attn_output", width, width);
            matrix("ffn_gate", ffn, width);
            matrix("ffn_up", ffn, width);
            matrix("ffn_down", width, ffn);
        }
        let mut norm = |name: &str| {
            w.plan(name, &[width], BlockType::F32);
        };
        for i in 0..layers {
            norm(&format!("blk.{i}.attn_norm.weight"));
            norm(&format!("blk.{i}.ffn_norm.weight"));
        }
        norm("output_norm.weight");
        w
    }

    /// Writes the model as a GGUF file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut out = OutputFile::create(path, [])?;
        self.write_to(&mut out).map_err(|e| out.error(e))?;
        out.finish()
    }

    /// Writes the model to what is open.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        self.plan().write_with(out, |name, (block_type, len), out| {
            if name.ends_with("norm.weight") {
                return (0..len / 4).try_for_each(|_| out.write_all(&1f32.to_le_bytes()));
            }
            random_blocks(block_type, len, &mut noise, out)
        })
    }
}

/// A generator of bits: xorshift64 (Marsaglia 2003).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Random blocks: any bits are values, but scales are small numbers. A stretch of them is repeated,
/// because making gigabytes of noise takes longer than timing them.
fn random_blocks(t: BlockType, len: u64, noise: &mut Noise, out: &mut dyn Write) -> io::Result<()> {
    let size = t.block_bytes();
    let mut stretch = vec![0; size * 4099];
    for byte in &mut stretch {
        *byte = noise.next() as u8;
    }
    for block in stretch.chunks_exact_mut(size) {
        let unit = noise.next() as f32 / u64::MAX as f32 - 0.5;
        match t {
            BlockType::F32 => block.copy_from_slice(&(0.04 * unit).to_le_bytes()),
            BlockType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(0.04 * unit).to_le_bytes());
            }
            BlockType::F16 => {
                block.copy_from_slice(&half::f16::from_f32(0.04 * unit).to_le_bytes());
            }
            _ => {
                let scale = half::f16::from_f32(2e-4 * (1.0 + unit)).to_le_bytes();
                for &at in t.scale_offsets() {
                    block[at..at + 2].copy_from_slice(&scale);
                }
            }
        }
    }
    let mut left = len as usize;
    while left > 0 {
        let n = left.min(stretch.len());
        out.write_all(&stretch[..n])?;
        left -= n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_wrong_ones_refused() {
        let model: Synthetic = "1.1B:q4_k_m".parse().unwrap();
        assert_eq!((model.shape.layers, model.recipe.name()), (22, "Q4_K_M"));
        assert_eq!("68m".parse::<Synthetic>().unwrap().recipe.name(), "Q4_0");
        assert!("9b:Q4_0".parse::<Synthetic>().unwrap_err().to_string().contains("1.1b"));
        assert!("7b:Q9".parse::<Synthetic>().unwrap_err().to_string().contains("Q5_K_M"));
    }
}
