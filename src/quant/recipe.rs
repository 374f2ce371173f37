//! Which type each tensor of a model is stored in: the recipes that GGUF files are named after.
//!
//! A mixed recipe such as `Q4_K_M` gives more bits to tensors that need them. The choices are
//! llama.cpp's, so that a file of a name has the size and the quality that people know it by.

use std::fmt;
use std::str::FromStr;

use super::BlockType;
use crate::Error;

/// A way to store a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    name: &'static str,
    /// GGUF's number for it: `general.file_type`.
    file_type: u32,
    /// What most tensors are stored in.
    base: BlockType,
}

/// What the choice of types depends on, beside a tensor's own name and shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelFacts {
    /// Layers of the model.
    pub layers: u64,
    /// Query heads that share a key/value head.
    pub group: u64,
    /// Whether the output is the token embedding: there is no tensor `output.weight`.
    pub tied: bool,
}

/// The types of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// What the recipe wants.
    pub wanted: BlockType,
    /// What its rows are whole blocks of.
    pub used: BlockType,
}

/// (name, GGUF's number, base)
const TABLE: &[Recipe] = {
    const fn recipe(name: &'static str, file_type: u32, base: BlockType) -> Recipe {
        Recipe { name, file_type, base }
    }
    use BlockType::*;
    &[
        recipe("F32", 0, F32),
        recipe("F16", 1, F16),
        recipe("BF16", 32, BF16),
        recipe("Q8_0", 7, Q8_0),
        recipe("Q6_K", 18, Q6_K),
        recipe("Q5_K_M", 17, Q5_K),
        recipe("Q5_K_S", 16, Q5_K),
        recipe("Q5_1", 9, Q5_1),
        recipe("Q5_0", 8, Q5_0),
        recipe("Q4_K_M", 15, Q4_K),
        recipe("Q4_K_S", 14, Q4_K),
        recipe("Q4_1", 3, Q4_1),
        recipe("IQ4_NL", 25, IQ4_NL),
        recipe("Q4_0", 2, Q4_0),
        recipe("IQ4_XS", 30, IQ4_XS),
        recipe("Q3_K_L", 13, Q3_K),
        recipe("Q3_K_M", 12, Q3_K),
        recipe("Q3_K_S", 11, Q3_K),
        recipe("Q2_K", 10, Q2_K),
    ]
};

/// Names that stand for others.
const ALIASES: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let upper = text.to_ascii_uppercase();
        let name = ALIASES.iter().find(|(alias, _)| *alias == upper).map_or(&*upper, |(_, n)| n);
        Self::all().find(|recipe| recipe.name == name).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(|recipe| recipe.name).collect();
            Error::Invalid(format!(
                "there is no weight type `{text}`; there are {}",
                names.join(", ")
            ))
        })
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

impl Recipe {
    /// All recipes, from the largest files to the smallest.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().copied()
    }

    /// The recipe that stores all matrices as floating-point numbers of a type.
    ///
    /// # Panics
    /// If the type is no [`BlockType::is_float`].
    pub fn of_type(float: BlockType) -> Self {
        assert!(float.is_float(), "{float} is no type of floating-point numbers");
        let found = Self::all().find(|recipe| recipe.base == float);
        found.expect("the table has every such type")
    }

    /// Its name, such as `Q4_K_M`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// GGUF's number for it, in the metadata `general.file_type`.
    pub fn file_type(&self) -> u32 {
        self.file_type
    }

    /// What most tensors are stored in.
    pub fn base(&self) -> BlockType {
        self.base
    }

    /// Whether a tensor is a matrix of weights, which recipes are about. Norms, biases, positions
    /// and the gates of experts stay as they are.
    pub fn applies_to(name: &str, rank: usize) -> bool {
        const KEPT: [&str; 3] = ["_norm.weight", "ffn_gate_inp.weight", "position_embd.weight"];
        rank >= 2 && name.ends_with("weight") && !KEPT.iter().any(|kept| name.ends_with(kept))
    }

    /// The type of a matrix with rows of `cols` weights.
    pub fn choose(&self, name: &str, cols: u64, facts: &ModelFacts) -> Chosen {
        let wanted = self.mixed(name, facts);
        Chosen { wanted, used: fallback(wanted, cols) }
    }

    fn mixed(&self, name: &str, facts: &ModelFacts) -> BlockType {
        use BlockType::{Q3_K, Q4_K, Q5_K, Q6_K, Q8_0};
        let base = self.base;
        if base.is_float() {
            return base;
        }
        let name = name.strip_suffix(".weight").unwrap_or(name);
        let is_output = name == "output" || (facts.tied && name == "token_embd");
        if is_output {
            return if base == Q8_0 { Q8_0 } else { Q6_K };
        }
        let layers = facts.layers;
        let Some((layer, part)) = layer_of(name) else { return base };
        // The first and the last eighth, and every third between them.
        let more = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        let shared = facts.group >= 4;
        match (part, self.name) {
            ("attn_v", _) => {
                let wanted = match self.name {
                    "Q2_K" if shared => Q4_K,
                    "Q2_K" => Q3_K,
                    "Q3_K_M" if layer < 2 => Q5_K,
                    "Q3_K_M" => Q4_K,
                    "Q3_K_L" => Q5_K,
                    "IQ4_NL" | "IQ4_XS" if shared => Q5_K,
                    "Q4_K_M" | "Q5_K_M" if more => Q6_K,
                    "Q4_K_S" if layer < 4 => Q5_K,
                    _ => base,
                };
                // Llama-2 70B: its values are an eighth of its queries, so bits cost little.
                let huge = layers == 80 && facts.group > 1;
                if huge && matches!(wanted, Q3_K | Q4_K) { Q5_K } else { wanted }
            }
            ("ffn_down", "Q2_K") => Q3_K,
            ("ffn_down", "Q3_K_M") if layer < layers / 16 => Q5_K,
            ("ffn_down", "Q3_K_M") => Q4_K,
            ("ffn_down", "Q3_K_L") => Q5_K,
            ("ffn_down", "Q4_K_M" | "Q5_K_M") if more => Q6_K,
            ("ffn_down", "Q4_K_S" | "IQ4_NL" | "IQ4_XS") if layer < layers / 8 => Q5_K,
            ("attn_output", "Q2_K") => Q3_K,
            ("attn_output" | "attn_qkv", "Q3_K_M") | ("attn_qkv", "Q3_K_L") => Q4_K,
            ("attn_output", "Q3_K_L") | ("attn_qkv", "Q4_K_M") => Q5_K,
            ("attn_qkv", "Q5_K_M") => Q6_K,
            _ => base,
        }
    }
}

/// The layer and the part of `blk.3.attn_v`.
fn layer_of(name: &str) -> Option<(u64, &str)> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// What rows that are no whole blocks are stored in instead: the next type of at least as many bits
/// with blocks of 32, or else F16.
fn fallback(wanted: BlockType, cols: u64) -> BlockType {
    use BlockType::*;
    let fits = |t: &BlockType| cols.is_multiple_of(t.block_len() as u64);
    let small = match wanted {
        Q2_K | Q3_K | IQ4_XS => IQ4_NL,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        _ => Q8_0,
    };
    [wanted, small].into_iter().find(fits).unwrap_or(F16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use BlockType::*;

    fn recipe(name: &str) -> Recipe {
        name.parse().unwrap()
    }

    #[test]
    fn names_are_read_in_any_case_and_wrong_ones_refused() {
        for known in Recipe::all() {
            assert_eq!(recipe(&known.name.to_ascii_lowercase()), known);
            assert!(known.base.can_dequantize());
        }
        assert_eq!(recipe("q4_k").name(), "Q4_K_M");
        let message = "Q9".parse::<Recipe>().unwrap_err().to_string();
        assert!(message.contains("`Q9`") && message.contains("Q5_K_M"), "{message}");
    }

    #[test]
    fn mixes_give_more_bits_to_what_needs_them() {
        let facts = ModelFacts { layers: 32, group: 1, tied: false };
        let of =
            |recipe_name: &str, name: &str| recipe(recipe_name).choose(name, 4096, &facts).used;
        assert_eq!(of("Q4_K_M", "output.weight"), Q6_K);
        assert_eq!(of("Q8_0", "output.weight"), Q8_0);
        assert_eq!(of("F16", "output.weight"), F16);
        assert_eq!(of("Q4_0", "token_embd.weight"), Q4_0);
        // Of 32 layers the first 4, the last 4 and every third between them: 16.
        let more = |layer: &u64| of("Q4_K_M", &format!("blk.{layer}.ffn_down.weight")) == Q6_K;
        assert_eq!((0..32).filter(more).count(), 16);
        assert_eq!(of("Q4_K_S", "blk.3.ffn_down.weight"), Q5_K);
        assert_eq!(of("Q4_K_S", "blk.4.ffn_down.weight"), Q4_K);
        assert_eq!(of("Q2_K", "blk.9.attn_output.weight"), Q3_K);
        assert_eq!(of("Q2_K", "blk.9.attn_v.weight"), Q3_K);
        let shared = ModelFacts { group: 8, ..facts };
        assert_eq!(recipe("Q2_K").choose("blk.9.attn_v.weight", 4096, &shared).used, Q4_K);
        let tied = ModelFacts { tied: true, ..facts };
        assert_eq!(recipe("Q2_K").choose("token_embd.weight", 4096, &tied).used, Q6_K);
    }

    #[test]
    fn rows_that_are_no_whole_blocks_get_another_type() {
        let facts = ModelFacts { layers: 2, group: 1, tied: false };
        let of = |name: &str, cols| recipe(name).choose("blk.0.ffn_up.weight", cols, &facts);
        assert_eq!(of("Q4_K_M", 288), Chosen { wanted: Q4_K, used: Q5_0 });
        assert_eq!(of("Q6_K", 288).used, Q8_0);
        assert_eq!(of("IQ4_XS", 288).used, IQ4_NL);
        assert_eq!(of("Q4_0", 40), Chosen { wanted: Q4_0, used: F16 });
        assert_eq!(of("Q4_0", 288).used, Q4_0);
        assert!(Recipe::applies_to("blk.0.ffn_up.weight", 2));
        for (name, rank) in [("blk.0.ffn_norm.weight", 1), ("output.weight", 1), ("a.bias", 2)] {
            assert!(!Recipe::applies_to(name, rank), "{name}");
        }
    }
}
