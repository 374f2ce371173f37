//! A forward pass as a value: operations over numbered buffers and weights.
//!
//! A family of models (in [`crate::models`]) builds a [`Program`] from a file's metadata and tensors with a
//! [`Builder`], which checks every shape. Executors (in [`crate::exec`]) load a program's weights and run
//! its operations; nothing here knows of hardware.
//!
//! The operations run in order, over the rows of a pass. Each buffer holds one row of numbers for each row
//! of the pass; after [`Op::SelectRows`], for each row whose logits are wanted.

mod builder;

use std::ops::Range;

use crate::gguf::SharedTensor;

pub use builder::Builder;

/// An activation buffer of a program: rows of [`BufferShape::width`] f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub(crate) u32);

/// A weight of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub(crate) u32);

/// A table of rotations of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RotaryId(pub(crate) u32);

impl BufferId {
    /// Its place in [`Program::buffers`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl WeightId {
    /// Its place in [`Program::weights`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl RotaryId {
    /// Its place in [`Program::rotaries`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// How a weight is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightUse {
    /// Rows of activations are multiplied with it.
    Matrix,
    /// Its elements are used as f32.
    Vector,
    /// Its rows are looked up, by token or position.
    Table,
}

/// A weight: a tensor of the file, and how it is used.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The tensor. A matrix has `rows` outputs and `cols` inputs.
    pub tensor: SharedTensor,
    /// What is added to a matrix's outputs: one number for each.
    pub bias: Option<SharedTensor>,
    /// How it is used.
    pub used_as: WeightUse,
}

/// Which rows of a pass a buffer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowSet {
    /// One for each row of the pass.
    All,
    /// One for each row whose logits are wanted.
    Wanted,
}

/// The shape of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferShape {
    /// Elements of a row.
    pub width: usize,
    /// Which rows it has.
    pub rows: RowSet,
}

/// Which elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RotaryPairs {
    /// (0, 1), (2, 3), ...: GGUF's `llama`.
    Interleaved,
    /// (0, d/2), (1, d/2 + 1), ...: GPT-NeoX and its heirs.
    Halves,
}

/// Rotations of queries and keys by position (RoPE; Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryTable {
    /// Which elements form a pair.
    pub pairs: RotaryPairs,
    /// Radians per position of each pair.
    pub frequencies: Vec<f64>,
    /// What rotated elements are multiplied with; 1 for most.
    pub magnitude: f64,
}

/// What a layer keeps of each row in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Key/value heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Elements of a row's keys, or of its values.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// x / (1 + exp(-x)).
    Silu,
    /// x/2 (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel 2016).
    Gelu,
    /// The same by tanh: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    GeluTanh,
}

/// How a gate is applied to what it gates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gating {
    /// gate = f(gate) * up (Shazeer 2020, section 2).
    Activated(Activation),
    /// gate = g / (1 + exp(-alpha g)) * (u + 1), with g = min(gate, limit) and u = up clamped to
    /// +-limit (gpt-oss).
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Largest magnitude.
        limit: f32,
    },
}

/// What a norm makes of the elements that it takes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// x / sqrt(mean(x^2) + epsilon) (RMSNorm; Zhang and Sennrich 2019, eq. 4).
    Rms,
    /// (x - mean(x)) / sqrt(variance(x) + epsilon) (LayerNorm; Ba et al. 2016, eq. 4).
    Layer,
}

/// A norm of rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Which.
    pub kind: NormKind,
    /// Multiplies the normed elements: as many as `group`, or one for each element of a row.
    pub weight: Option<WeightId>,
    /// Is added after that.
    pub bias: Option<WeightId>,
    /// Added under the root.
    pub epsilon: f32,
    /// How many elements of a row are taken together: all, or those of a head.
    pub group: usize,
}

/// The parameters of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Scores are multiplied with it; mostly 1 / sqrt(head_dim).
    pub scale: f32,
    /// How many positions a row attends to at most, the last ones, its own included; `None` for all.
    pub window: Option<usize>,
    /// Scores become cap * tanh(score / cap) (Gemma 2).
    pub soft_cap: Option<f32>,
    /// For each query head a score that takes part in the softmax and has no value (gpt-oss).
    pub sinks: Option<WeightId>,
}

impl Attention {
    /// Attention to all that a row sees, with scores times `scale`.
    pub fn scaled(scale: f32) -> Self {
        Attention { scale, window: None, soft_cap: None, sinks: None }
    }
}

/// How a router's logits become the weights of the experts that a row uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// Softmax over all experts; the largest are used.
    Softmax,
    /// The same, and the weights of those used are divided by their sum.
    SoftmaxNormalized,
    /// The largest logits are used, softmax over them.
    SoftmaxOfChosen,
    /// The largest logits are used, each with its sigmoid.
    Sigmoid,
}

/// The three matrices of a gated feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expert {
    /// Makes gates.
    pub gate: WeightId,
    /// Makes what is gated.
    pub up: WeightId,
    /// Makes outputs.
    pub down: WeightId,
}

/// A mixture of experts (Shazeer et al. 2017): each row goes through a few of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// All experts.
    pub experts: Vec<Expert>,
    /// How many of them a row uses.
    pub used: usize,
    /// How the router's logits become weights.
    pub routing: Routing,
    /// How gates are applied.
    pub gating: Gating,
    /// Multiplies all weights.
    pub scale: f32,
}

/// An operation. Shapes are rows x width; every operation works row by row, so what it makes of a row does
/// not depend on the other rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// out\[i\] = scale * table\[token of row i\].
    Embed {
        /// Rows by token.
        table: WeightId,
        /// Multiplies each element.
        scale: f32,
        /// Is written.
        out: BufferId,
    },
    /// x\[i\] += table\[position of row i\]: learned positions.
    AddPositions {
        /// Rows by position.
        table: WeightId,
        /// Is added to.
        x: BufferId,
    },
    /// out = norm of x.
    Norm {
        /// Is read.
        x: BufferId,
        /// Which norm.
        norm: Norm,
        /// Is written; never `x`.
        out: BufferId,
    },
    /// Each out = x W^T + bias: products of the same rows.
    Linear {
        /// Is read.
        x: BufferId,
        /// Matrices and what they write.
        products: Vec<(WeightId, BufferId)>,
    },
    /// out += x W^T + bias.
    LinearAdd {
        /// Is read.
        x: BufferId,
        /// The matrix.
        weight: WeightId,
        /// Is added to.
        out: BufferId,
    },
    /// Rotates queries and keys by the rows' positions, and stores keys and values in the rows' slots of a
    /// layer. What `k` holds afterwards is not defined.
    RopeAppendKv {
        /// Queries, rotated in place.
        q: BufferId,
        /// Keys.
        k: BufferId,
        /// Values.
        v: BufferId,
        /// By how much they are rotated; `None` for not at all.
        rotary: Option<RotaryId>,
        /// The layer of the cache.
        layer: usize,
    },
    /// Attention of each row over what it sees: out = softmax(scale * q K^T) V, head by head; query heads
    /// share key/value heads in groups. Accumulated in order of position.
    Attend {
        /// Queries.
        q: BufferId,
        /// The layer of the cache.
        layer: usize,
        /// Its parameters.
        attention: Attention,
        /// Is written.
        out: BufferId,
    },
    /// gate = gated up, element by element.
    Gate {
        /// How.
        gating: Gating,
        /// Is read and written.
        gate: BufferId,
        /// Is read.
        up: BufferId,
    },
    /// x = f(x).
    Activate {
        /// The function.
        activation: Activation,
        /// Is read and written.
        x: BufferId,
    },
    /// x += scale * y.
    Add {
        /// Is added to.
        x: BufferId,
        /// Is read.
        y: BufferId,
        /// Multiplies y.
        scale: f32,
    },
    /// x = scale * x.
    Scale {
        /// Is read and written.
        x: BufferId,
        /// The factor.
        scale: f32,
    },
    /// x = cap * tanh(x / cap).
    SoftCap {
        /// Is read and written.
        x: BufferId,
        /// Largest magnitude.
        cap: f32,
    },
    /// out = sum over the experts that a row uses of weight * down(gated(gate(x), up(x))), in order of
    /// the experts' numbers.
    Experts {
        /// Is read.
        x: BufferId,
        /// The router's logits: one for each expert.
        router: BufferId,
        /// The experts and how they are chosen.
        experts: Box<Experts>,
        /// Is written.
        out: BufferId,
    },
    /// out = the rows of x whose logits are wanted. What comes after it is done only if there are such rows.
    SelectRows {
        /// Is read.
        x: BufferId,
        /// Is written.
        out: BufferId,
    },
}

impl Op {
    /// Calls `visit` with every buffer that it uses, whether it reads what was there before, and whether it
    /// writes it.
    pub fn each_buffer(&self, mut visit: impl FnMut(BufferId, bool, bool)) {
        let (read, write, both) = ((true, false), (false, true), (true, true));
        let mut at = |id: &BufferId, (reads, writes): (bool, bool)| visit(*id, reads, writes);
        match self {
            Op::Embed { out, .. } => at(out, write),
            Op::AddPositions { x, .. } | Op::Activate { x, .. } => at(x, both),
            Op::Scale { x, .. } | Op::SoftCap { x, .. } => at(x, both),
            Op::Norm { x, out, .. } | Op::SelectRows { x, out } => {
                at(x, read);
                at(out, write);
            }
            Op::Linear { x, products } => {
                at(x, read);
                products.iter().for_each(|(_, out)| at(out, write));
            }
            Op::LinearAdd { x, out, .. } => {
                at(x, read);
                at(out, both);
            }
            Op::RopeAppendKv { q, k, v, .. } => {
                at(q, both);
                at(k, both);
                at(v, read);
            }
            Op::Attend { q, out, .. } => {
                at(q, read);
                at(out, write);
            }
            Op::Gate { gate, up, .. } => {
                at(gate, both);
                at(up, read);
            }
            Op::Add { x, y, .. } => {
                at(y, read);
                at(x, both);
            }
            Op::Experts { x, router, out, .. } => {
                at(x, read);
                at(router, read);
                at(out, write);
            }
        }
    }

    /// Calls `visit` with every buffer that it uses, to be replaced by another.
    pub(crate) fn replace_buffers(&mut self, mut with: impl FnMut(BufferId) -> BufferId) {
        let mut at = |id: &mut BufferId| *id = with(*id);
        match self {
            Op::Embed { out, .. } => at(out),
            Op::AddPositions { x, .. }
            | Op::Activate { x, .. }
            | Op::Scale { x, .. }
            | Op::SoftCap { x, .. } => at(x),
            Op::Norm { x, out, .. }
            | Op::SelectRows { x, out }
            | Op::LinearAdd { x, out, .. }
            | Op::Attend { q: x, out, .. }
            | Op::Gate { gate: out, up: x, .. }
            | Op::Add { x: out, y: x, .. } => {
                at(x);
                at(out);
            }
            Op::Linear { x, products } => {
                at(x);
                products.iter_mut().for_each(|(_, out)| at(out));
            }
            Op::RopeAppendKv { q, k, v, .. } => {
                at(q);
                at(k);
                at(v);
            }
            Op::Experts { x, router, out, .. } => {
                at(x);
                at(router);
                at(out);
            }
        }
    }

    /// Calls `visit` with every weight that it uses.
    pub fn each_weight(&self, mut visit: impl FnMut(WeightId)) {
        match self {
            Op::Embed { table, .. } | Op::AddPositions { table, .. } => visit(*table),
            Op::Norm { norm, .. } => norm.weight.iter().chain(&norm.bias).copied().for_each(visit),
            Op::Linear { products, .. } => products.iter().for_each(|(weight, _)| visit(*weight)),
            Op::LinearAdd { weight, .. } => visit(*weight),
            Op::Attend { attention, .. } => attention.sinks.into_iter().for_each(visit),
            Op::Experts { experts, .. } => {
                for Expert { gate, up, down } in &experts.experts {
                    [*gate, *up, *down].into_iter().for_each(&mut visit);
                }
            }
            Op::RopeAppendKv { .. }
            | Op::Gate { .. }
            | Op::Activate { .. }
            | Op::Add { .. }
            | Op::Scale { .. }
            | Op::SoftCap { .. }
            | Op::SelectRows { .. } => {}
        }
    }

    /// The layer whose cache rows it writes or reads, if any.
    pub fn layer(&self) -> Option<usize> {
        match self {
            Op::RopeAppendKv { layer, .. } | Op::Attend { layer, .. } => Some(*layer),
            _ => None,
        }
    }
}

/// A model's forward pass.
#[derive(Debug, Clone)]
pub struct Program {
    /// The operations, in order.
    pub ops: Vec<Op>,
    /// Shapes of the buffers.
    pub buffers: Vec<BufferShape>,
    /// All weights.
    pub weights: Vec<Weight>,
    /// Rotations.
    pub rotaries: Vec<RotaryTable>,
    /// What each layer keeps of a row.
    pub layers: Vec<KvShape>,
    /// For each layer the operation that it begins with: a program may be cut there.
    pub layer_starts: Vec<usize>,
    /// Where the logits are in the end.
    pub logits: BufferId,
    /// Tokens in the vocabulary: width of the logits.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// The most positions that it has any notion of, if there is a limit: learned ones.
    pub position_limit: Option<usize>,
}

impl Program {
    /// The shape of a buffer.
    pub fn buffer(&self, id: BufferId) -> BufferShape {
        self.buffers[id.index()]
    }

    /// A weight.
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.index()]
    }

    /// The buffers that operations from `cut` on read as those before it left them: what is handed over where
    /// a program is cut.
    pub fn live_at(&self, cut: usize) -> Vec<BufferId> {
        let mut live = Vec::new();
        let mut written = Vec::new();
        for op in &self.ops[cut..] {
            op.each_buffer(|id, reads, _| {
                if reads && !written.contains(&id) && !live.contains(&id) {
                    live.push(id);
                }
            });
            op.each_buffer(|id, _, writes| {
                if writes && !written.contains(&id) {
                    written.push(id);
                }
            });
        }
        live
    }

    /// Bytes of all buffers for a pass of so many rows, all of them with logits.
    pub fn activation_bytes(&self, rows: usize) -> u64 {
        let widths: usize = self.buffers.iter().map(|shape| shape.width).sum();
        4 * (widths as u64).saturating_mul(rows as u64)
    }

    /// The layers whose cache rows some operations use.
    pub fn layers_of(&self, ops: Range<usize>) -> Range<usize> {
        let mut layers = self.ops[ops].iter().filter_map(Op::layer);
        match layers.next() {
            None => 0..0,
            Some(first) => first..layers.next_back().unwrap_or(first) + 1,
        }
    }

    /// The weights that some operations use, each once, in the order of their use.
    pub fn weights_of(&self, ops: Range<usize>) -> Vec<WeightId> {
        let mut weights = Vec::new();
        let mut seen = vec![false; self.weights.len()];
        for op in &self.ops[ops] {
            op.each_weight(|id| {
                if !std::mem::replace(&mut seen[id.index()], true) {
                    weights.push(id);
                }
            });
        }
        weights
    }

    /// Multiplications with weights for one row through some operations, and bytes of the matrices as the file
    /// stores them. (Of experts, those that one row uses.)
    pub fn cost_of(&self, ops: Range<usize>) -> Cost {
        let mut cost = Cost::default();
        let mut add = |id: WeightId, share: f64| {
            let view = self.weight(id).tensor.view();
            cost.macs += (share * (view.rows * view.cols) as f64) as usize;
            cost.weight_bytes += (share * view.bytes.len() as f64) as usize;
        };
        for op in &self.ops[ops] {
            match op {
                Op::Linear { products, .. } => products.iter().for_each(|(id, _)| add(*id, 1.0)),
                Op::LinearAdd { weight, .. } => add(*weight, 1.0),
                Op::Experts { experts, .. } => {
                    let share = experts.used as f64 / experts.experts.len() as f64;
                    op.each_weight(|id| add(id, share));
                }
                _ => {}
            }
        }
        cost
    }
}

/// What one row costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiplications with weights.
    pub macs: usize,
    /// Bytes of the matrices that are read, as the file stores them.
    pub weight_bytes: usize,
}
