//! Builds a program, with every shape checked.

use super::{
    Activation, Attention, BufferId, BufferShape, Experts, Gating, KvShape, Norm, NormKind, Op,
    Program, RotaryId, RotaryTable, RowSet, Weight, WeightId, WeightUse,
};
use crate::error::{Error, Result};
use crate::gguf::SharedTensor;

/// Builds a [`Program`], operation by operation.
///
/// Operations that make new rows return the buffer that has them; others change a buffer in place. Buffers
/// that are no longer read share memory with later ones, so a family need not think of it.
///
/// Shapes that do not fit are errors of the file, since all of them follow from it.
#[derive(Debug)]
pub struct Builder {
    file: String,
    program: Program,
}

impl Builder {
    /// A program of a model from the file called `file`, trained for `context` positions.
    pub fn new(file: impl Into<String>, context: usize) -> Self {
        let program = Program {
            ops: Vec::new(),
            buffers: Vec::new(),
            weights: Vec::new(),
            rotaries: Vec::new(),
            layers: Vec::new(),
            layer_starts: Vec::new(),
            logits: BufferId(0),
            vocab_size: 0,
            context,
            position_limit: None,
        };
        Builder { file: file.into(), program }
    }

    fn wrong(&self, what: String) -> Error {
        Error::format(&self.file, what)
    }

    fn check(&self, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { Err(self.wrong(what())) }
    }

    fn weight_of(&mut self, weight: Weight) -> WeightId {
        self.program.weights.push(weight);
        WeightId(self.program.weights.len() as u32 - 1)
    }

    /// A matrix, with a bias of its outputs.
    ///
    /// # Errors
    /// The bias has another length than the matrix has outputs.
    pub fn matrix(&mut self, tensor: SharedTensor, bias: Option<SharedTensor>) -> Result<WeightId> {
        if let Some(bias) = &bias {
            let (bias, matrix) = (bias.view(), tensor.view());
            self.check(bias.rows * bias.cols == matrix.rows, || {
                format!(
                    "`{}` has {} numbers, `{}` {} outputs",
                    bias.name,
                    bias.rows * bias.cols,
                    matrix.name,
                    matrix.rows
                )
            })?;
        }
        Ok(self.weight_of(Weight { tensor, bias, used_as: WeightUse::Matrix }))
    }

    /// A vector.
    pub fn vector(&mut self, tensor: SharedTensor) -> WeightId {
        self.weight_of(Weight { tensor, bias: None, used_as: WeightUse::Vector })
    }

    /// A table.
    pub fn table(&mut self, tensor: SharedTensor) -> WeightId {
        self.weight_of(Weight { tensor, bias: None, used_as: WeightUse::Table })
    }

    /// Rotations.
    pub fn rotary(&mut self, table: RotaryTable) -> RotaryId {
        self.program.rotaries.push(table);
        RotaryId(self.program.rotaries.len() as u32 - 1)
    }

    /// Says that no position beyond so many means anything to the model.
    pub fn limit_positions(&mut self, limit: usize) {
        self.program.position_limit = Some(limit);
    }

    /// Begins a layer, which keeps keys and values of this shape. Returns its number.
    pub fn begin_layer(&mut self, shape: KvShape) -> usize {
        self.program.layer_starts.push(self.program.ops.len());
        self.program.layers.push(shape);
        self.program.layers.len() - 1
    }

    /// Elements of a row of a buffer.
    pub fn width(&self, id: BufferId) -> usize {
        self.program.buffer(id).width
    }

    fn rows(&self, id: BufferId) -> RowSet {
        self.program.buffer(id).rows
    }

    fn buffer(&mut self, width: usize, rows: RowSet) -> BufferId {
        self.program.buffers.push(BufferShape { width, rows });
        BufferId(self.program.buffers.len() as u32 - 1)
    }

    /// A buffer that is there already when the program begins: rows that somebody else writes. Inputs are the
    /// first buffers of the finished program, in the order in which they were made.
    pub fn input(&mut self, width: usize) -> BufferId {
        self.buffer(width, RowSet::All)
    }

    /// A buffer with the rows of another.
    fn like(&mut self, x: BufferId, width: usize) -> BufferId {
        let rows = self.rows(x);
        self.buffer(width, rows)
    }

    fn check_same(&self, a: BufferId, b: BufferId) -> Result<()> {
        let (a, b) = (self.program.buffer(a), self.program.buffer(b));
        self.check(a == b, || format!("rows of {} do not go with rows of {}", a.width, b.width))
    }

    fn dims(&self, id: WeightId) -> (usize, usize) {
        let view = self.program.weight(id).tensor.view();
        (view.rows, view.cols)
    }

    fn name(&self, id: WeightId) -> String {
        self.program.weight(id).tensor.view().name.to_owned()
    }

    fn check_vector(&self, id: WeightId, lengths: &[usize]) -> Result<()> {
        let (rows, cols) = self.dims(id);
        self.check(lengths.contains(&(rows * cols)), || {
            format!("`{}` has {} numbers where {lengths:?} fit", self.name(id), rows * cols)
        })
    }

    /// Checks that a matrix multiplies rows of `x`; returns its outputs.
    fn check_matrix(&self, x: BufferId, id: WeightId) -> Result<usize> {
        let (rows, cols) = self.dims(id);
        self.check(cols == self.width(x), || {
            format!("`{}` takes rows of {cols}, not of {}", self.name(id), self.width(x))
        })?;
        Ok(rows)
    }

    /// See [`Op::Embed`].
    ///
    /// # Errors
    /// None now; shapes follow from the table.
    pub fn embed(&mut self, table: WeightId, scale: f32) -> Result<BufferId> {
        let out = self.buffer(self.dims(table).1, RowSet::All);
        self.program.ops.push(Op::Embed { table, scale, out });
        Ok(out)
    }

    /// See [`Op::AddPositions`].
    ///
    /// # Errors
    /// The table has rows of another width.
    pub fn add_positions(&mut self, table: WeightId, x: BufferId) -> Result<()> {
        let cols = self.dims(table).1;
        self.check(cols == self.width(x), || {
            format!("positions have {cols} elements, rows {}", self.width(x))
        })?;
        self.program.ops.push(Op::AddPositions { table, x });
        Ok(())
    }

    /// See [`Op::Norm`].
    ///
    /// # Errors
    /// Weight or bias are neither as long as a group nor as a row; a row is no whole number of groups.
    pub fn norm(&mut self, x: BufferId, norm: Norm) -> Result<BufferId> {
        let width = self.width(x);
        self.check(norm.group > 0 && width.is_multiple_of(norm.group), || {
            format!("a row of {width} does not divide into groups of {}", norm.group)
        })?;
        for id in norm.weight.iter().chain(&norm.bias) {
            self.check_vector(*id, &[norm.group, width])?;
        }
        let out = self.like(x, width);
        self.program.ops.push(Op::Norm { x, norm, out });
        Ok(out)
    }

    /// An RMSNorm of whole rows.
    ///
    /// # Errors
    /// As [`Builder::norm`].
    pub fn rms_norm(&mut self, x: BufferId, weight: WeightId, epsilon: f32) -> Result<BufferId> {
        let group = self.width(x);
        let kind = NormKind::Rms;
        self.norm(x, Norm { kind, weight: Some(weight), bias: None, epsilon, group })
    }

    /// See [`Op::Linear`].
    ///
    /// # Errors
    /// A matrix takes rows of another width.
    pub fn linear<const N: usize>(
        &mut self,
        x: BufferId,
        weights: [WeightId; N],
    ) -> Result<[BufferId; N]> {
        let mut products = Vec::new();
        for weight in weights {
            let rows = self.check_matrix(x, weight)?;
            products.push((weight, self.like(x, rows)));
        }
        let outs = std::array::from_fn(|i| products[i].1);
        self.program.ops.push(Op::Linear { x, products });
        Ok(outs)
    }

    /// See [`Op::LinearAdd`].
    ///
    /// # Errors
    /// The matrix takes rows of another width, or makes rows of another than those of `out`.
    pub fn linear_add(&mut self, x: BufferId, weight: WeightId, out: BufferId) -> Result<()> {
        let rows = self.check_matrix(x, weight)?;
        self.check(rows == self.width(out) && self.rows(x) == self.rows(out), || {
            format!("`{}` makes rows of {rows}, not of {}", self.name(weight), self.width(out))
        })?;
        self.program.ops.push(Op::LinearAdd { x, weight, out });
        Ok(())
    }

    /// See [`Op::RopeAppendKv`].
    ///
    /// # Errors
    /// Widths are not those of the layer; more is rotated than a head has.
    pub fn rope_append_kv(
        &mut self,
        [q, k, v]: [BufferId; 3],
        rotary: Option<RotaryId>,
        layer: usize,
    ) -> Result<()> {
        let kv = self.program.layers[layer];
        self.check([q, k, v].iter().all(|id| self.rows(*id) == RowSet::All), || {
            "attention is to all rows of a pass, not to the wanted ones alone".to_owned()
        })?;
        self.check([self.width(k), self.width(v)] == [kv.width(); 2], || {
            format!("keys and values have {} elements, not {}", self.width(k), kv.width())
        })?;
        self.check_heads(q, kv)?;
        if let Some(id) = rotary {
            let pairs = self.program.rotaries[id.index()].frequencies.len();
            self.check(2 * pairs <= kv.head_dim, || {
                format!("{pairs} pairs of elements are rotated in heads of {}", kv.head_dim)
            })?;
        }
        self.program.ops.push(Op::RopeAppendKv { q, k, v, rotary, layer });
        Ok(())
    }

    fn check_heads(&self, q: BufferId, kv: KvShape) -> Result<usize> {
        let width = self.width(q);
        self.check(kv.width() > 0 && width.is_multiple_of(kv.width()), || {
            format!("queries of {width} elements do not share keys of {}", kv.width())
        })?;
        Ok(width / kv.head_dim)
    }

    /// See [`Op::Attend`].
    ///
    /// # Errors
    /// Queries are no whole number of heads for each key/value head; there is not a sink for each.
    pub fn attend(&mut self, q: BufferId, layer: usize, attention: Attention) -> Result<BufferId> {
        let heads = self.check_heads(q, self.program.layers[layer])?;
        if let Some(sinks) = attention.sinks {
            self.check_vector(sinks, &[heads])?;
        }
        let out = self.like(q, self.width(q));
        self.program.ops.push(Op::Attend { q, layer, attention, out });
        Ok(out)
    }

    /// See [`Op::Gate`].
    ///
    /// # Errors
    /// The two have other widths.
    pub fn gate(&mut self, gating: Gating, gate: BufferId, up: BufferId) -> Result<()> {
        self.check_same(gate, up)?;
        self.program.ops.push(Op::Gate { gating, gate, up });
        Ok(())
    }

    /// See [`Op::Activate`].
    pub fn activate(&mut self, activation: Activation, x: BufferId) {
        self.program.ops.push(Op::Activate { activation, x });
    }

    /// See [`Op::Add`].
    ///
    /// # Errors
    /// The two have other widths.
    pub fn add(&mut self, x: BufferId, y: BufferId, scale: f32) -> Result<()> {
        self.check_same(x, y)?;
        self.program.ops.push(Op::Add { x, y, scale });
        Ok(())
    }

    /// See [`Op::Scale`].
    pub fn scale(&mut self, x: BufferId, scale: f32) {
        self.program.ops.push(Op::Scale { x, scale });
    }

    /// See [`Op::SoftCap`].
    pub fn soft_cap(&mut self, x: BufferId, cap: f32) {
        self.program.ops.push(Op::SoftCap { x, cap });
    }

    /// See [`Op::Experts`].
    ///
    /// # Errors
    /// Matrices do not fit the rows or each other; there are fewer experts than a row uses, or no logit for
    /// each.
    pub fn experts(&mut self, x: BufferId, router: BufferId, experts: Experts) -> Result<BufferId> {
        let count = experts.experts.len();
        self.check(self.width(router) == count && (1..=count).contains(&experts.used), || {
            format!("{} of {count} experts, {} logits", experts.used, self.width(router))
        })?;
        for expert in &experts.experts {
            let (gate, up) = (self.check_matrix(x, expert.gate)?, self.check_matrix(x, expert.up)?);
            let (rows, cols) = self.dims(expert.down);
            self.check(gate == up && up == cols && rows == self.width(x), || {
                format!("`{}` has {rows} rows of {cols}", self.name(expert.down))
            })?;
        }
        let out = self.like(x, self.width(x));
        self.program.ops.push(Op::Experts { x, router, experts: Box::new(experts), out });
        Ok(out)
    }

    /// See [`Op::SelectRows`]: what is made of the result is made for the rows whose logits are wanted.
    pub fn select_rows(&mut self, x: BufferId) -> BufferId {
        let out = self.buffer(self.width(x), RowSet::Wanted);
        self.program.ops.push(Op::SelectRows { x, out });
        out
    }

    /// The program, whose logits are in `logits`.
    ///
    /// # Errors
    /// The logits are not of the wanted rows alone.
    pub fn finish(mut self, logits: BufferId) -> Result<Program> {
        self.check(self.rows(logits) == RowSet::Wanted, || {
            "logits are made for the wanted rows alone".to_owned()
        })?;
        self.program.vocab_size = self.width(logits);
        self.program.logits = logits;
        share_buffers(&mut self.program);
        Ok(self.program)
    }
}

/// Replaces buffers by as few as do: one that is read no more makes room for the next of its shape.
fn share_buffers(program: &mut Program) {
    let mut last_use = vec![0; program.buffers.len()];
    for (at, op) in program.ops.iter().enumerate() {
        op.each_buffer(|id, _, _| last_use[id.index()] = at);
    }
    last_use[program.logits.index()] = usize::MAX;
    let mut shapes: Vec<BufferShape> = Vec::new();
    let mut free: Vec<u32> = Vec::new();
    let mut place: Vec<Option<u32>> = vec![None; program.buffers.len()];
    // What is read before it is written has been there from the beginning.
    let mut inputs = program.live_at(0);
    inputs.sort_unstable();
    for id in inputs {
        shapes.push(program.buffers[id.index()]);
        place[id.index()] = Some(shapes.len() as u32 - 1);
    }
    for at in 0..program.ops.len() {
        // What this operation reads stays until all that it writes has a place of its own.
        program.ops[at].each_buffer(|id, _, _| {
            let shape = program.buffers[id.index()];
            place[id.index()].get_or_insert_with(|| {
                let fits = free.iter().position(|&slot| shapes[slot as usize] == shape);
                fits.map(|i| free.swap_remove(i)).unwrap_or_else(|| {
                    shapes.push(shape);
                    shapes.len() as u32 - 1
                })
            });
        });
        program.ops[at].each_buffer(|id, _, _| {
            let slot = place[id.index()].expect("it has just been given one");
            if last_use[id.index()] == at && !free.contains(&slot) {
                free.push(slot);
            }
        });
    }
    let slot = |id: BufferId| BufferId(place[id.index()].unwrap_or(0));
    program.ops.iter_mut().for_each(|op| op.replace_buffers(slot));
    program.logits = slot(program.logits);
    program.buffers = shapes;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Gguf, Writer};
    use crate::graph::RotaryPairs;
    use crate::quant::BlockType;
    use std::sync::Arc;

    /// A matrix of zeros.
    fn tensor(rows: usize, cols: usize) -> SharedTensor {
        let mut writer = Writer::new();
        let bytes = vec![0; 4 * rows * cols];
        writer.tensor("w", &[cols as u64, rows as u64], BlockType::F32, bytes);
        let file = Arc::new(Gguf::from_vec("test", writer.to_vec()).unwrap());
        SharedTensor::find(&file, "w").unwrap()
    }

    const KV: KvShape = KvShape { heads: 1, head_dim: 8 };

    fn attention() -> Attention {
        Attention { scale: 1.0, window: None, soft_cap: None, sinks: None }
    }

    /// A small transformer; for each layer the buffers of its values.
    fn transformer(layers: usize) -> (Program, Vec<BufferId>) {
        let mut b = Builder::new("test", 10);
        let table = b.table(tensor(5, 16));
        let x = b.embed(table, 1.0).unwrap();
        let mut values = Vec::new();
        for _ in 0..layers {
            let layer = b.begin_layer(KV);
            let weight = b.vector(tensor(1, 16));
            let normed = b.rms_norm(x, weight, 1e-5).unwrap();
            let weights = [16, 8, 8].map(|rows| b.matrix(tensor(rows, 16), None).unwrap());
            let qkv = b.linear(normed, weights).unwrap();
            b.rope_append_kv(qkv, None, layer).unwrap();
            let out = b.attend(qkv[0], layer, attention()).unwrap();
            let weight = b.matrix(tensor(16, 16), None).unwrap();
            b.linear_add(out, weight, x).unwrap();
            values.extend([normed, qkv[0], qkv[1], qkv[2], out]);
        }
        let last = b.select_rows(x);
        let weight = b.matrix(tensor(5, 16), None).unwrap();
        let [logits] = b.linear(last, [weight]).unwrap();
        (b.finish(logits).unwrap(), values)
    }

    #[test]
    fn buffers_that_are_read_no_more_make_room_for_later_ones() {
        let (one, _) = transformer(1);
        let (many, values) = transformer(7);
        assert_eq!(values.len(), 35);
        // The residual stream, three or four rows at a time beside it, the wanted rows, the logits.
        assert_eq!(one.buffers.len(), many.buffers.len());
        assert!(many.buffers.len() <= 8, "{:?}", many.buffers);
        assert_eq!(many.layer_starts.len(), 7);
        // No operation writes what it still reads, or two things to one place.
        for op in &many.ops {
            let mut uses = Vec::new();
            op.each_buffer(|id, _, _| uses.push(id));
            let mut distinct = uses.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(uses.len(), distinct.len(), "{op:?}");
        }
    }

    #[test]
    fn a_cut_between_layers_hands_over_the_residual_stream_alone() {
        let (program, _) = transformer(3);
        let Op::Embed { out, .. } = program.ops[0] else { panic!("{:?}", program.ops[0]) };
        for &start in &program.layer_starts {
            assert_eq!(program.live_at(start), [out]);
        }
        assert_eq!(program.layers_of(program.layer_starts[1]..program.ops.len()), 1..3);
        assert_eq!(program.layers_of(0..1), 0..0);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_by_name() {
        let mut b = Builder::new("a file", 10);
        let x = b.input(16);
        let layer = b.begin_layer(KV);
        let narrow = b.matrix(tensor(4, 8), None).unwrap();
        let error = b.linear(x, [narrow]).unwrap_err().to_string();
        assert!(
            error.contains("a file") && error.contains("`w` takes rows of 8, not of 16"),
            "{error}"
        );
        let odd = b.vector(tensor(1, 5));
        assert!(b.rms_norm(x, odd, 1e-5).is_err());
        assert!(b.rope_append_kv([x, x, x], None, layer).is_err());
        let [k, v] = [(); 2].map(|()| b.input(8));
        b.rope_append_kv([x, k, v], None, layer).unwrap();
        let rotary =
            RotaryTable { pairs: RotaryPairs::Halves, frequencies: vec![1.0; 5], magnitude: 1.0 };
        let rotary = b.rotary(rotary);
        assert!(b.rope_append_kv([x, k, v], Some(rotary), layer).is_err());
        assert!(b.linear_add(x, narrow, x).is_err());
        assert!(b.gate(Gating::Activated(Activation::Silu), x, k).is_err());
        assert!(b.matrix(tensor(4, 8), Some(tensor(1, 5))).is_err());
        assert!(b.finish(x).is_err());
    }
}
