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

use super::kernels::{Arithmetic, Function, MOST_OUTPUTS};
use super::CHUNK;
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
    Embed { table: WeightId, scale: f32, out: BufferId },
    AddPositions { table: WeightId, x: BufferId },
    Norm { x: BufferId, norm: Norm, out: BufferId, bytes: Option<Twin> },
    /// A norm as bytes alone, without the factors of the rows.
    NormScale { x: BufferId, weight: WeightId, to: Twin },
    /// Rows to bytes or halves, as the device's products have them.
    Round { x: BufferId, to: Twin },
    Product(Product),
    RopeAppendKv { outs: [BufferId; 3], rotary: Option<RotaryId>, layer: usize },
    Attend { q: BufferId, layer: usize, attention: Attention, out: BufferId, bytes: Option<Twin> },
    /// `x = function(x, y)`, with up to two numbers.
    Elementwise { function: Function, x: BufferId, y: Option<BufferId>, numbers: [f32; 2], bytes: Option<Twin> },
    SelectRows { x: BufferId, out: BufferId },
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
                    Norm { kind: NormKind::Layer, weight: Some(_), bias: Some(_), group, .. }
                        if group == self.width(x) =>
                    {
                        self.along(at, at + 1, out)
                    }
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
            Op::Scale { x, scale } => {
                self.elementwise(at, Function::Scale, x, None, [scale, 0.0])
            }
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
                        && self.matrix(weight).follows == matrices.last().map(|(last, _)| *last) =>
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
