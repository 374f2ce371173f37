//! Taking tensors out of a file by name and shape and onto a backend, and making sure that none is
//! left over.

use std::collections::HashSet;
use std::sync::Arc;

use crate::backend::Backend;
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

/// Takes a file's tensors onto a backend, and counts what a pass will read and multiply.
pub struct Loader<'a, B: Backend> {
    backend: &'a B,
    weights: Weights,
    /// The embedding, of which the logits may be made too.
    table: SharedTensor,
    /// Told the bytes of each matrix done.
    loaded: &'a mut dyn FnMut(u64) -> Result<()>,
    /// Multiplications with weights for one row.
    pub macs: usize,
    /// Bytes of the matrices, as the file stores them.
    pub weight_bytes: usize,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// All tensors of `file`, for `backend`, whose embedding has rows of `word_width`. `loaded` is
    /// told the bytes of each matrix done.
    ///
    /// # Errors
    /// There is no embedding, or it has another width: as [`Weights::take`].
    pub fn new(
        file: &Arc<Gguf>,
        word_width: usize,
        backend: &'a B,
        loaded: &'a mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut weights = Weights::new(file);
        let name = "token_embd.weight";
        let table = weights.take(name, file.tensor(name).map_or(0, |t| t.rows), word_width)?;
        Ok(Loader { backend, weights, table, loaded, macs: 0, weight_bytes: 0 })
    }

    /// Tokens in the vocabulary: rows of the embedding.
    pub fn vocab_size(&self) -> usize {
        self.table.view().rows
    }

    /// The tensors of the file, for what is no matrix or vector on the backend.
    pub fn weights(&mut self) -> &mut Weights {
        &mut self.weights
    }

    /// The vector called `name`.
    ///
    /// # Errors
    /// As [`Weights::take`] and [`Backend::vector`].
    pub fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector> {
        self.backend.vector(&self.weights.take(name, 1, len)?)
    }

    /// The matrix `name.weight` with `rows` outputs and `cols` inputs, and with `name.bias` if the
    /// file has that.
    ///
    /// # Errors
    /// As [`Weights::take`] and [`Backend::matrix`]; what the progress callback returns.
    pub fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<B::Matrix> {
        let tensor = self.weights.take(&format!("{name}.weight"), rows, cols)?;
        let bias = self.weights.find(&format!("{name}.bias"), 1, rows)?;
        self.matrix_of(&tensor, bias.as_ref())
    }

    /// Matrices that are multiplied with the same rows, each by its name and number of outputs: as
    /// [`Loader::matrix`].
    ///
    /// # Errors
    /// As [`Loader::matrix`].
    pub fn matrices<const N: usize>(
        &mut self,
        names: [(&str, usize); N],
        cols: usize,
    ) -> Result<[B::Matrix; N]> {
        let mut weights = Vec::new();
        for (name, rows) in names {
            let tensor = self.weights.take(&format!("{name}.weight"), rows, cols)?;
            weights.push((tensor, self.weights.find(&format!("{name}.bias"), 1, rows)?));
        }
        let matrices = self.backend.matrices(&weights)?;
        weights.iter().try_for_each(|(tensor, _)| self.count(tensor))?;
        let matrices = <[B::Matrix; N]>::try_from(matrices).ok();
        Ok(matrices.expect("a backend gives a matrix for each"))
    }

    fn matrix_of(
        &mut self,
        tensor: &SharedTensor,
        bias: Option<&SharedTensor>,
    ) -> Result<B::Matrix> {
        let matrix = self.backend.matrix(tensor, bias)?;
        self.count(tensor)?;
        Ok(matrix)
    }

    /// Counts a matrix that was taken.
    fn count(&mut self, tensor: &SharedTensor) -> Result<()> {
        let view = tensor.view();
        self.macs += view.rows * view.cols;
        self.weight_bytes += view.bytes.len();
        (self.loaded)(view.bytes.len() as u64)
    }

    /// The embedding of tokens and the matrix of the logits, which is the embedding again where the
    /// file has none of its own. Last of all, because the file must have no other tensor left.
    ///
    /// # Errors
    /// As [`Loader::matrix`] and [`Weights::finish`].
    pub fn ends(mut self) -> Result<Ends<B>> {
        let (rows, cols) = (self.table.view().rows, self.table.view().cols);
        let output = self.weights.find("output.weight", rows, cols)?;
        let table = self.table.clone();
        let output = self.matrix_of(output.as_ref().unwrap_or(&table), None)?;
        let embedding = self.backend.embedding(&table)?;
        let Loader { weights, macs, weight_bytes, .. } = self;
        weights.finish()?;
        Ok(Ends { embedding, output, vocab_size: rows, macs, weight_bytes })
    }
}

/// The two ends of a model, and what was counted on the way.
pub struct Ends<B: Backend> {
    /// Rows of the embedding, by token.
    pub embedding: B::Embedding,
    /// Makes logits of hidden rows.
    pub output: B::Matrix,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Multiplications with weights for one row, logits included.
    pub macs: usize,
    /// Bytes of all matrices, as the file stores them.
    pub weight_bytes: usize,
}
