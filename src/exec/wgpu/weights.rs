//! Weights on the device: where their rows lie, and which kernels may multiply with them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use super::device::{Storage, UPLOAD, lock};
use super::fuse::MatrixFacts;
use super::kernels::{Arithmetic, BATCH_ROWS, TILE_BATCH_ROWS, TILE_ROWS};
use super::layout::Layout;
use super::run::GpuStage;
use super::{CHUNK, Gpu, LEAST_GROUP_ROWS, MOST_GROUPS};
use crate::error::{Error, Result};
use crate::exec::{Loaded, Rows, Segment, Stage};
use crate::gguf::{SharedTensor, Tensor};
use crate::graph::{self, BufferId, BufferShape, Op, Program, RowSet, WeightId, WeightUse};
use crate::quant::BlockType;

/// Which kernels of a weight type give the same bits, and so can be used side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Agreement {
    /// Those for 1, 2, 4 and 8 batch rows: else the last is used for any number.
    pub batch_rows: bool,
    /// Those for tiles with them: else there are none.
    pub tiles: bool,
}

/// Some rows of a matrix.
#[derive(Debug)]
pub(super) struct Part {
    pub first: usize,
    pub rows: usize,
    /// Their buffer, and the byte of it where they begin.
    pub bytes: Arc<Storage>,
    pub begins: usize,
}

/// All rows of a tensor.
#[derive(Debug)]
pub(super) struct Parts {
    pub parts: Vec<Part>,
    /// The tensor, whose place in memory no other can have while these are in use.
    _tensor: SharedTensor,
}

/// What a tensor is known by: its place in memory, and how that is read.
type Place = (usize, usize, BlockType, [usize; 2]);

fn place(tensor: &Tensor<'_>) -> Place {
    let (at, len) = (tensor.bytes.as_ptr() as usize, tensor.bytes.len());
    (at, len, tensor.block_type, [tensor.rows, tensor.cols])
}

/// Tensors on the device: one that is used twice is there once.
#[derive(Debug, Default)]
pub(super) struct Uploads(Mutex<HashMap<Place, Weak<Parts>>>);

impl Uploads {
    fn find(&self, tensor: &Tensor<'_>) -> Option<Arc<Parts>> {
        lock(&self.0).get(&place(tensor)).and_then(Weak::upgrade)
    }

    /// Remembers where a tensor is, for as long as somebody uses it.
    fn keep(&self, tensor: &SharedTensor, parts: Vec<Part>) -> Arc<Parts> {
        let parts = Arc::new(Parts { parts, _tensor: tensor.clone() });
        lock(&self.0).insert(place(&tensor.view()), Arc::downgrade(&parts));
        parts
    }
}

/// A matrix or table on the device.
#[derive(Debug)]
pub(super) struct Matrix {
    pub block: BlockType,
    pub rows: usize,
    pub cols: usize,
    /// Bytes from one row to the next.
    pub row_bytes: usize,
    pub parts: Arc<Parts>,
    /// Floats of a buffer, from one on.
    pub bias: Option<(Arc<Storage>, usize)>,
    pub agreement: Agreement,
}

impl Matrix {
    fn new(tensor: &Tensor<'_>, parts: Arc<Parts>) -> Self {
        Matrix {
            block: tensor.block_type,
            rows: tensor.rows,
            cols: tensor.cols,
            row_bytes: Layout::of(tensor).stride,
            parts,
            bias: None,
            agreement: Agreement::default(),
        }
    }

    /// Whether its rows follow those of another on the device, and its biases too, so that one product
    /// can have both.
    fn follows(&self, other: &Matrix) -> bool {
        let ([mine], [theirs]) = (&self.parts.parts[..], &other.parts.parts[..]) else {
            return false;
        };
        let biases_follow = match (&self.bias, &other.bias) {
            (None, None) => true,
            (Some((a, at)), Some((b, other_at))) => {
                Arc::ptr_eq(a, b) && *at == other_at + other.rows
            }
            _ => false,
        };
        let same = |m: &Matrix| (m.block, m.cols, m.agreement);
        same(self) == same(other)
            && Arc::ptr_eq(&mine.bytes, &theirs.bytes)
            && mine.begins == theirs.begins + other.rows * other.row_bytes
            && biases_follow
    }
}

/// A weight of a program on the device.
#[derive(Debug)]
pub(super) enum Weight {
    Matrix(Matrix),
    Table(Matrix),
    Vector(Arc<Storage>),
    /// Sinks of attention go with the words of each pass.
    Sinks(Vec<f32>),
}

impl Gpu {
    /// The weights that some operations use, each in its place.
    pub(super) fn load_weights(
        self: &Arc<Self>,
        program: &Program,
        ops: Range<usize>,
        loaded: Loaded<'_>,
    ) -> Result<Vec<Option<Weight>>> {
        for id in program.weights_of(ops.clone()) {
            readable(&program.weight(id).tensor.view())?;
        }
        let mut weights: Vec<Option<Weight>> = program.weights.iter().map(|_| None).collect();
        for op in &program.ops[ops] {
            let mut ids = Vec::new();
            op.each_weight(|id| ids.extend(weights[id.index()].is_none().then_some(id)));
            // Matrices that are multiplied with the same rows lie together if they are of one kind.
            let kind = |id: &WeightId| {
                let graph::Weight { tensor, bias, used_as } = program.weight(*id);
                let view = tensor.view();
                (*used_as, view.block_type, view.cols, bias.is_some())
            };
            for run in ids.chunk_by(|a, b| kind(a) == kind(b)) {
                let run_weights: Vec<_> = run.iter().map(|id| program.weight(*id)).collect();
                let made = match (op, run_weights[0].used_as) {
                    (Op::Attend { .. }, _) => {
                        vec![Weight::Sinks(floats(&[&run_weights[0].tensor]))]
                    }
                    (_, WeightUse::Matrix) => self.matrices(&run_weights)?,
                    (_, WeightUse::Table) => {
                        let tensor = &run_weights[0].tensor;
                        vec![Weight::Table(Matrix::new(&tensor.view(), self.parts(tensor)?))]
                    }
                    (_, WeightUse::Vector) => {
                        let vector = |weight: &&graph::Weight| self.vector(&[&weight.tensor]);
                        let vectors: Result<Vec<_>> = run_weights.iter().map(vector).collect();
                        vectors?.into_iter().map(Weight::Vector).collect()
                    }
                };
                for (id, weight) in run.iter().zip(made) {
                    weights[id.index()] = Some(weight);
                    // The device holds it now: the mapped pages need not stay in memory too.
                    let tensor = &program.weight(*id).tensor;
                    tensor.release();
                    loaded(tensor.view().bytes.len() as u64)?;
                }
            }
        }
        Ok(weights)
    }

    /// What is to be known of the matrices among the weights of some operations.
    pub(super) fn matrix_facts(
        &self,
        weights: &[Option<Weight>],
        ops: &[Op],
    ) -> Vec<Option<MatrixFacts>> {
        let matrix = |id: WeightId| match &weights[id.index()] {
            Some(Weight::Matrix(matrix)) => Some(matrix),
            _ => None,
        };
        let fact = |weight: &Option<Weight>| match weight {
            Some(Weight::Matrix(matrix)) => Some(MatrixFacts {
                arithmetic: self.arithmetic_with(matrix.block),
                tiles: matrix.agreement.tiles,
                whole: matrix.parts.parts.len() == 1,
                follows: None,
            }),
            _ => None,
        };
        let mut facts: Vec<_> = weights.iter().map(fact).collect();
        for op in ops {
            let Op::Linear { products, .. } = op else { continue };
            for two in products.windows(2) {
                let (before, id) = (two[0].0, two[1].0);
                if let (Some(a), Some(b)) = (matrix(before), matrix(id))
                    && b.follows(a)
                    && let Some(facts) = &mut facts[id.index()]
                {
                    facts.follows = Some(before);
                }
            }
        }
        facts
    }

    /// Matrices of the same type and row length, one behind another if they can be.
    fn matrices(self: &Arc<Self>, weights: &[&graph::Weight]) -> Result<Vec<Weight>> {
        let tensors: Vec<_> = weights.iter().map(|weight| &weight.tensor).collect();
        let _kept = self.put_together(&tensors)?;
        let biases: Option<Vec<_>> = weights.iter().map(|weight| weight.bias.as_ref()).collect();
        let biases = biases.map(|biases| self.vector(&biases)).transpose()?;
        let mut at = 0;
        let mut matrix = |tensor: &&SharedTensor| {
            let mut matrix = Matrix::new(&tensor.view(), self.parts(tensor)?);
            matrix.agreement = self.agreement(tensor)?;
            matrix.bias = biases.clone().map(|floats| (floats, at));
            at += matrix.rows;
            Ok(Weight::Matrix(matrix))
        };
        tensors.iter().map(&mut matrix).collect()
    }

    /// The rows of a tensor on the device, in buffers of their own unless they are there already.
    pub(super) fn parts(&self, shared: &SharedTensor) -> Result<Arc<Parts>> {
        let tensor = &shared.view();
        if let Some(parts) = self.uploads.find(tensor) {
            return Ok(parts);
        }
        let stride = Layout::of(tensor).stride;
        let most = self.most_rows(stride);
        if most == 0 {
            return Err(Error::unsupported(
                tensor.file,
                format!(
                    "tensor `{}` has rows of {stride} bytes, more than {} binds at once",
                    tensor.name,
                    self.device.name()
                ),
            ));
        }
        let piece = |first: usize| {
            let rows = most.min(tensor.rows - first);
            let bytes = self.device.storage((rows * stride) as u64)?;
            self.upload(tensor, first..first + rows, &bytes, 0)?;
            Ok(Part { first, rows, begins: 0, bytes })
        };
        let parts: Result<Vec<_>> = (0..tensor.rows).step_by(most).map(piece).collect();
        Ok(self.uploads.keep(shared, parts?))
    }

    /// How many rows of so many bytes one buffer, and one dispatch, can have.
    fn most_rows(&self, stride: usize) -> usize {
        (self.part_limit / stride).min(MOST_GROUPS * LEAST_GROUP_ROWS)
    }

    /// Puts tensors on the device one behind another, in one buffer, if that can hold them and none is there
    /// already. They have rows of the same type and length. Returns what keeps them there.
    fn put_together(&self, tensors: &[&SharedTensor]) -> Result<Vec<Arc<Parts>>> {
        let stride = Layout::of(&tensors[0].view()).stride;
        let rows: usize = tensors.iter().map(|tensor| tensor.view().rows).sum();
        let is_there = |tensor: &&SharedTensor| self.uploads.find(&tensor.view()).is_some();
        if tensors.len() < 2 || rows > self.most_rows(stride) || tensors.iter().any(is_there) {
            return Ok(Vec::new());
        }
        let bytes = self.device.storage((rows * stride) as u64)?;
        let mut kept = Vec::new();
        let mut begins = 0;
        for &shared in tensors {
            let tensor = &shared.view();
            self.upload(tensor, 0..tensor.rows, &bytes, begins)?;
            let part = Part { first: 0, rows: tensor.rows, begins, bytes: bytes.clone() };
            kept.push(self.uploads.keep(shared, vec![part]));
            begins += tensor.rows * stride;
        }
        Ok(kept)
    }

    /// Rows of a tensor into a buffer, from a byte on.
    fn upload(
        &self,
        tensor: &Tensor<'_>,
        rows: Range<usize>,
        to: &Storage,
        begins: usize,
    ) -> Result<()> {
        let (layout, row_bytes) = (Layout::of(tensor), tensor.row_bytes());
        let at_once = (UPLOAD / layout.stride).max(1);
        for first in rows.clone().step_by(at_once) {
            let end = rows.end.min(first + at_once);
            let bytes = layout.arranged(&tensor.bytes[first * row_bytes..end * row_bytes]);
            let at = begins + (first - rows.start) * layout.stride;
            self.device.upload(to, at as u64, &bytes)?;
        }
        Ok(())
    }

    /// The floats of some tensors on the device, one behind another.
    fn vector(&self, tensors: &[&SharedTensor]) -> Result<Arc<Storage>> {
        let mut floats = floats(tensors);
        // As rows of activations are.
        floats.resize(floats.len().next_multiple_of(CHUNK), 0.0);
        let storage = self.device.storage(4 * floats.len() as u64)?;
        self.device.upload(&storage, 0, bytemuck::cast_slice(&floats))?;
        Ok(storage)
    }

    /// Which kernels of a type agree; tried with the first rows of the first matrix of that type.
    fn agreement(self: &Arc<Self>, tensor: &SharedTensor) -> Result<Agreement> {
        let block = tensor.view().block_type;
        if let Some(agreement) = lock(&self.agreeing).get(&block) {
            return Ok(*agreement);
        }
        let tensor = tensor.slice(0..tensor.view().rows.min(2 * TILE_ROWS as usize))?;
        let Tensor { rows, cols, .. } = tensor.view();
        let parts = self.parts(&tensor)?;
        let [x, out] = [0, 1].map(BufferId);
        let buffer = |width| BufferShape { width, rows: RowSet::All };
        let bias = None;
        let program = Arc::new(Program {
            ops: vec![Op::Linear { x, products: vec![(WeightId(0), out)] }],
            buffers: vec![buffer(cols), buffer(rows)],
            weights: vec![graph::Weight {
                tensor: tensor.clone(),
                bias,
                used_as: WeightUse::Matrix,
            }],
            rotaries: Vec::new(),
            layers: Vec::new(),
            layer_starts: Vec::new(),
            logits: out,
            vocab_size: rows,
            context: 1,
            position_limit: None,
        });
        let most = TILE_BATCH_ROWS as usize;
        let mut state = 1u32;
        let numbers: Vec<f32> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .take(most * cols)
        .collect();
        let product = |n: usize, agreement: Agreement| -> Result<Vec<u32>> {
            let matrix = Matrix { agreement, ..Matrix::new(&tensor.view(), parts.clone()) };
            let weights = vec![Some(Weight::Matrix(matrix))];
            let stage = GpuStage::new(self.clone(), program.clone(), 0..1, weights);
            let mut workspace = stage.workspace();
            workspace.write(x, &numbers[..n * cols])?;
            let pass = Rows {
                tokens: &vec![0; n],
                segments: &[Segment { rows: 0..n, line: 0, first_slot: 0 }],
                ancestors: &vec![1; n],
                rotations: &[],
                wanted: &[],
            };
            stage.run(&pass, &mut [], &mut *workspace)?;
            let mut copy = Vec::new();
            let found = workspace.read(out, 0..n, &mut copy)?;
            Ok(found.iter().map(|x| x.to_bits()).collect())
        };
        let mut agreement = Agreement { batch_rows: true, tiles: false };
        let all = product(most, agreement)?;
        if !self.variants.padded {
            for &n in &BATCH_ROWS[..BATCH_ROWS.len() - 1] {
                let few = n as usize;
                agreement.batch_rows &= product(few, agreement)? == all[..few * rows];
            }
        }
        if self.variants.tiles && !self.variants.padded && agreement.batch_rows {
            let tiles = Agreement { tiles: true, ..agreement };
            agreement.tiles = product(most, tiles)? == all;
        }
        lock(&self.agreeing).insert(block, agreement);
        Ok(agreement)
    }

    /// How activations are multiplied with weights of a type.
    pub(super) fn arithmetic_with(&self, block: BlockType) -> Arithmetic {
        if block.is_float() { Arithmetic::F32 } else { self.arithmetic }
    }
}

/// All numbers of some tensors.
fn floats(tensors: &[&SharedTensor]) -> Vec<f32> {
    let mut floats = Vec::new();
    for tensor in tensors {
        let view = tensor.view();
        let first = floats.len();
        floats.resize(first + view.rows * view.cols, 0.0);
        view.block_type.dequantize(view.bytes, &mut floats[first..]);
    }
    floats
}

fn readable(tensor: &Tensor<'_>) -> Result<()> {
    if tensor.block_type.can_dequantize() {
        return Ok(());
    }
    let (name, block_type) = (tensor.name, tensor.block_type);
    let what = format!("tensor `{name}` has the type {block_type}, which cannot be read");
    Err(Error::unsupported(tensor.file, what))
}
