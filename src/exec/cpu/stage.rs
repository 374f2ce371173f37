//! Operations with their weights on the CPU, and the interpreter that runs them.

use std::any::Any;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::attention::{Attention, Scratch};
use super::cache::{self, Cache, Layers};
use super::kernels::{Kernels, LayerNorm};
use super::matmul::{self, ActivationLayout};
use super::panel::Panels;
use super::pool::Scope;
use super::workspace::{Buffer, Quantized, Workspace};
use super::{ALONE_ELEMENTS, ALONE_MACS, Cpu, LANES, Shared, dequantized, readable, share};
use crate::error::Result;
use crate::exec::{self, CacheType, KvCache, Loaded, Rows, own};
use crate::gguf::SharedTensor;
use crate::graph::{
    self, BufferId, Experts, KvShape, NormKind, Op, Program, RotaryId, Routing, WeightId, WeightUse,
};
use crate::quant::BlockType;

/// A packed weight matrix.
#[derive(Debug)]
struct Matrix {
    panels: Panels,
    bias: Option<Vec<f32>>,
}

/// A weight in the form that kernels read.
#[derive(Debug)]
enum Weight {
    Matrix(Matrix),
    /// Padded with zeros to whole vectors.
    Vector(Vec<f32>),
    /// In its file.
    Table(SharedTensor),
}

/// Operations with their weights.
pub(super) struct Stage {
    cpu: Arc<Cpu>,
    program: Arc<Program>,
    ops: Range<usize>,
    /// By number in the program; none for those of other stages.
    weights: Vec<Option<Weight>>,
    layers: Range<usize>,
    /// For norms without weights or biases: as long as the widest row.
    ones: Vec<f32>,
    zeros: Vec<f32>,
    macs: usize,
}

impl Stage {
    pub fn load(
        cpu: Arc<Cpu>,
        program: &Arc<Program>,
        ops: Range<usize>,
        loaded: Loaded<'_>,
    ) -> Result<Self> {
        let mut weights: Vec<_> = program.weights.iter().map(|_| None).collect();
        for id in program.weights_of(ops.clone()) {
            let graph::Weight { tensor, bias, used_as } = program.weight(id);
            weights[id.index()] = Some(match used_as {
                WeightUse::Matrix => {
                    let panels = cpu.panels(tensor)?;
                    loaded(tensor.view().bytes.len() as u64)?;
                    Weight::Matrix(Matrix {
                        panels,
                        bias: bias.as_ref().map(dequantized).transpose()?,
                    })
                }
                WeightUse::Vector => Weight::Vector(dequantized(tensor)?),
                WeightUse::Table => {
                    readable(tensor)?;
                    Weight::Table(tensor.clone())
                }
            });
        }
        let widest = program.buffers.iter().map(|shape| shape.width).max().unwrap_or(0);
        let widest = widest.next_multiple_of(LANES);
        Ok(Stage {
            cpu,
            program: program.clone(),
            layers: program.layers_of(ops.clone()),
            macs: program.cost_of(ops.clone()).macs,
            weights,
            ops,
            ones: vec![1.0; widest],
            zeros: vec![0.0; widest],
        })
    }

    fn matrix(&self, id: WeightId) -> &Matrix {
        match &self.weights[id.index()] {
            Some(Weight::Matrix(matrix)) => matrix,
            other => unreachable!("the builder makes products with matrices, not {other:?}"),
        }
    }

    fn vector(&self, id: WeightId) -> &[f32] {
        match &self.weights[id.index()] {
            Some(Weight::Vector(vector)) => vector,
            other => unreachable!("the builder gives norms vectors, not {other:?}"),
        }
    }

    fn table(&self, id: WeightId) -> &SharedTensor {
        match &self.weights[id.index()] {
            Some(Weight::Table(table)) => table,
            other => unreachable!("the builder looks rows up in tables, not in {other:?}"),
        }
    }
}

impl exec::Stage for Stage {
    fn cache(&self, cache_type: CacheType) -> Box<dyn KvCache> {
        Box::new(Cache::new(&self.program.layers[self.layers.clone()], cache_type))
    }

    fn workspace(&self) -> Box<dyn exec::Workspace> {
        Box::new(Workspace::new(&self.program, self.ops.clone()))
    }

    fn run(
        &self,
        rows: &Rows<'_>,
        caches: &mut [&mut dyn KvCache],
        workspace: &mut dyn exec::Workspace,
    ) -> Result<()> {
        let workspace: &mut Workspace = own(workspace);
        workspace.reserve(rows)?;
        let mut own_caches: Vec<&mut Cache> =
            caches.iter_mut().map(|cache| own(&mut **cache as &mut dyn Any)).collect();
        for (cache, segment) in own_caches.iter_mut().zip(rows.segments) {
            cache.reserve(segment.first_slot..segment.first_slot + segment.rows.len())?;
        }
        let together = self.macs.saturating_mul(rows.len()) >= ALONE_MACS;
        self.cpu.pool.enter(together, |scope| {
            let Workspace { buffers, quantized, expert, .. } = workspace;
            let kernels = self.cpu.isa.kernels();
            let mut pass = Pass { stage: self, rows, scope, kernels, buffers, quantized };
            for op in &self.program.ops[self.ops.clone()] {
                if matches!(op, Op::SelectRows { .. }) && rows.wanted.is_empty() {
                    break;
                }
                pass.run(op, &mut own_caches, expert);
            }
        });
        Ok(())
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// A pass under way.
struct Pass<'p> {
    stage: &'p Stage,
    rows: &'p Rows<'p>,
    scope: &'p Scope<'p>,
    kernels: &'static Kernels,
    buffers: &'p mut [Buffer],
    quantized: &'p mut Quantized,
}

impl Pass<'_> {
    fn run(&mut self, op: &Op, caches: &mut [&mut Cache], expert: &mut [Buffer; 3]) {
        match op {
            Op::Embed { table, scale, out } => self.embed(*table, *scale, *out),
            Op::AddPositions { table, x } => self.add_positions(*table, *x),
            Op::Norm { x, norm, out } => {
                let mut to = self.take(*out);
                self.norm(&self.buffers[x.index()], norm, &mut to);
                self.put(*out, to);
            }
            Op::Linear { x: from, products } => {
                let x = self.take(*from);
                let mut outs: Vec<_> = products.iter().map(|(_, out)| self.take(*out)).collect();
                let mut to: Vec<_> = products.iter().map(|(id, _)| *id).zip(&mut outs).collect();
                self.multiply(&x, &mut to, false);
                for ((_, id), out) in products.iter().zip(outs) {
                    self.put(*id, out);
                }
                self.put(*from, x);
            }
            Op::LinearAdd { x, weight, out } => {
                let (from, mut to) = (self.take(*x), self.take(*out));
                self.multiply(&from, &mut [(*weight, &mut to)], true);
                self.put(*out, to);
                self.put(*x, from);
            }
            Op::RopeAppendKv { q, k, v, rotary, layer } => {
                self.rope_append_kv([*q, *k, *v], *rotary, *layer, caches);
            }
            Op::Attend { q, layer, attention, out } => {
                let mut to = self.take(*out);
                self.attend(&self.buffers[q.index()], *layer, attention, caches, &mut to);
                self.put(*out, to);
            }
            Op::Gate { gating, gate, up } => {
                let mut to = self.take(*gate);
                self.gate(*gating, &mut to, &self.buffers[up.index()]);
                self.put(*gate, to);
            }
            Op::Activate { activation, x } => {
                let activation = *activation;
                // SAFETY: the kernels are this machine's.
                self.change(*x, |kernels, row| unsafe { (kernels.activate)(activation, row) });
            }
            Op::SoftCap { x, cap } => {
                let cap = *cap;
                // SAFETY: the kernels are this machine's.
                self.change(*x, |kernels, row| unsafe { (kernels.soft_cap)(row, cap) });
            }
            Op::Scale { x, scale } => {
                self.change(*x, |_, row| row.iter_mut().for_each(|x| *x *= scale));
            }
            Op::Add { x, y, scale } => {
                let mut to = self.take(*x);
                let (rows, stride, y) = (to.rows(), to.stride, &self.buffers[y.index()]);
                let data = Shared(to.data.as_mut_ptr());
                self.each_row(rows, stride, |i| {
                    // SAFETY: row i belongs to this call.
                    let row = unsafe { data.slice(i * stride, stride) };
                    row.iter_mut().zip(y.row(i)).for_each(|(x, y)| *x += scale * y);
                });
                self.put(*x, to);
            }
            Op::Experts { x, router, experts, out } => {
                let (from, mut to) = (self.take(*x), self.take(*out));
                let logits = self.take(*router);
                self.experts(&from, &logits, experts, expert, &mut to);
                self.put(*router, logits);
                self.put(*out, to);
                self.put(*x, from);
            }
            Op::SelectRows { x, out } => {
                let mut to = self.take(*out);
                for (i, &row) in self.rows.wanted.iter().enumerate() {
                    to.row_mut(i).copy_from_slice(self.buffers[x.index()].row(row as usize));
                }
                self.put(*out, to);
            }
        }
    }

    /// A buffer, to be put back when the operation is done.
    fn take(&mut self, id: BufferId) -> Buffer {
        std::mem::take(&mut self.buffers[id.index()])
    }

    fn put(&mut self, id: BufferId, buffer: Buffer) {
        self.buffers[id.index()] = buffer;
    }

    /// Runs `job` for each of `count` rows of `width` elements, on all threads if it pays.
    fn each_row(&self, count: usize, width: usize, job: impl Fn(usize) + Sync) {
        if count * width < ALONE_ELEMENTS || count == 1 {
            (0..count).for_each(job);
        } else {
            let parts = self.scope.threads();
            self.scope.run(parts, &|part| share(count, part, parts).for_each(&job));
        }
    }

    /// Changes each row of a buffer.
    fn change(&mut self, id: BufferId, job: impl Fn(&Kernels, &mut [f32]) + Sync) {
        let mut x = self.take(id);
        let (rows, stride, kernels) = (x.rows(), x.stride, self.kernels);
        let data = Shared(x.data.as_mut_ptr());
        // SAFETY: row i belongs to this call.
        self.each_row(rows, stride, |i| job(kernels, unsafe { data.slice(i * stride, stride) }));
        self.put(id, x);
    }

    fn embed(&mut self, table: WeightId, scale: f32, out: BufferId) {
        let view = self.stage.table(table).view();
        let out = &mut self.buffers[out.index()];
        let width = out.width;
        for (i, &token) in self.rows.tokens.iter().enumerate() {
            let row = &mut out.row_mut(i)[..width];
            view.block_type.dequantize(view.row(token as usize), row);
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }

    fn add_positions(&mut self, table: WeightId, x: BufferId) {
        let view = self.stage.table(table).view();
        let x = &mut self.buffers[x.index()];
        let mut positions = vec![0.0; x.width];
        for segment in self.rows.segments {
            for i in segment.rows.clone() {
                let position = segment.position(i, self.rows.ancestors);
                view.block_type.dequantize(view.row(position), &mut positions);
                x.row_mut(i).iter_mut().zip(&positions).for_each(|(x, p)| *x += p);
            }
        }
    }

    fn norm(&self, x: &Buffer, norm: &graph::Norm, out: &mut Buffer) {
        let stage = self.stage;
        let weight = norm.weight.map_or(&stage.ones[..], |id| stage.vector(id));
        let bias = norm.bias.map_or(&stage.zeros[..], |id| stage.vector(id));
        let (stride, group, epsilon) = (x.stride, norm.group, norm.epsilon);
        let padded = group.next_multiple_of(LANES);
        // A vector has numbers for one group, or for all of a row.
        let per_row = |id: Option<WeightId>| {
            id.is_some_and(|id| {
                let view = stage.program.weight(id).tensor.view();
                view.rows * view.cols != group
            })
        };
        let (weight_per_row, bias_per_row) = (per_row(norm.weight), per_row(norm.bias));
        // SAFETY (of the kernels): they are this machine's; slices are whole vectors.
        let one = |x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]| match norm.kind {
            NormKind::Rms => {
                // SAFETY: as above.
                unsafe { (self.kernels.rms_norm)(x, group, weight, epsilon, out) };
                if norm.bias.is_some() {
                    out.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                }
            }
            NormKind::Layer => {
                let norm = LayerNorm { weight, bias, epsilon };
                // SAFETY: as above.
                unsafe { (self.kernels.layer_norm)(x, group, &norm, out) }
            }
        };
        let to = Shared(out.data.as_mut_ptr());
        self.each_row(x.rows(), x.width, |i| {
            // SAFETY: row i of `out` belongs to this call.
            let out = unsafe { to.slice(i * stride, stride) };
            if group == x.width {
                return one(x.row(i), &weight[..stride], &bias[..stride], out);
            }
            let at = |per_row: bool, first: usize| if per_row { first } else { 0 };
            if group.is_multiple_of(LANES) {
                for first in (0..x.width).step_by(group) {
                    let w = &weight[at(weight_per_row, first)..][..group];
                    let b = &bias[at(bias_per_row, first)..][..group];
                    one(&x.row(i)[first..][..group], w, b, &mut out[first..][..group]);
                }
                return;
            }
            // Other groups are padded to whole vectors one by one.
            let mut parts = [(); 4].map(|()| vec![0.0; padded]);
            for first in (0..x.width).step_by(group) {
                let [from, w, b, to] = &mut parts;
                from[..group].copy_from_slice(&x.row(i)[first..][..group]);
                w[..group].copy_from_slice(&weight[at(weight_per_row, first)..][..group]);
                b[..group].copy_from_slice(&bias[at(bias_per_row, first)..][..group]);
                one(from, w, b, to);
                out[first..][..group].copy_from_slice(&to[..group]);
            }
        });
    }

    fn multiply(&mut self, x: &Buffer, to: &mut [(WeightId, &mut Buffer)], add: bool) {
        let rows = x.rows();
        // Products of one input mostly read one form of it, and never more than each its own.
        let mut forms = 0;
        let mut targets = Vec::with_capacity(to.len());
        for (id, out) in to.iter_mut() {
            let matrix = self.stage.matrix(*id);
            assert_eq!((matrix.panels.cols, matrix.panels.rows), (x.width, out.width));
            assert_eq!(out.rows(), rows);
            let form = (self.kernels.matmul)(matrix.panels.block_type).form;
            let place = match self.quantized[..forms].iter().position(|(f, _)| *f == form) {
                Some(at) => at,
                None => {
                    if self.quantized.len() == forms {
                        self.quantized.push((form, Vec::new()));
                    }
                    self.quantized[forms].0 = form;
                    let mut quantized = std::mem::take(&mut self.quantized[forms].1);
                    self.quantize_activations(form, x, &mut quantized);
                    self.quantized[forms].1 = quantized;
                    forms += 1;
                    forms - 1
                }
            };
            targets.push((matrix, Shared(out.data.as_mut_ptr()), out.stride, place));
        }
        let (quantized, parts) = (&*self.quantized, self.scope.threads());
        self.scope.run(parts, &|part| {
            for (matrix, out, stride, place) in &targets {
                let panels = &matrix.panels;
                // SAFETY: the activations were laid out in this form, with the tile of the
                // kernels; `out` has `rows` rows of `stride`, and each part has panels of
                // its own. The kernels are those of this machine.
                unsafe {
                    matmul::multiply(
                        panels,
                        share(panels.count(), part, parts),
                        &(self.kernels.matmul)(panels.block_type),
                        quantized[*place].1.as_ptr(),
                        rows,
                        out.get(),
                        *stride,
                        matrix.bias.as_deref(),
                        add,
                    );
                }
            }
        });
    }

    /// Lays the rows of `x` out in tiles, in the form that a kernel reads.
    fn quantize_activations(&self, form: ActivationLayout, x: &Buffer, out: &mut Vec<u32>) {
        let tile = (self.kernels.matmul)(BlockType::F32).by_rows.len();
        let (rows, row_dwords) = (x.rows(), form.row_dwords(x.width));
        out.resize(rows * row_dwords, 0);
        let out = Shared(out.as_mut_ptr());
        // Rows of a tile interleave, so a tile is the unit that a thread can own.
        let job = |t: usize| {
            let n = tile.min(rows - t * tile);
            // SAFETY: tile `t` is these n rows of `out`, and only this call touches it; the
            // kernels are those of this machine.
            unsafe {
                let to = out.slice(t * tile * row_dwords, n * row_dwords);
                for r in 0..n {
                    let row = &x.row(t * tile + r)[..x.width];
                    (self.kernels.quantize_activations)(form, row, to, r, n);
                }
            }
        };
        self.each_row(rows.div_ceil(tile), tile.min(rows) * x.width, job);
    }

    fn rope_append_kv(
        &mut self,
        ids: [BufferId; 3],
        rotary: Option<RotaryId>,
        layer: usize,
        caches: &mut [&mut Cache],
    ) {
        let KvShape { head_dim, .. } = self.stage.program.layers[layer];
        let table = rotary.map(|id| (&self.stage.program.rotaries[id.index()], id));
        let [mut q, mut k, v] = ids.map(|id| self.take(id));
        for (segment, cache) in self.rows.segments.iter().zip(caches) {
            for (n, i) in segment.rows.clone().enumerate() {
                if let Some((table, id)) = table {
                    let half = table.frequencies.len();
                    let rotations = &self.rows.rotations[id.index()][i * half..][..half];
                    let (q_width, k_width) = (q.width, k.width);
                    cache::rotate(&mut q.row_mut(i)[..q_width], head_dim, rotations, table.pairs);
                    cache::rotate(&mut k.row_mut(i)[..k_width], head_dim, rotations, table.pairs);
                }
                let (k, v) = (&k.row(i)[..k.width], &v.row(i)[..v.width]);
                cache.store(layer - self.stage.layers.start, segment.first_slot + n, k, v);
            }
        }
        for (id, buffer) in ids.into_iter().zip([q, k, v]) {
            self.put(id, buffer);
        }
    }

    fn attend(
        &self,
        q: &Buffer,
        layer: usize,
        attention: &graph::Attention,
        caches: &[&mut Cache],
        out: &mut Buffer,
    ) {
        let KvShape { heads: kv_heads, head_dim } = self.stage.program.layers[layer];
        let layer = layer - self.stage.layers.start;
        let heads = q.width / head_dim;
        let window = attention.window.unwrap_or(usize::MAX);
        let sinks = attention.sinks.map_or(&[][..], |id| &self.stage.vector(id)[..heads]);
        let to = Shared(out.data.as_mut_ptr());
        let mut work = 0;
        for segment in self.rows.segments {
            work += (segment.line + segment.rows.len()).min(window) * segment.rows.len() * q.width;
        }
        let parts = if work < ALONE_ELEMENTS { 1 } else { self.scope.threads() };
        let segments = self.rows.segments;
        let job = |part: usize| {
            // The heads of all segments, one segment behind another.
            let mine = share(segments.len() * heads, part, parts);
            for (s, (segment, cache)) in segments.iter().zip(caches).enumerate() {
                let (first, end) = (mine.start.max(s * heads), mine.end.min((s + 1) * heads));
                if first >= end {
                    continue;
                }
                let heads_here = first - s * heads..end - s * heads;
                let a = Attention {
                    line: segment.line,
                    ancestors: &self.rows.ancestors[segment.rows.clone()],
                    geometry: cache.geometry(layer),
                    scale: attention.scale,
                    soft_cap: attention.soft_cap.unwrap_or(0.0),
                    sinks,
                    window,
                    group: heads / kv_heads,
                    q: &q.data[segment.rows.start * q.stride..segment.rows.end * q.stride],
                    out: to.get().wrapping_add(segment.rows.start * q.stride),
                    stride: q.stride,
                };
                SCRATCH.with_borrow_mut(|scratch| {
                    // SAFETY: the rows were stored, so the layer has all their slots; heads are
                    // shared out without overlap; the kernels are this machine's.
                    unsafe {
                        match &cache.layers {
                            Layers::F16(l) => {
                                (self.kernels.attend_f16)(&a, &l[layer], heads_here, scratch);
                            }
                            Layers::F32(l) => {
                                (self.kernels.attend_f32)(&a, &l[layer], heads_here, scratch);
                            }
                        }
                    }
                });
            }
        };
        self.scope.run(parts, &job);
    }

    fn gate(&self, gating: graph::Gating, gate: &mut Buffer, up: &Buffer) {
        let (stride, rows) = (gate.stride, gate.rows());
        let to = Shared(gate.data.as_mut_ptr());
        self.each_row(rows, stride, |i| {
            // SAFETY: row i of `gate` belongs to this call; the kernels are this machine's.
            unsafe { (self.kernels.gate)(gating, to.slice(i * stride, stride), up.row(i)) };
        });
    }

    /// A mixture of experts: one expert after the other, each over all rows that chose it.
    fn experts(
        &mut self,
        x: &Buffer,
        router: &Buffer,
        experts: &Experts,
        [rows_of, gates, ups]: &mut [Buffer; 3],
        out: &mut Buffer,
    ) {
        let chosen: Vec<_> =
            (0..x.rows()).map(|i| route(&router.row(i)[..router.width], experts)).collect();
        out.data.fill(0.0);
        for (number, expert) in experts.experts.iter().enumerate() {
            let weight_of = |choice: &Vec<(usize, f32)>| {
                choice.iter().find(|(chosen, _)| *chosen == number).map(|(_, weight)| *weight)
            };
            let rows: Vec<_> = chosen
                .iter()
                .enumerate()
                .filter_map(|(i, choice)| weight_of(choice).map(|weight| (i, weight)))
                .collect();
            if rows.is_empty() {
                continue;
            }
            let inner = self.stage.matrix(expert.up).panels.rows;
            for (buffer, width) in
                [(&mut *rows_of, x.width), (&mut *gates, inner), (&mut *ups, inner)]
            {
                // (There is room: it was reserved for all rows of the pass, as wide as the widest.)
                buffer.shape(width, rows.len());
            }
            for (n, (i, _)) in rows.iter().enumerate() {
                rows_of.row_mut(n).copy_from_slice(x.row(*i));
            }
            self.multiply(
                rows_of,
                &mut [(expert.gate, &mut *gates), (expert.up, &mut *ups)],
                false,
            );
            self.gate(experts.gating, gates, ups);
            self.multiply(gates, &mut [(expert.down, &mut *rows_of)], false);
            for (n, (i, weight)) in rows.iter().enumerate() {
                let from = rows_of.row(n);
                out.row_mut(*i).iter_mut().zip(from).for_each(|(x, y)| *x += weight * y);
            }
        }
    }
}

/// The experts that a row uses, with their weights. Of equal logits the first is chosen.
fn route(logits: &[f32], experts: &Experts) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(experts.used);
    let largest = f64::from(logits[order[0]]);
    let exp = |i: usize| (f64::from(logits[i]) - largest).exp();
    let over: f64 = match experts.routing {
        Routing::Softmax => (0..logits.len()).map(exp).sum(),
        // (What all are divided by cancels where those chosen are normalized.)
        Routing::SoftmaxNormalized | Routing::SoftmaxOfChosen => {
            order.iter().map(|&i| exp(i)).sum()
        }
        Routing::Sigmoid => 1.0,
    };
    let weight = |i: usize| {
        let weight = match experts.routing {
            Routing::Sigmoid => 1.0 / (1.0 + (-f64::from(logits[i])).exp()),
            _ => exp(i) / over,
        };
        weight as f32 * experts.scale
    };
    order.into_iter().map(|i| (i, weight(i))).collect()
}
