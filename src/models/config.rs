//! Hyperparameters, read from GGUF metadata and checked.

use super::rotary::Rotary;
use crate::error::{Error, Result};
use crate::gguf::{Array, Gguf, Value};
use crate::graph::{Attention, KvShape, RotaryPairs};

/// Larger values than this in any dimension mean damaged metadata. Tensors are checked against
/// these figures, and tensors fit the file, so memory stays in proportion to it.
const MAX_DIM: u64 = 1 << 24;

/// The metadata of a file under its architecture's name.
#[derive(Debug, Clone, Copy)]
pub struct Hyperparameters<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl<'a> Hyperparameters<'a> {
    /// Those of a file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture that is not run, by name; [`Error::Format`] if
    /// the file names none.
    pub fn of(file: &'a Gguf) -> Result<Self> {
        let architecture = file
            .get_str("general.architecture")?
            .ok_or_else(|| file.missing("general.architecture"))?;
        if super::RECURRENT.contains(&architecture) {
            let what = format!(
                "has the architecture `{architecture}`, whose state cannot be rolled back to a node of a tree of \
                 candidates yet; transformers are run"
            );
            return Err(Error::unsupported(file.name(), what));
        }
        if !super::architectures().any(|name| name == architecture) {
            let known: Vec<_> = super::architectures().map(|name| format!("`{name}`")).collect();
            let known = known.join(", ");
            let what = format!("has the architecture `{architecture}`; {known} are run");
            return Err(Error::unsupported(file.name(), what));
        }
        Ok(Hyperparameters { file, architecture })
    }

    /// GGUF's `general.architecture`.
    pub fn architecture(&self) -> &'a str {
        self.architecture
    }

    /// Whether there is such a key.
    pub fn has(&self, name: &str) -> bool {
        self.file.get(&self.key(name)).is_some()
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A size, 1 or more; of an array the number that all its entries are.
    ///
    /// # Errors
    /// [`Error::Format`] for 0, an absurd size, or something else; [`Error::Unsupported`] for an array with
    /// several.
    pub fn optional(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        let number = match self.file.get(&key) {
            Some(Value::Array(array)) => self.common(&key, &array)?,
            _ => self.file.get_u64(&key)?,
        };
        match number {
            Some(n) if n == 0 || n > MAX_DIM => Err(self
                .wrong(format!("metadata `{key}` is {n}; a number from 1 to {MAX_DIM} is needed"))),
            n => Ok(n.map(|n| n as usize)),
        }
    }

    /// The number that all entries of an array are.
    fn common(&self, key: &str, array: &Array<'_>) -> Result<Option<u64>> {
        let mut entries = array.iter().map(|entry| entry.as_u64());
        let first = entries.next().flatten();
        if first.is_none() || entries.any(|entry| entry != first) {
            return Err(self.unsupported(format!(
                "has different numbers in `{key}` for its layers, which is not run; one for all is"
            )));
        }
        Ok(first)
    }

    /// A size that must be there.
    ///
    /// # Errors
    /// As [`Hyperparameters::optional`], and if there is none.
    pub fn required(&self, name: &str) -> Result<usize> {
        self.optional(name)?.ok_or_else(|| self.file.missing(&self.key(name)))
    }

    /// A positive number.
    ///
    /// # Errors
    /// [`Error::Format`] for another.
    pub fn positive(&self, name: &str, default: f32) -> Result<f32> {
        let key = self.key(name);
        match self.file.get_f32(&key)? {
            None => Ok(default),
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            Some(x) => {
                Err(self.wrong(format!("metadata `{key}` is {x}; a positive number is needed")))
            }
        }
    }

    /// A positive number, if there is one; 0 counts as none.
    ///
    /// # Errors
    /// [`Error::Format`] for another.
    pub fn optional_positive(&self, name: &str) -> Result<Option<f32>> {
        match self.file.get_f32(&self.key(name))? {
            None => Ok(None),
            Some(0.0) => Ok(None),
            Some(_) => self.positive(name, 1.0).map(Some),
        }
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`Error::Format`] for something else.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.file.get_bool(&self.key(name))?.unwrap_or(default))
    }

    /// A word.
    ///
    /// # Errors
    /// [`Error::Format`] for something else.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.file.get_str(&self.key(name))
    }

    /// A whole number of which 0 means that there is none.
    ///
    /// # Errors
    /// [`Error::Format`] for something else.
    pub fn count(&self, name: &str) -> Result<Option<usize>> {
        let n = self.file.get_u64(&self.key(name))?;
        Ok(n.filter(|n| *n > 0).map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    /// The error of metadata that do not hold together.
    pub fn wrong(&self, what: String) -> Error {
        Error::format(self.file.name(), what)
    }

    /// The error of what is not implemented.
    pub fn unsupported(&self, what: String) -> Error {
        Error::unsupported(self.file.name(), what)
    }

    /// The error of a key that must be there and is not.
    pub fn missing(&self, name: &str) -> Error {
        self.file.missing(&self.key(name))
    }
}

/// What a decoder-only transformer with rotary attention is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
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
    /// How queries and keys are rotated.
    pub rotary: Rotary,
    /// How many positions a row attends to at most, its own included, if not to all (Mistral).
    pub window: Option<usize>,
    /// Epsilon of the norms.
    pub epsilon: f32,
    /// Positions that the model was trained for.
    pub context: usize,
    /// The experts of its feed-forward parts, if it has some.
    pub experts: Option<Mixture>,
}

/// The sizes of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mixture {
    /// Experts.
    pub count: usize,
    /// How many of them a row uses.
    pub used: usize,
    /// Width inside each.
    pub ffn_width: usize,
}

impl Config {
    /// Reads the hyperparameters of a file, whose rotations take these elements of a head together.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a variation that is not implemented; [`Error::Format`] for
    /// missing or impossible values.
    pub fn read(keys: &Hyperparameters<'_>, pairs: RotaryPairs) -> Result<Self> {
        let (width, heads) =
            (keys.required("embedding_length")?, keys.required("attention.head_count")?);
        let kv_heads = keys.optional("attention.head_count_kv")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(
                keys.wrong(format!("{heads} query heads cannot share {kv_heads} key/value heads"))
            );
        }
        let head_dim = match keys.optional("attention.key_length")? {
            Some(n) => n,
            None => head_dim(keys, width, heads)?,
        };
        let value_dim = keys.optional("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            return Err(keys.unsupported(format!(
                "has keys of {head_dim} elements and values of {value_dim}; equal lengths are run"
            )));
        }
        let context = keys.required("context_length")?;
        let ffn_width = keys.required("feed_forward_length")?;
        let [layer_norm, rms_norm] =
            ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"];
        let epsilon = if keys.has(layer_norm) { layer_norm } else { rms_norm };
        if !keys.has(epsilon) {
            return Err(keys.missing(epsilon));
        }
        Ok(Config {
            layers: keys.required("block_count")?,
            width,
            ffn_width,
            heads,
            kv_heads,
            head_dim,
            rotary: Rotary::read(keys, pairs, head_dim, context)?,
            window: keys.count("attention.sliding_window")?,
            epsilon: keys.positive(epsilon, 1e-5)?,
            context,
            experts: Mixture::read(keys, ffn_width)?,
        })
    }

    /// The matrices of queries, keys and values, each with its outputs.
    pub fn qkv(&self) -> [(&'static str, usize); 3] {
        let (q, kv) = (self.heads * self.head_dim, self.kv().width());
        [("attn_q", q), ("attn_k", kv), ("attn_v", kv)]
    }

    /// Attention with scores over sqrt(head_dim), over the file's window if it has one.
    pub fn attention(&self) -> Attention {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        Attention { window: self.window, ..Attention::scaled(scale) }
    }

    /// What each layer keeps of a row.
    pub fn kv(&self) -> KvShape {
        KvShape { heads: self.kv_heads, head_dim: self.head_dim }
    }
}

impl Mixture {
    fn read(keys: &Hyperparameters<'_>, ffn_width: usize) -> Result<Option<Self>> {
        if keys.count("expert_count")?.is_none() {
            return Ok(None);
        }
        let (count, used) = (keys.required("expert_count")?, keys.required("expert_used_count")?);
        if used > count {
            return Err(keys.wrong(format!("uses {used} of {count} experts")));
        }
        let ffn_width = keys.optional("expert_feed_forward_length")?.unwrap_or(ffn_width);
        Ok(Some(Mixture { count, used, ffn_width }))
    }
}

/// Elements of a head where the width is divided among heads.
///
/// # Errors
/// It does not divide.
pub fn head_dim(keys: &Hyperparameters<'_>, width: usize, heads: usize) -> Result<usize> {
    if !width.is_multiple_of(heads) {
        return Err(keys.wrong(format!("a width of {width} does not divide into {heads} heads")));
    }
    Ok(width / heads)
}
