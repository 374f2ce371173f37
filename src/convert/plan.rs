//! The new file as it takes shape: metadata, and tensors taken out of a checkpoint by name and shape.

use std::collections::HashSet;

use super::checkpoint::{Checkpoint, View, block_type};
use crate::error::{Error, Result};
use crate::gguf::store::{Order, Source};
use crate::gguf::{OwnedValue, Tensor};
use crate::quant::BlockType;

/// One tensor of the new file.
pub(super) enum Planned<'a> {
    /// Out of the checkpoint.
    Taken {
        name: String,
        /// In GGUF's order: the rows' length first.
        dims: Vec<u64>,
        source: Source<'a>,
    },
    /// Made here: F32 elements of a vector.
    Made { name: String, values: Vec<f32> },
}

/// What the new file holds: metadata, and tensors in their order.
pub(super) type Contents<'a> = (Vec<(String, OwnedValue)>, Vec<Planned<'a>>);

/// The new file as it is put together.
pub(super) struct Plan<'a> {
    checkpoint: &'a Checkpoint,
    architecture: &'static str,
    metadata: Vec<(String, OwnedValue)>,
    tensors: Vec<Planned<'a>>,
    taken: HashSet<String>,
    /// What names of tensors may begin with.
    prefixes: &'static [&'static str],
}

impl<'a> Plan<'a> {
    /// Nothing yet. `prefixes` are what the names of tensors may begin with, the usual one first.
    pub fn new(
        checkpoint: &'a Checkpoint,
        architecture: &'static str,
        prefixes: &'static [&'static str],
    ) -> Self {
        Plan {
            checkpoint,
            architecture,
            metadata: Vec::new(),
            tensors: Vec::new(),
            taken: HashSet::new(),
            prefixes,
        }
    }

    /// Adds metadata under `{architecture}.{key}`.
    pub fn set(&mut self, key: &str, value: impl Into<OwnedValue>) {
        self.metadata.push((format!("{}.{key}", self.architecture), value.into()));
    }

    /// The same for a size. (All are checked to fit where they are read.)
    pub fn set_size(&mut self, key: &str, value: u64) {
        self.set(key, value as u32);
    }

    /// Takes a matrix: `from` without its prefix, as `to`.
    pub fn matrix(&mut self, to: &str, from: &str, shape: [u64; 2], order: Order) -> Result<()> {
        self.take(to, from, &shape, order, 0)
    }

    /// Takes a matrix without its first `skipped` rows, which `shape` does not count.
    pub fn matrix_behind(
        &mut self,
        to: &str,
        from: &str,
        shape: [u64; 2],
        skipped: u64,
    ) -> Result<()> {
        self.take(to, from, &shape, Order::Same, skipped)
    }

    /// Takes a vector.
    pub fn vector(&mut self, to: &str, from: &str, len: u64, order: Order) -> Result<()> {
        self.take(to, from, &[len], order, 0)
    }

    /// Adds a vector that the checkpoint does not hold.
    pub fn made(&mut self, name: &str, values: Vec<f32>) {
        self.tensors.push(Planned::Made { name: name.to_owned(), values });
    }

    /// Leaves out a tensor that says nothing of its own, if it is there.
    pub fn skip(&mut self, from: &str) {
        while let Some((name, _)) = self.find(from) {
            self.taken.insert(name);
        }
    }

    /// The tensor under its full name, if it is there and not taken yet.
    fn find(&self, from: &str) -> Option<(String, View<'a>)> {
        let names = self.prefixes.iter().map(|prefix| format!("{prefix}{from}"));
        names
            .filter(|name| !self.taken.contains(name))
            .find_map(|name| Some((name.clone(), self.checkpoint.get(&name)?)))
    }

    fn take(
        &mut self,
        to: &str,
        from: &str,
        shape: &[u64],
        order: Order,
        skipped: u64,
    ) -> Result<()> {
        let stored: Vec<u64> = [&[shape[0] + skipped], &shape[1..]].concat();
        let Some((name, view)) = self.find(from) else {
            // The head of the logits stands beside the model, not in it.
            let prefix = if from.starts_with("lm_head.") { "" } else { self.prefixes[0] };
            let asked = dimensions(&stored);
            let what = format!("tensor `{prefix}{from}` is missing (config.json asks for {asked})");
            return Err(Error::format(self.checkpoint.name(), what));
        };
        if !view.shape.iter().map(|&n| n as u64).eq(stored.iter().copied()) {
            let found: Vec<u64> = view.shape.iter().map(|&n| n as u64).collect();
            return Err(Error::format(
                view.file,
                format!(
                    "tensor `{name}` is {}; config.json asks for {}",
                    dimensions(&found),
                    dimensions(&stored)
                ),
            ));
        }
        let block_type = block_type(view.dtype).ok_or_else(|| {
            let what = format!(
                "tensor `{name}` is {:?}; F32, F16 and BF16 are read (weights that were quantized \
                 for another program are not)",
                view.dtype
            );
            Error::unsupported(view.file, what)
        })?;
        // A vector whose order changes is looked at as rows of one element.
        let (rows, cols) = match (shape, order) {
            (&[rows, cols], _) => (rows, cols),
            (_, Order::Same) => (1, shape[0]),
            _ => (shape[0], 1),
        };
        // Fits: the file holds all of it.
        let (rows, cols) = (rows as usize, cols as usize);
        let skipped = skipped as usize * cols * block_type.block_bytes();
        self.tensors.push(Planned::Taken {
            name: to.to_owned(),
            dims: shape.iter().rev().copied().collect(),
            source: Source {
                tensor: Tensor {
                    file: view.file,
                    name: view.name,
                    cols,
                    rows,
                    block_type,
                    bytes: &view.bytes[skipped..],
                },
                order,
            },
        });
        self.taken.insert(name);
        Ok(())
    }

    /// Metadata and tensors, once every tensor of the checkpoint has its place.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the first that has none: it would be left out of the
    /// model's arithmetic without a word.
    pub fn finish(self) -> Result<Contents<'a>> {
        // Tables that old checkpoints stored and that follow from config.json, and the version of
        // the training code.
        let harmless = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq") || name.ends_with("decoder.version")
        };
        let mut names = self.checkpoint.names();
        match names.find(|name| !self.taken.contains(*name) && !harmless(name)) {
            None => Ok((self.metadata, self.tensors)),
            Some(name) => Err(Error::unsupported(
                self.checkpoint.get(name).map(|view| view.file).unwrap_or_default(),
                format!(
                    "has the tensor `{name}`, which is no part of the architecture `{}` as \
                     config.json describes it",
                    self.architecture
                ),
            )),
        }
    }
}

/// `32 x 64`.
fn dimensions(shape: &[u64]) -> String {
    let dims: Vec<String> = shape.iter().map(u64::to_string).collect();
    match dims.is_empty() {
        true => "a single number".to_owned(),
        false => dims.join(" x "),
    }
}

/// The type of a tensor that is not stored by a recipe.
pub(super) fn sixteen_bits(main: BlockType) -> BlockType {
    match main {
        BlockType::BF16 => BlockType::BF16,
        _ => BlockType::F16,
    }
}
