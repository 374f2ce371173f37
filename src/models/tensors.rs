//! Taking tensors out of a file by name and shape, and making sure that none is left over.

use std::collections::HashSet;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gguf::{Gguf, SharedTensor};

/// The tensors of a file, as an architecture asks for them.
pub struct Tensors {
    file: Arc<Gguf>,
    taken: HashSet<String>,
}

impl Tensors {
    /// All tensors of `file`.
    pub fn new(file: &Arc<Gguf>) -> Self {
        Tensors { file: file.clone(), taken: HashSet::new() }
    }

    /// Whether the file has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// How many rows the tensor called `name` has; 0 if the file does not have it.
    pub fn rows(&self, name: &str) -> usize {
        self.file.tensor(name).map_or(0, |tensor| tensor.rows)
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

    /// The elements of the vector called `name`, if the file has it.
    ///
    /// # Errors
    /// It has another shape, or a type that cannot be read.
    pub fn floats(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.find(name, 1, len)? else { return Ok(None) };
        let view = tensor.view();
        if !view.block_type.can_dequantize() {
            let what =
                format!("tensor `{name}` has the type {}, which cannot be read", view.block_type);
            return Err(Error::unsupported(view.file, what));
        }
        let mut floats = vec![0.0; len];
        view.block_type.dequantize(view.bytes, &mut floats);
        Ok(Some(floats))
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
