//! Checkpoint folders in Hugging Face's form, made of random weights.

use std::path::Path;

use mtad::gguf::{Gguf, Writer};
use mtad::quant::BlockType;
use serde_json::{Map, Value, json};

pub const WIDTH: usize = 64;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD: usize = 16;
pub const FFN: usize = 96;

/// A tensor of a checkpoint.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    /// What safetensors calls the type.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A model of the Llama family with two layers.
#[derive(Clone)]
pub struct Checkpoint {
    pub config: Value,
    pub tensors: Vec<Stored>,
}

impl Checkpoint {
    /// One in F32. `biases`: queries, keys and values have them, as in Qwen2.
    fn new(vocab: usize, config: Value, biases: bool) -> Self {
        let mut state = 11u64;
        let mut noise = |n: usize, scale: f32| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            (0..n).map(|_| scale * next()).collect()
        };
        let (q, kv) = (HEADS * HEAD, KV_HEADS * HEAD);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, WIDTH])];
        for i in 0..LAYERS {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{i}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[WIDTH]);
            for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{name}_proj.weight"), &[rows, WIDTH]);
                if biases {
                    add(&format!("self_attn.{name}_proj.bias"), &[rows]);
                }
            }
            add("self_attn.o_proj.weight", &[WIDTH, q]);
            add("post_attention_layernorm.weight", &[WIDTH]);
            add("mlp.gate_proj.weight", &[FFN, WIDTH]);
            add("mlp.up_proj.weight", &[FFN, WIDTH]);
            add("mlp.down_proj.weight", &[WIDTH, FFN]);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![WIDTH]));
        shapes.push(("lm_head.weight".to_owned(), vec![vocab, WIDTH]));
        let tensors = shapes
            .into_iter()
            .map(|(name, shape)| {
                let scale = if shape.len() == 1 { 1.5 } else { 0.3 };
                let values = noise(shape.iter().product(), scale);
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                Stored { name, dtype: "F32", shape, bytes }
            })
            .collect();
        let mut all = json!({
            "hidden_size": WIDTH,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": vocab,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": false,
        });
        merge(&mut all, config);
        Checkpoint { config: all, tensors }
    }

    pub fn llama(vocab: usize) -> Self {
        let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
        Self::new(vocab, config, false)
    }

    pub fn qwen2(vocab: usize) -> Self {
        let config = json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"});
        Self::new(vocab, config, true)
    }

    /// Changes `config.json`; null takes a key away.
    pub fn with(mut self, changes: Value) -> Self {
        merge(&mut self.config, changes);
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        assert_eq!(tensor.dtype, "F32");
        tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The same in F16 or BF16.
    pub fn in_16_bits(&self, dtype: &'static str) -> Self {
        let mut other = self.clone();
        for tensor in &mut other.tensors {
            let bits = |x: f32| match dtype {
                "F16" => half::f16::from_f32(x).to_bits(),
                _ => half::bf16::from_f32(x).to_bits(),
            };
            let floats = self.floats(&tensor.name);
            tensor.bytes = floats.into_iter().flat_map(|x| bits(x).to_le_bytes()).collect();
            tensor.dtype = dtype;
        }
        other
    }

    /// Writes `config.json` and `model.safetensors`.
    pub fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(folder.join("model.safetensors"), safetensors(&self.tensors)).unwrap();
    }

    /// Writes `config.json` and three files of weights with their index.
    pub fn write_shards(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let mut places = Map::new();
        let share = self.tensors.len().div_ceil(3);
        for (i, tensors) in self.tensors.chunks(share).enumerate() {
            let name = format!("model-{:05}-of-00003.safetensors", i + 1);
            std::fs::write(folder.join(&name), safetensors(tensors)).unwrap();
            for tensor in tensors {
                places.insert(tensor.name.clone(), name.clone().into());
            }
        }
        let index = json!({"metadata": {}, "weight_map": places}).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    }

    /// A Llama's weights in F32 as GGUF has them: by other names, and with the rows of queries and
    /// keys in the order of rotary pairs that are neighbours.
    pub fn as_gguf(&self) -> Gguf {
        let mut writer = Writer::new();
        writer
            .set("general.architecture", "llama")
            .set("llama.context_length", 256u32)
            .set("llama.embedding_length", WIDTH as u32)
            .set("llama.block_count", LAYERS as u32)
            .set("llama.feed_forward_length", FFN as u32)
            .set("llama.attention.head_count", HEADS as u32)
            .set("llama.attention.head_count_kv", KV_HEADS as u32)
            .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
            .set("llama.rope.freq_base", 5000.0f32);
        for tensor in &self.tensors {
            let name = gguf_name(&tensor.name);
            let mut floats = self.floats(&tensor.name);
            if name.contains("attn_q") || name.contains("attn_k") {
                let row = |i: usize| floats[i * WIDTH..][..WIDTH].to_vec();
                let mut rows = Vec::new();
                for head in 0..tensor.shape[0] / HEAD {
                    for pair in 0..HEAD / 2 {
                        rows.extend(row(head * HEAD + pair));
                        rows.extend(row(head * HEAD + HEAD / 2 + pair));
                    }
                }
                floats = rows;
            }
            let dims: Vec<u64> = tensor.shape.iter().rev().map(|&n| n as u64).collect();
            let bytes = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.tensor(&name, &dims, BlockType::F32, bytes);
        }
        super::gguf(&writer)
    }
}

/// What GGUF calls a tensor of the Llama family.
fn gguf_name(name: &str) -> String {
    let name = name.trim_start_matches("model.");
    let (layer, part) = match name.strip_prefix("layers.") {
        Some(rest) => rest.split_once('.').map(|(i, part)| (format!("blk.{i}."), part)).unwrap(),
        None => (String::new(), name),
    };
    let (part, kind) = part.rsplit_once('.').unwrap();
    let part = match part {
        "embed_tokens" => "token_embd",
        "norm" => "output_norm",
        "lm_head" => "output",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("{layer}{part}.{kind}")
}

fn merge(into: &mut Value, changes: Value) {
    let Value::Object(changes) = changes else { panic!("{changes} is no object") };
    for (key, value) in changes {
        match value {
            Value::Null => _ = into.as_object_mut().unwrap().remove(&key),
            value => into[key] = value,
        }
    }
}

/// A safetensors file: the length of a JSON header, the header, the tensors' bytes.
pub fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for tensor in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()],
        });
        header.insert(tensor.name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}
