//! From the operations of a program to the steps of a GPU.
//!
//! A step is one dispatch, or one for each sequence or part of a matrix. What a step leaves out or does as well
//! follows from who reads its result next: rows that products read as bytes are written as bytes along with the
//! floats, a norm that products alone read is not written as floats at all, and a product whose result the next
//! operation works on does that operation too, as its *epilogue*.
//!
//! Only whether a norm is applied by the products that read it changes the bits of a result; that follows from the
//! program alone, so a row's bits do not depend on how many rows there are.

use std::collections::HashMap;
use std::ops::Range;

use super::CHUNK;
use super::kernels::{Arithmetic, Function, MOST_OUTPUTS};
use crate::graph::{
    Attention, BufferId, Gating, Norm, NormKind, Op, Program, RotaryId, RowSet, WeightId,
};

/// What of the rows of a pass the steps depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct RowClass {
    /// There are so many rows that products go in tiles where they can.
    pub tiled: bool,
    /// So many rows whose logits are wanted.
    pub wanted_tiled: bool,
    /// They are of several sequences.
    pub several: bool,
}

impl RowClass {
    pub const COUNT: usize = 8;

    /// Its place among all.
    pub fn index(self) -> usize {
        usize::from(self.tiled) + 2 * usize::from(self.wanted_tiled) + 4 * usize::from(self.several)
    }
}

/// What there is to know of a matrix on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatrixFacts {
    /// How activations are multiplied with it.
    pub arithmetic: Arithmetic,
    /// Whether products of many rows go in tiles.
    pub tiles: bool,
    /// Whether it is in one part.
    pub whole: bool,
    /// The matrix that its rows lie behind, so that one product can have both.
    pub follows: Option<WeightId>,
}

/// What a device can do, and how a program's weights lie on it.
pub(super) struct Facts<'a> {
    pub program: &'a Program,
    /// Of each weight that is a matrix.
    pub matrices: &'a [Option<MatrixFacts>],
    /// Whether products may do the operation that follows them.
    pub fused: bool,
}

/// A place for rows of activations as bytes or halves, with their scales: the *twin* of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Twin(pub usize);

/// Rounded rows, as products read them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rounded {
    pub twin: Twin,
    /// If they lack the factors of a norm: what is added under its root.
    pub epsilon: Option<f32>,
}

/// What a product does with its results besides storing or adding them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Epilogue {
    /// Nothing.
    Store,
    /// Writes their norm as bytes, without the factors of the rows.
    Norm { weight: WeightId, to: Twin },
    /// Gates them: the result goes to the first output, and as bytes to a twin.
    Gate { gating: Gating, to: Twin },
    /// Rotates queries and keys and stores keys and values; `outs` are the buffers of all three, of which only
    /// the first is written. `above` rows of them come before those of this product.
    Rope { outs: [BufferId; 3], rotary: Option<RotaryId>, layer: usize, above: usize },
}

/// Products of the same rows with matrices that lie behind one another.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Product {
    /// The rows.
    pub x: BufferId,
    /// What is read of them, if not floats.
    pub rounded: Option<Rounded>,
    /// Matrices and outputs.
    pub matrices: Vec<(WeightId, BufferId)>,
    /// Whether the output is added to.
    pub add: bool,
    pub epilogue: Epilogue,
}

/// What a device does next.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    Embed {
        table: WeightId,
        scale: f32,
        out: BufferId,
    },
    AddPositions {
        table: WeightId,
        x: BufferId,
    },
    Norm {
        x: BufferId,
        norm: Norm,
        out: BufferId,
        bytes: Option<Twin>,
    },
    /// A norm as bytes alone, without the factors of the rows.
    NormScale {
        x: BufferId,
        weight: WeightId,
        to: Twin,
    },
    /// Rows to bytes or halves, as the device's products have them.
    Round {
        x: BufferId,
        to: Twin,
    },
    Product(Product),
    RopeAppendKv {
        outs: [BufferId; 3],
        rotary: Option<RotaryId>,
        layer: usize,
    },
    Attend {
        q: BufferId,
        layer: usize,
        attention: Attention,
        out: BufferId,
        bytes: Option<Twin>,
    },
    /// `x = function(x, y)`, with up to two numbers.
    Elementwise {
        function: Function,
        x: BufferId,
        y: Option<BufferId>,
        numbers: [f32; 2],
        bytes: Option<Twin>,
    },
    SelectRows {
        x: BufferId,
        out: BufferId,
    },
}

/// The steps that some operations of a program become.
///
/// # Panics
/// For operations that no GPU does: they are refused when a program is loaded.
pub(super) fn fuse(facts: &Facts<'_>, ops: Range<usize>, class: RowClass) -> Vec<Step> {
    let mut kept = facts.program.live_at(ops.end);
    kept.push(facts.program.logits);
    let ops = &facts.program.ops[ops];
    let (rounded, places) = (HashMap::new(), Vec::new());
    let mut fusion = Fusion { facts, class, ops, kept, rounded, places, steps: Vec::new() };
    let mut at = 0;
    while at < ops.len() {
        at += fusion.next(at);
    }
    fusion.steps
}

/// Who reads what an operation left in a buffer, until that is overwritten.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Uses {
    /// It is read in single precision.
    floats: bool,
    /// The last operation that multiplies it as bytes or halves.
    rounded: Option<usize>,
}

struct Fusion<'a> {
    facts: &'a Facts<'a>,
    class: RowClass,
    ops: &'a [Op],
    /// Buffers that are read when all is done.
    kept: Vec<BufferId>,
    /// The buffers whose rows are there as bytes or halves.
    rounded: HashMap<BufferId, Rounded>,
    /// For each twin the last operation that reads it.
    places: Vec<usize>,
    steps: Vec<Step>,
}

impl Fusion<'_> {
    /// Adds the steps of operation `at`. Returns how many operations they do.
    fn next(&mut self, at: usize) -> usize {
        match self.ops[at] {
            Op::Embed { table, scale, out } => self.write(out, Step::Embed { table, scale, out }),
            Op::AddPositions { table, x } => self.write(x, Step::AddPositions { table, x }),
            Op::Norm { x, norm, out } => {
                if let Some((weight, to)) = self.as_factors(at, at) {
                    self.steps.push(Step::NormScale { x, weight, to });
                    return 1;
                }
                // (The other kernels of norms do not write bytes along.)
                let bytes = match norm {
                    Norm {
                        kind: NormKind::Layer, weight: Some(_), bias: Some(_), group, ..
                    } if group == self.width(x) => self.along(at, at + 1, out),
                    _ => None,
                };
                self.write_along(out, bytes, Step::Norm { x, norm, out, bytes })
            }
            Op::Linear { x, ref products } => self.linear(at, x, products),
            Op::LinearAdd { x, weight, out } => {
                let rounded = self.operand(at, x, weight);
                let matrices = vec![(weight, out)];
                let normed = match self.ops.get(at + 1) {
                    Some(Op::Norm { x, .. }) if *x == out && self.can_end(weight, out, CHUNK) => {
                        self.as_factors(at, at + 1)
                    }
                    _ => None,
                };
                let epilogue = match normed {
                    Some((weight, to)) => Epilogue::Norm { weight, to },
                    None => Epilogue::Store,
                };
                let product = Product { x, rounded, matrices, add: true, epilogue };
                self.write(out, Step::Product(product)) + usize::from(normed.is_some())
            }
            Op::RopeAppendKv { q, k, v, rotary, layer } => {
                self.rounded.remove(&k);
                self.write(q, Step::RopeAppendKv { outs: [q, k, v], rotary, layer })
            }
            Op::Attend { q, layer, attention, out } => {
                // A block of bytes is of one head then.
                let whole_blocks = self.facts.program.layers[layer].head_dim.is_multiple_of(CHUNK);
                let bytes = if whole_blocks { self.along(at, at + 1, out) } else { None };
                self.write_along(out, bytes, Step::Attend { q, layer, attention, out, bytes })
            }
            Op::Gate { gating, gate, up } => {
                self.elementwise(at, Function::Gate(gating.into()), gate, Some(up), numbers(gating))
            }
            Op::Activate { activation, x } => {
                self.elementwise(at, Function::Activate(activation), x, None, [0.0; 2])
            }
            Op::Add { x, y, scale } => {
                self.elementwise(at, Function::Add, x, Some(y), [scale, 0.0])
            }
            Op::Scale { x, scale } => self.elementwise(at, Function::Scale, x, None, [scale, 0.0]),
            Op::SoftCap { x, cap } => self.elementwise(at, Function::SoftCap, x, None, [0.0, cap]),
            Op::SelectRows { x, out } => self.write(out, Step::SelectRows { x, out }),
            Op::Experts { .. } => unreachable!("experts are refused at load"),
        }
    }

    /// Adds a step that writes a buffer, as floats.
    fn write(&mut self, out: BufferId, step: Step) -> usize {
        self.write_along(out, None, step)
    }

    /// Adds a step that writes a buffer, perhaps as bytes as well.
    fn write_along(&mut self, out: BufferId, bytes: Option<Twin>, step: Step) -> usize {
        self.steps.push(step);
        match bytes {
            Some(twin) => self.rounded.insert(out, Rounded { twin, epsilon: None }),
            None => self.rounded.remove(&out),
        };
        1
    }

    fn elementwise(
        &mut self,
        at: usize,
        function: Function,
        x: BufferId,
        y: Option<BufferId>,
        numbers: [f32; 2],
    ) -> usize {
        let bytes = self.along(at, at + 1, x);
        self.write_along(x, bytes, Step::Elementwise { function, x, y, numbers, bytes })
    }

    /// Products with several matrices, and what the operation after them makes of the results.
    fn linear(&mut self, at: usize, x: BufferId, products: &[(WeightId, BufferId)]) -> usize {
        let mut groups: Vec<Product> = Vec::new();
        for &(weight, out) in products {
            let rounded = self.operand(at, x, weight);
            match groups.last_mut() {
                Some(Product { matrices, .. })
                    if matrices.len() < MOST_OUTPUTS
                        && self.matrix(weight).follows
                            == matrices.last().map(|(last, _)| *last) =>
                {
                    matrices.push((weight, out));
                }
                _ => {
                    let (matrices, epilogue) = (vec![(weight, out)], Epilogue::Store);
                    groups.push(Product { x, rounded, matrices, add: false, epilogue });
                }
            }
        }
        let outs: Vec<BufferId> = products.iter().map(|(_, out)| *out).collect();
        let ended = |width| products.iter().all(|&(weight, out)| self.can_end(weight, out, width));
        let mut gated = None;
        match self.ops.get(at + 1) {
            Some(&Op::RopeAppendKv { q, k, v, rotary, layer })
                if outs == [q, k, v]
                    && !self.class.several
                    && ended(1)
                    && self.can_rotate(rotary, layer)
                    && [k, v].iter().all(|id| self.uses(at + 2, *id) == Uses::default()) =>
            {
                let mut above = 0;
                for group in &mut groups {
                    group.epilogue = Epilogue::Rope { outs: [q, k, v], rotary, layer, above };
                    above += group.matrices.iter().map(|(_, out)| self.width(*out)).sum::<usize>();
                }
            }
            Some(&Op::Gate { gating, gate, up })
                if outs == [gate, up]
                    && groups.len() == 1
                    && ended(CHUNK)
                    && self.uses(at + 2, up) == Uses::default() =>
            {
                // (It writes bytes whether or not they are read.)
                let read = self.along(at, at + 2, gate);
                let to = read.unwrap_or_else(|| self.room(at, at));
                groups[0].epilogue = Epilogue::Gate { gating, to };
                gated = read.map(|twin| (gate, Rounded { twin, epsilon: None }));
            }
            _ => {}
        }
        let done = 1 + usize::from(groups[0].epilogue != Epilogue::Store);
        self.steps.extend(groups.into_iter().map(Step::Product));
        self.rounded.retain(|id, _| !outs.contains(id));
        self.rounded.extend(gated);
        done
    }

    fn matrix(&self, id: WeightId) -> MatrixFacts {
        self.facts.matrices[id.index()].expect("products have matrices")
    }

    fn width(&self, id: BufferId) -> usize {
        self.facts.program.buffer(id).width
    }

    /// Whether a product with a matrix can do the operation that follows, which wants rows of `out` to be whole
    /// multiples of `width`.
    fn can_end(&self, weight: WeightId, out: BufferId, width: usize) -> bool {
        let shape = self.facts.program.buffer(out);
        let many = match shape.rows {
            RowSet::All => self.class.tiled,
            RowSet::Wanted => self.class.wanted_tiled,
        };
        let MatrixFacts { arithmetic, tiles, whole, .. } = self.matrix(weight);
        self.facts.fused
            && arithmetic == Arithmetic::Int8
            && whole
            && !(many && tiles)
            && shape.width.is_multiple_of(width)
    }

    /// Whether a product can rotate its results: a thread has four of a head.
    fn can_rotate(&self, rotary: Option<RotaryId>, layer: usize) -> bool {
        let program = self.facts.program;
        let pairs = rotary.map_or(0, |id| program.rotaries[id.index()].frequencies.len());
        program.layers[layer].head_dim.is_multiple_of(4) && pairs.is_multiple_of(2)
    }

    /// Who reads `buffer` as it is before operation `from`.
    fn uses(&self, from: usize, buffer: BufferId) -> Uses {
        let mut uses = Uses::default();
        for (at, op) in self.ops.iter().enumerate().skip(from) {
            let mut multiply = |weight: WeightId| match self.matrix(weight).arithmetic {
                Arithmetic::F32 => uses.floats = true,
                Arithmetic::Int8 | Arithmetic::F16 => uses.rounded = Some(at),
            };
            let multiplied = match op {
                Op::Linear { x, products } if *x == buffer => {
                    products.iter().for_each(|(weight, _)| multiply(*weight));
                    true
                }
                Op::LinearAdd { x, weight, .. } if *x == buffer => {
                    multiply(*weight);
                    true
                }
                _ => false,
            };
            let mut overwritten = false;
            op.each_buffer(|id, reads, writes| {
                if id == buffer {
                    uses.floats |= reads && (writes || !multiplied);
                    overwritten |= writes;
                }
            });
            if overwritten {
                return uses;
            }
        }
        uses.floats |= self.kept.contains(&buffer);
        uses
    }

    /// Room for rounded rows from operation `at` to `last`.
    fn room(&mut self, at: usize, last: usize) -> Twin {
        match self.places.iter_mut().enumerate().find(|(_, until)| **until < at) {
            Some((place, until)) => {
                *until = last;
                Twin(place)
            }
            None => {
                self.places.push(last);
                Twin(self.places.len() - 1)
            }
        }
    }

    /// Room for the bytes of what operation `at` leaves in a buffer, if they are read by operations from `next` on.
    fn along(&mut self, at: usize, next: usize, out: BufferId) -> Option<Twin> {
        let last = self.uses(next, out).rounded.filter(|last| self.reads_bytes(*last))?;
        Some(self.room(at, last))
    }

    /// Whether what an operation multiplies is bytes, not halves.
    fn reads_bytes(&self, at: usize) -> bool {
        let mut bytes = false;
        self.ops[at].each_weight(|id| bytes |= self.matrix(id).arithmetic == Arithmetic::Int8);
        bytes
    }

    /// If the norm at `norm` can be left to the products that read it: its weights, and room for the bytes that
    /// operation `at` makes instead.
    fn as_factors(&mut self, at: usize, norm: usize) -> Option<(WeightId, Twin)> {
        let Op::Norm { x, norm: what, out } = self.ops[norm] else { return None };
        let Norm { kind: NormKind::Rms, weight: Some(weight), bias: None, epsilon, group } = what
        else {
            return None;
        };
        let Uses { floats: false, rounded: Some(last) } = self.uses(norm + 1, out) else {
            return None;
        };
        if group != self.width(x) || !self.reads_bytes(last) {
            return None;
        }
        let twin = self.room(at, last);
        self.rounded.insert(out, Rounded { twin, epsilon: Some(epsilon) });
        Some((weight, twin))
    }

    /// The rows of `x` as a matrix is multiplied with them at `at`: they are rounded unless they have been.
    fn operand(&mut self, at: usize, x: BufferId, weight: WeightId) -> Option<Rounded> {
        if self.matrix(weight).arithmetic == Arithmetic::F32 {
            return None;
        }
        if let Some(rounded) = self.rounded.get(&x) {
            return Some(*rounded);
        }
        let last = self.uses(at, x).rounded.unwrap_or(at);
        let to = self.room(at, last);
        self.steps.push(Step::Round { x, to });
        let rounded = Rounded { twin: to, epsilon: None };
        self.rounded.insert(x, rounded);
        Some(rounded)
    }
}

/// The numbers of a gating.
pub(super) fn numbers(gating: Gating) -> [f32; 2] {
    match gating {
        Gating::Activated(_) => [0.0; 2],
        Gating::Clamped { alpha, limit } => [alpha, limit],
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::exec::wgpu::tests::{Llama, SMALL, embedded, program, tensor};
    use crate::graph::{Activation, Builder, KvShape};
    use crate::quant::BlockType::{self, F16, F32, Q4_0, Q8_0};

    /// What a device that multiplies quantized weights as `arithmetic` knows of a program's matrices: those of one
    /// operation lie together where they are of one type.
    fn matrices(program: &Program, arithmetic: Arithmetic) -> Vec<Option<MatrixFacts>> {
        let block = |id: WeightId| program.weight(id).tensor.view().block_type;
        let mut all = vec![None; program.weights.len()];
        let mut add = |id: WeightId, follows: Option<WeightId>| {
            let arithmetic = if block(id).is_float() { Arithmetic::F32 } else { arithmetic };
            all[id.index()] = Some(MatrixFacts { arithmetic, tiles: true, whole: true, follows });
        };
        for op in &program.ops {
            match op {
                Op::Linear { products, .. } => {
                    let mut before = None;
                    for &(id, _) in products {
                        add(id, before.filter(|before| block(*before) == block(id)));
                        before = Some(id);
                    }
                }
                Op::LinearAdd { weight, .. } => add(*weight, None),
                _ => {}
            }
        }
        all
    }

    fn steps_of(
        program: &Program,
        ops: Range<usize>,
        arithmetic: Arithmetic,
        class: RowClass,
    ) -> Vec<Step> {
        let matrices = &matrices(program, arithmetic)[..];
        fuse(&Facts { program, matrices, fused: true }, ops, class)
    }

    /// The steps of a whole program in short.
    fn steps(program: &Program, arithmetic: Arithmetic, class: RowClass) -> String {
        in_short(&steps_of(program, 0..program.ops.len(), arithmetic, class))
    }

    /// Steps in short: of products `q`, if they read bytes or halves, how many matrices, and the epilogue; `'`
    /// marks what writes bytes along.
    fn in_short(steps: &[Step]) -> String {
        let along = |bytes: &Option<Twin>| if bytes.is_some() { "'" } else { "" };
        let name = |step: &Step| match step {
            Step::Embed { .. } => "embed".to_owned(),
            Step::AddPositions { .. } => "positions".to_owned(),
            Step::Norm { bytes, .. } => "norm".to_owned() + along(bytes),
            Step::NormScale { .. } => "scale".to_owned(),
            Step::Round { .. } => "round".to_owned(),
            Step::Product(product) => {
                let rounded = if product.rounded.is_some() { "q" } else { "f" };
                let epilogue = match product.epilogue {
                    Epilogue::Store => "",
                    Epilogue::Norm { .. } => "+norm",
                    Epilogue::Gate { .. } => "+gate",
                    Epilogue::Rope { .. } => "+rope",
                };
                format!("{rounded}{}{epilogue}", product.matrices.len())
            }
            Step::RopeAppendKv { .. } => "rope".to_owned(),
            Step::Attend { bytes, .. } => "attend".to_owned() + along(bytes),
            Step::Elementwise { bytes, .. } => "each".to_owned() + along(bytes),
            Step::SelectRows { .. } => "select".to_owned(),
        };
        steps.iter().map(name).collect::<Vec<_>>().join(" ")
    }

    fn llama(types: [BlockType; 3]) -> Arc<Program> {
        Llama { types, ..SMALL }.program()
    }

    const FEW: RowClass = RowClass { tiled: false, wanted_tiled: false, several: false };
    const MANY: RowClass = RowClass { tiled: true, wanted_tiled: true, several: false };
    const SEVERAL: RowClass = RowClass { several: true, ..FEW };
    use Arithmetic::{F16 as Halves, F32 as Floats, Int8};

    #[test]
    fn a_llama_layer_of_bytes_is_five_dispatches() {
        let program = llama([Q4_0; 3]);
        let layer = "q3+rope attend' q1+norm q2+gate q1+norm";
        assert_eq!(steps(&program, Int8, FEW), format!("embed scale {layer} {layer} q1 select"));
        // Values of another type are another product.
        let mixed = layer.replace("q3+rope", "q2+rope q1+rope");
        let program = llama([Q4_0, Q8_0, Q4_0]);
        assert_eq!(steps(&program, Int8, FEW), format!("embed scale {mixed} {mixed} q1 select"));
    }

    #[test]
    fn where_products_end_as_they_are_the_same_bytes_are_made_by_others() {
        let program = llama([Q4_0; 3]);
        let layer = "scale q3 rope attend' q1 scale q2 each' q1";
        let all = format!("embed {layer} {layer} scale q1 select");
        assert_eq!(steps(&program, Int8, MANY), all);
        let matrices = &matrices(&program, Int8)[..];
        let facts = Facts { program: &program, matrices, fused: false };
        assert_eq!(in_short(&fuse(&facts, 0..program.ops.len(), FEW)), all);
        // Of several sequences rotations alone are apart.
        let layer = "q3 rope attend' q1+norm q2+gate q1+norm";
        assert_eq!(
            steps(&program, Int8, SEVERAL),
            format!("embed scale {layer} {layer} q1 select")
        );
        // Matrices in several parts have no epilogue.
        let mut parts = matrices.to_vec();
        parts.iter_mut().flatten().for_each(|facts| facts.whole = false);
        let facts = Facts { program: &program, matrices: &parts, fused: true };
        assert_eq!(in_short(&fuse(&facts, 0..program.ops.len(), FEW)), all);
    }

    #[test]
    fn other_arithmetics_round_what_they_read() {
        let program = llama([Q4_0; 3]);
        let layer = "norm f3 rope attend f1 norm f2 each f1";
        let floats = format!("embed {layer} {layer} norm f1 select");
        assert_eq!(steps(&program, Floats, FEW), floats);
        assert_eq!(steps(&llama([F16; 3]), Int8, FEW), floats);
        let layer = "norm round q3 rope attend round q1 norm round q2 each round q1";
        let halves = format!("embed {layer} {layer} norm round q1 select");
        assert_eq!(steps(&program, Halves, FEW), halves);
    }

    #[test]
    fn a_norm_that_floats_are_read_of_is_written() {
        let program = llama([Q4_0, F16, Q4_0]);
        let layer = "norm round q2 f1 rope attend' q1";
        let feed_forward = "+norm q2+gate q1";
        let all = format!("embed {layer}{feed_forward} {layer}{feed_forward}+norm q1 select");
        assert_eq!(steps(&program, Int8, FEW), all);
    }

    fn norm(b: &mut Builder, kind: NormKind, x: BufferId, group: usize) -> BufferId {
        let weight = Some(b.vector(tensor(F32, 1, group)));
        let bias = (kind == NormKind::Layer).then(|| b.vector(tensor(F32, 1, group)));
        b.norm(x, Norm { kind, weight, bias, epsilon: 1e-5, group }).unwrap()
    }

    fn matrix(b: &mut Builder, rows: usize, cols: usize) -> WeightId {
        b.matrix(tensor(Q4_0, rows, cols), None).unwrap()
    }

    #[test]
    fn a_layer_of_opt_rounds_nothing_on_its_own() {
        let program = program(|b| {
            let x = embedded(b, &tensor(F32, 4, 64));
            let layer = b.begin_layer(KvShape { heads: 2, head_dim: 32 });
            let normed = norm(b, NormKind::Layer, x, 64);
            let qkv = [(); 3].map(|()| matrix(b, 64, 64));
            let qkv = b.linear(normed, qkv).unwrap();
            b.rope_append_kv(qkv, None, layer).unwrap();
            let attention = Attention { scale: 0.2, window: None, soft_cap: None, sinks: None };
            let attended = b.attend(qkv[0], layer, attention).unwrap();
            let o = matrix(b, 64, 64);
            b.linear_add(attended, o, x).unwrap();
            let normed = norm(b, NormKind::Layer, x, 64);
            let up = matrix(b, 96, 64);
            let [up] = b.linear(normed, [up]).unwrap();
            b.activate(Activation::Relu, up);
            let down = matrix(b, 64, 96);
            b.linear_add(up, down, x).unwrap();
            x
        });
        let all = "embed norm' q3+rope attend' q1 norm' q1 each' q1 select";
        assert_eq!(steps(&program, Int8, FEW), all);
    }

    #[test]
    fn norms_of_heads_and_norms_after_products_are_on_their_own() {
        let program = program(|b| {
            let x = embedded(b, &tensor(F32, 4, 64));
            let layer = b.begin_layer(KvShape { heads: 2, head_dim: 32 });
            let qkv = [(); 3].map(|()| matrix(b, 64, 64));
            let [q, k, v] = b.linear(x, qkv).unwrap();
            let (q, k) = (norm(b, NormKind::Rms, q, 32), norm(b, NormKind::Rms, k, 32));
            b.rope_append_kv([q, k, v], None, layer).unwrap();
            let o = matrix(b, 64, 64);
            let [made] = b.linear(q, [o]).unwrap();
            let normed = norm(b, NormKind::Rms, made, 64);
            b.add(x, normed, 1.0).unwrap();
            x
        });
        let all = "embed round q3 norm norm rope round q1 norm each select";
        assert_eq!(steps(&program, Int8, FEW), all);
    }

    #[test]
    fn a_cut_leaves_floats_and_reads_floats() {
        let program = llama([Q4_0; 3]);
        let cut = program.layer_starts[1];
        let at = |ops| in_short(&steps_of(&program, ops, Int8, FEW));
        let layer = "q3+rope attend' q1+norm q2+gate q1";
        assert_eq!(at(0..cut), format!("embed scale {layer}"));
        assert_eq!(at(cut..program.ops.len()), format!("scale {layer}+norm q1 select"));
        // In the middle of a layer: the norm is read by operations that are not here, and written; there it is rounded.
        assert_eq!(at(0..2), "embed norm");
        assert!(at(2..program.ops.len()).starts_with("round q3+rope attend'"));
        // A gate whose result is read elsewhere, and gates that are.
        let gates = program.ops.iter().position(|op| matches!(op, Op::Gate { .. })).unwrap();
        assert!(at(0..gates + 1).ends_with("q2+gate"));
        assert!(at(0..gates).ends_with("q1+norm q2"));
        assert_eq!(at(gates..cut), "each' q1");
    }

    #[test]
    fn what_a_step_reads_is_never_where_it_writes() {
        for class in [FEW, MANY, SEVERAL] {
            let program = llama([Q4_0; 3]);
            for step in steps_of(&program, 0..program.ops.len(), Int8, class) {
                let Step::Product(Product { rounded, epilogue, .. }) = step else { continue };
                let Rounded { twin, .. } = rounded.unwrap();
                if let Epilogue::Norm { to, .. } | Epilogue::Gate { to, .. } = epilogue {
                    assert_ne!(twin, to);
                }
            }
        }
    }

    #[test]
    fn bytes_stay_until_the_last_product_has_read_them() {
        // x is read by a product, then again after two others that have bytes of their own.
        let program = program(|b| {
            let x = embedded(b, &tensor(F32, 4, 64));
            let normed = norm(b, NormKind::Rms, x, 64);
            let first = matrix(b, 64, 64);
            let [a] = b.linear(normed, [first]).unwrap();
            let second = matrix(b, 64, 64);
            let [c] = b.linear(a, [second]).unwrap();
            let third = matrix(b, 64, 64);
            b.linear_add(normed, third, c).unwrap();
            c
        });
        let steps = steps_of(&program, 0..program.ops.len(), Int8, FEW);
        assert_eq!(in_short(&steps), "embed scale q1 round q1 q1 select");
        let read = |step: &Step| match step {
            Step::Product(product) => Some(product.rounded.unwrap().twin),
            _ => None,
        };
        let twins: Vec<_> = steps.iter().filter_map(read).collect();
        assert_eq!(twins, [Twin(0), Twin(1), Twin(0)]);
    }
}
