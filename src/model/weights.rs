//! Taking tensors out of a file by name and shape, and making sure that none is left over.

use std::collections::HashSet;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gguf::{Gguf, SharedTensor};

/// The tensors of a file, as an architecture asks for them.
pub struct Weights {
    file: Arc<Gguf>,
    taken: HashSet<String>,
}

impl Weights {
    /// All tensors of `file`.
    pub fn new(file: &Arc<Gguf>) -> Self {
        Weights { file: file.clone(), taken: HashSet::new() }
    }

    /// The matrix called `name`, if the file has it, with `rows` outputs and `cols` inputs.
    ///
    /// # Errors
    /// It has another shape.
    pub fn find(&mut self, name: &str, rows: usize, cols: usize) -> Result<Option<SharedTensor>> {
        let Some(tensor) = SharedTensor::find(&self.file, name) else { return Ok(None) };
        let view = tensor.view();
        if (view.rows, view.cols) != (rows, cols) {
            return Err(Error::format(
                view.file,
                format!(
                    "tensor `{name}` has {} rows of {}; the metadata want {rows} rows of {cols}",
                    view.rows, view.cols
                ),
            ));
        }
        self.taken.insert(name.to_owned());
        Ok(Some(tensor))
    }

    /// The matrix called `name`.
    ///
    /// # Errors
    /// The file does not have it, or it has another shape.
    pub fn take(&mut self, name: &str, rows: usize, cols: usize) -> Result<SharedTensor> {
        self.find(name, rows, cols)?.ok_or_else(|| {
            Error::format(
                self.file.name(),
                format!("tensor `{name}` is missing ({rows} rows of {cols} are needed)"),
            )
        })
    }

    /// Checks that every tensor was asked for: one that an architecture does not know would be
    /// left out of its arithmetic without a word.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the first tensor that was not.
    pub fn finish(self) -> Result<()> {
        // Tables that old converters stored and that follow from the metadata.
        let derived = |name: &str| name.ends_with(".attn_rot_embd") || name.ends_with("rope_freqs");
        match self.file.tensors().find(|t| !self.taken.contains(t.name) && !derived(t.name)) {
            None => Ok(()),
            Some(tensor) => Err(Error::unsupported(
                self.file.name(),
                format!(
                    "has the tensor `{}`, which is not part of its architecture as it is run here",
                    tensor.name
                ),
            )),
        }
    }
}
