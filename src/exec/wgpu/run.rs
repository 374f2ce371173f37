//! Passes: the steps of a plan as dispatches over the rows of a pass.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::cache::GpuCache;
use super::device::{Recorder, Storage};
use super::fuse::{self, Facts, MatrixFacts, Product, RowClass, Step, Twin};
use super::kernels::{
    Arithmetic, BATCH_ROWS, Epilogue, Kernel, MAX_HEAD, MOST_OUTPUTS, Matmul, PATH_WORDS, QUERIES,
    SORTED, SPLIT, TILE_BATCH_ROWS,
};
use super::weights::{Matrix, Part, Weight};
use super::{CHUNK, Gpu};
use crate::error::{Error, Result};
use crate::exec::{self, CacheType, KvCache, Loaded, Rows, Segment, Stage, Workspace};
use crate::graph::{
    Attention, BufferId, BufferShape, KvShape, Norm, NormKind, Op, Program, RotaryId, RotaryPairs,
    WeightId,
};
use crate::lm::TopK;

/// More rows of activations than these go in tiles: two batches of eight cost less than a tile.
const MOST_UNTILED_ROWS: usize = 16;

/// The fewest rows of which several share what attention reads.
const LEAST_SHARING: usize = 32;

/// Where the biases of a product begin that has none, or the sinks of an attention.
const NONE: usize = u32::MAX as usize;

/// The most numbers of a row that are looked for on the device.
pub(super) const MOST_TOP: usize = 64;

/// Parameters of a product: those of `shaders/matmul.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct ProductParams {
    chunks: u32,
    row_bytes: u32,
    rows: u32,
    begins: u32,
    batch_rows: u32,
    x_stride: u32,
    squares: u32,
    inverse_width: f32,
    epsilon: f32,
    first: u32,
    bias_at: u32,
    add: u32,
    /// Of the outputs.
    strides: [u32; MOST_OUTPUTS],
    second: u32,
    third: u32,
    out_squares: u32,
    numbers: [f32; 2],
    above: u32,
    head_dim: u32,
    pairs: u32,
    halves: u32,
    rotations_at: u32,
    first_slot: u32,
    kv_pairs: u32,
}

/// Some operations of a program with their weights on the device.
pub(super) struct GpuStage {
    gpu: Arc<Gpu>,
    program: Arc<Program>,
    ops: Range<usize>,
    weights: Vec<Option<Weight>>,
    matrices: Vec<Option<MatrixFacts>>,
    /// The buffers that the operations use.
    buffers: Vec<BufferId>,
    /// The steps for each class of rows, once there were such rows.
    plans: [OnceLock<Vec<Step>>; RowClass::COUNT],
}

impl GpuStage {
    pub fn load(
        gpu: Arc<Gpu>,
        program: &Arc<Program>,
        ops: Range<usize>,
        loaded: Loaded<'_>,
    ) -> Result<Self> {
        let refuse = |what: String| {
            let file = program.weights.first().map_or("the model", |w| w.tensor.view().file);
            Err(Error::unsupported(file, format!("{what}; it runs on the CPU")))
        };
        let name = gpu.adapter.name();
        for op in &program.ops[ops.clone()] {
            if let Op::Experts { .. } = op {
                return refuse(format!("{name} runs no mixtures of experts"));
            }
            let Some(KvShape { head_dim, .. }) = op.layer().map(|layer| program.layers[layer])
            else {
                continue;
            };
            if head_dim % 2 != 0 || head_dim > MAX_HEAD {
                return refuse(format!(
                    "it has heads of {head_dim} elements; {name} runs heads of an even number, up to {MAX_HEAD}"
                ));
            }
        }
        gpu.device.check()?;
        let weights = gpu.load_weights(program, ops.clone(), loaded)?;
        Ok(GpuStage::new(gpu, program.clone(), ops, weights))
    }

    /// A stage with weights that are there already.
    pub fn new(
        gpu: Arc<Gpu>,
        program: Arc<Program>,
        ops: Range<usize>,
        weights: Vec<Option<Weight>>,
    ) -> Self {
        let matrices = gpu.matrix_facts(&weights, &program.ops[ops.clone()]);
        let mut buffers = Vec::new();
        for op in &program.ops[ops.clone()] {
            op.each_buffer(|id, _, _| buffers.push(id));
        }
        buffers.sort_unstable();
        buffers.dedup();
        GpuStage { gpu, program, ops, weights, matrices, buffers, plans: Default::default() }
    }

    /// The steps for rows of a class.
    pub(super) fn plan(&self, class: RowClass) -> &[Step] {
        self.plans[class.index()].get_or_init(|| {
            let (program, matrices) = (&*self.program, &*self.matrices);
            let facts = Facts { program, matrices, fused: self.gpu.variants.fused };
            fuse::fuse(&facts, self.ops.clone(), class)
        })
    }

    fn matrix(&self, id: WeightId) -> &Matrix {
        match &self.weights[id.index()] {
            Some(Weight::Matrix(matrix) | Weight::Table(matrix)) => matrix,
            other => unreachable!("{other:?} is used as a matrix"),
        }
    }

    /// A vector, or something to bind where there is none.
    fn vector(&self, id: Option<WeightId>) -> &Arc<Storage> {
        match id.and_then(|id| self.weights[id.index()].as_ref()) {
            Some(Weight::Vector(floats)) => floats,
            _ => &self.gpu.nothing[0],
        }
    }
}

impl Stage for GpuStage {
    fn cache(&self, cache_type: CacheType) -> Box<dyn KvCache> {
        let layers = self.program.layers_of(self.ops.clone());
        let shapes = self.program.layers[layers.clone()].to_vec();
        Box::new(GpuCache::new(self.gpu.clone(), layers.start, shapes, cache_type))
    }

    fn workspace(&self) -> Box<dyn Workspace> {
        let buffer = |shape: &BufferShape| Buffer { shape: *shape, capacity: 0, storage: None };
        Box::new(GpuWorkspace {
            gpu: self.gpu.clone(),
            buffers: self.program.buffers.iter().map(buffer).collect(),
            twins: Vec::new(),
            scratch: [None, None],
        })
    }

    fn run(
        &self,
        rows: &Rows<'_>,
        caches: &mut [&mut dyn KvCache],
        workspace: &mut dyn Workspace,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        self.gpu.device.check()?;
        let workspace: &mut GpuWorkspace = exec::own(workspace);
        let mut own_caches: Vec<&mut GpuCache> = Vec::new();
        for (cache, segment) in caches.iter_mut().zip(rows.segments) {
            let cache: &mut GpuCache = exec::own(&mut **cache);
            cache.reserve(segment.first_slot + segment.rows.len())?;
            own_caches.push(cache);
        }
        for &id in &self.buffers {
            workspace.make_room(id, rows.count(self.program.buffer(id).rows))?;
        }
        let mut recorder = Recorder::new(&self.gpu.device)?;
        recorder.data(rows.tokens.iter().copied());
        let mut positions = Vec::with_capacity(rows.len());
        for segment in rows.segments {
            let of_rows = segment.rows.clone().map(|row| segment.position(row, rows.ancestors));
            positions.extend(of_rows.map(|position| position as u32));
        }
        let positions_at = recorder.data(positions);
        let paths_at = recorder.data(rows.ancestors.iter().flat_map(|&row| path_words(row)));
        let rotations = rows.rotations.iter();
        let rotations_at = rotations
            .map(|table| recorder.data(table.iter().flatten().map(|x| x.to_bits())))
            .collect();
        let wanted_at = recorder.data(rows.wanted.iter().copied());
        let class = RowClass {
            tiled: rows.len() > MOST_UNTILED_ROWS,
            wanted_tiled: rows.wanted.len() > MOST_UNTILED_ROWS,
            several: rows.segments.len() > 1,
        };
        let mut pass = Pass {
            stage: self,
            rows,
            caches: own_caches,
            workspace,
            recorder,
            positions_at,
            paths_at,
            rotations_at,
            wanted_at,
        };
        for step in self.plan(class) {
            if matches!(step, Step::SelectRows { .. }) && rows.wanted.is_empty() {
                break;
            }
            pass.step(step)?;
        }
        pass.recorder.finish()
    }
}

/// How many rows of the tree a row sees, and which, four to a word.
fn path_words(ancestors: u128) -> [u32; PATH_WORDS] {
    let mut words = [0; PATH_WORDS];
    words[0] = ancestors.count_ones();
    let (mut left, mut i) = (ancestors, 0);
    while left != 0 {
        words[1 + i / 4] |= left.trailing_zeros() << (8 * (i % 4));
        left &= left - 1;
        i += 1;
    }
    words
}

/// Activations on the device: rows of f32, each padded with zeros to whole chunks.
struct Buffer {
    shape: BufferShape,
    /// Rows that there is room for.
    capacity: usize,
    storage: Option<Arc<Storage>>,
}

impl Buffer {
    fn stride(&self) -> usize {
        self.shape.width.next_multiple_of(CHUNK)
    }
}

/// The activations of one pass at a time.
pub(super) struct GpuWorkspace {
    gpu: Arc<Gpu>,
    buffers: Vec<Buffer>,
    /// Rows as bytes or halves, and their scales.
    twins: Vec<[Option<Arc<Storage>>; 2]>,
    /// Partial sums of attention, or the largest of slices of rows; the largest of rows.
    scratch: [Option<Arc<Storage>>; 2],
}

impl GpuWorkspace {
    fn make_room(&mut self, id: BufferId, rows: usize) -> Result<()> {
        let buffer = &mut self.buffers[id.index()];
        if rows > buffer.capacity || buffer.storage.is_none() {
            // A few sizes, so that buffers settle: one token, a few drafted ones, a prompt.
            let capacity = if rows <= 8 { 8 } else { rows.next_multiple_of(128) };
            let bytes = 4 * (capacity * buffer.stride()) as u64;
            self.gpu.device.grow(&mut buffer.storage, bytes)?;
            buffer.capacity = capacity;
        }
        Ok(())
    }

    fn storage(&self, id: BufferId) -> Arc<Storage> {
        self.buffers[id.index()].storage.clone().expect("a pass makes room for its buffers")
    }

    /// A buffer with so many rows that a pass has left.
    fn written(&self, id: BufferId, rows: &Range<usize>) -> Result<(&Buffer, Arc<Storage>)> {
        let buffer = &self.buffers[id.index()];
        match &buffer.storage {
            Some(storage) if rows.end <= buffer.capacity => Ok((buffer, storage.clone())),
            _ => Err(self.gpu.device.fault(format!("has no rows {rows:?} to read"))),
        }
    }

    fn twin(&mut self, twin: Twin, rows: usize, stride: usize) -> Result<[Arc<Storage>; 2]> {
        if self.twins.len() <= twin.0 {
            self.twins.resize(twin.0 + 1, [None, None]);
        }
        let element = if self.gpu.arithmetic == Arithmetic::F16 { 2 } else { 1 };
        // Scale and sums of each block, and the sum of its squares: an even number of them.
        let scales = rows * (stride / CHUNK * 3 + 1);
        let [of_values, of_scales] = &mut self.twins[twin.0];
        Ok([
            grow(&self.gpu, of_values, element * rows * stride)?,
            grow(&self.gpu, of_scales, 4 * scales)?,
        ])
    }

    fn scratch(&mut self, which: usize, floats: usize) -> Result<Arc<Storage>> {
        grow(&self.gpu, &mut self.scratch[which], 4 * floats)
    }
}

/// Room for so many bytes, in one of a few sizes.
fn grow(gpu: &Gpu, place: &mut Option<Arc<Storage>>, bytes: usize) -> Result<Arc<Storage>> {
    let limit = gpu.device.binding_limit().max(bytes as u64);
    gpu.device.grow(place, (bytes.max(1) as u64).next_power_of_two().min(limit))
}

impl Workspace for GpuWorkspace {
    fn write(&mut self, buffer: BufferId, rows: &[f32]) -> Result<()> {
        let (width, stride) =
            (self.buffers[buffer.index()].shape.width, self.buffers[buffer.index()].stride());
        assert_eq!(rows.len() % width, 0);
        self.gpu.device.check()?;
        self.make_room(buffer, rows.len() / width)?;
        let storage = self.storage(buffer);
        if stride == width {
            self.gpu.device.write(&storage, 0, rows);
        } else {
            for (i, row) in rows.chunks_exact(width).enumerate() {
                self.gpu.device.write(&storage, 4 * (i * stride) as u64, row);
            }
        }
        self.gpu.device.check()
    }

    fn read<'a>(
        &'a mut self,
        buffer: BufferId,
        rows: Range<usize>,
        copy: &'a mut Vec<f32>,
    ) -> Result<&'a [f32]> {
        copy.clear();
        if rows.is_empty() {
            return Ok(copy);
        }
        let (found, storage) = self.written(buffer, &rows)?;
        let (width, stride) = (found.shape.width, found.stride());
        let show = |bytes: &[u8]| copy.extend_from_slice(bytemuck::cast_slice(bytes));
        let (at, bytes) = (4 * rows.start * stride, 4 * rows.len() * stride);
        self.gpu.device.read_bytes(&storage, at as u64, bytes as u64, show)?;
        if stride != width {
            for row in 1..rows.len() {
                copy.copy_within(row * stride..row * stride + width, row * width);
            }
            copy.truncate(rows.len() * width);
        }
        Ok(copy)
    }

    fn top_k(
        &mut self,
        buffer: BufferId,
        rows: Range<usize>,
        k: usize,
        temperature: f32,
        into: &mut TopK,
    ) -> Result<bool> {
        let (found, storage) = self.written(buffer, &rows)?;
        let (width, stride) = (found.shape.width, found.stride());
        if k == 0 || k > MOST_TOP || k > width || rows.is_empty() {
            return Ok(false);
        }
        let words = 1 + 2 * k;
        let slices = width.div_ceil(SORTED);
        let lists = self.scratch(0, rows.len() * slices * (words + 1))?;
        let found = self.scratch(1, rows.len() * words)?;
        let inverse = bits(1.0 / temperature);
        let mut recorder = Recorder::new(&self.gpu.device)?;
        let (params, groups) = ([width, stride, k, inverse, rows.start], [slices, rows.len(), 1]);
        recorder.dispatch(Kernel::TopK, &[&storage, &lists], &params, groups)?;
        let (params, groups) = ([slices, k, inverse], [rows.len(), 1, 1]);
        recorder.dispatch(Kernel::TopKMerge, &[&lists, &found], &params, groups)?;
        recorder.finish()?;
        let mut copy = Vec::new();
        self.gpu.device.read(&found, rows.len() * words, &mut copy)?;
        take_top(&copy, k, width, temperature, into).map_err(|what| self.gpu.device.fault(what))
    }
}

/// Takes the largest of rows as `top_k_merge.wgsl` leaves them: what a device says is not trusted. False if there
/// is something that is not a number.
fn take_top(
    found: &[f32],
    k: usize,
    vocab_size: usize,
    temperature: f32,
    into: &mut TopK,
) -> Result<bool, String> {
    into.k = k;
    into.top.clear();
    into.log_sum_exp.clear();
    for row in found.chunks_exact(1 + 2 * k) {
        // What is not a number must be seen: it is in the sum, and nowhere else.
        if !row[0].is_finite() {
            return Ok(false);
        }
        for entry in row[1..].chunks_exact(2) {
            let token = entry[0].to_bits();
            if token as usize >= vocab_size {
                return Err(format!("found token {token} among {vocab_size}"));
            }
            into.top.push((token, entry[1]));
        }
        into.log_sum_exp.push(f64::from(row[2] / temperature) + f64::from(row[0]).ln());
    }
    Ok(true)
}

/// A buffer as the rows of this pass are in it.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    width: usize,
    stride: usize,
}

impl Shape {
    /// vec4s of a row.
    fn stride4(&self) -> usize {
        self.stride / 4
    }

    /// Workgroups that have a vec4 of a row to a thread.
    fn groups4(&self) -> [usize; 3] {
        [self.stride4().div_ceil(64), self.rows, 1]
    }

    /// Where the sums of squares of a twin's blocks begin among its scales: never at 0.
    fn squares_at(&self) -> usize {
        2 * self.rows * self.stride / CHUNK
    }
}

/// The bits of an f32 parameter.
fn bits(x: f32) -> usize {
    x.to_bits() as usize
}

/// A pass under way.
struct Pass<'a> {
    stage: &'a GpuStage,
    rows: &'a Rows<'a>,
    caches: Vec<&'a mut GpuCache>,
    workspace: &'a mut GpuWorkspace,
    recorder: Recorder<'a>,
    /// Where the rows' positions and paths are; each table of rotations; the numbers of the wanted rows. (Tokens
    /// come first.)
    positions_at: usize,
    paths_at: usize,
    rotations_at: Vec<usize>,
    wanted_at: usize,
}

impl Pass<'_> {
    fn shape(&self, id: BufferId) -> Shape {
        let BufferShape { width, rows } = self.stage.program.buffer(id);
        let stride = width.next_multiple_of(CHUNK);
        Shape { rows: self.rows.count(rows), width, stride }
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let storage = |id| self.workspace.storage(id);
        match *step {
            Step::Embed { table, scale, out } => self.look_up(table, scale, 0, false, out),
            Step::AddPositions { table, x } => self.look_up(table, 1.0, self.positions_at, true, x),
            Step::Norm { x, norm, out, bytes } => self.norm(x, norm, out, bytes),
            Step::NormScale { x, weight, to } => {
                let shape = self.shape(x);
                let buffers = [&storage(x), self.stage.vector(Some(weight))];
                let params = [shape.stride4(), shape.squares_at()];
                self.round(Kernel::RmsNormScale, &buffers, Some(to), x, &params, shape.groups4())
            }
            Step::Round { x, to } => {
                let shape = self.shape(x);
                let blocks = shape.stride / CHUNK;
                let (kernel, groups) = match self.stage.gpu.arithmetic {
                    Arithmetic::F16 => (Kernel::CastF16, [shape.rows, 1, 1]),
                    _ => (Kernel::Quantize, [blocks.div_ceil(64), shape.rows, 1]),
                };
                let params = [shape.stride4(), blocks];
                self.round(kernel, &[&storage(x)], Some(to), x, &params, groups)
            }
            Step::Product(ref product) => self.product(product),
            Step::RopeAppendKv { outs, rotary, layer } => self.rope(outs, rotary, layer),
            Step::Attend { q, layer, attention, out, bytes } => {
                self.attend(q, layer, attention, out, bytes)
            }
            Step::Elementwise { function, x, y, numbers: [a, b], bytes } => {
                let shape = self.shape(x);
                let y = y.map_or_else(|| self.stage.gpu.nothing[0].clone(), storage);
                let kernel = Kernel::Elementwise { function, bytes: bytes.is_some() };
                let params = [shape.stride4(), bits(a), bits(b)];
                self.round(kernel, &[&storage(x), &y], bytes, x, &params, shape.groups4())
            }
            Step::SelectRows { x, out } => {
                let shape = self.shape(out);
                let (buffers, params) =
                    ([&storage(x), &storage(out)], [shape.stride4(), self.wanted_at]);
                self.recorder.dispatch(Kernel::SelectRows, &buffers, &params, shape.groups4())
            }
        }
    }

    /// Runs a kernel over rows like those of `like`, which it may write as bytes or halves to a twin.
    fn round(
        &mut self,
        kernel: Kernel,
        buffers: &[&Arc<Storage>],
        twin: Option<Twin>,
        like: BufferId,
        params: &[usize],
        groups: [usize; 3],
    ) -> Result<()> {
        let Shape { rows, stride, .. } = self.shape(like);
        let twin = twin.map(|twin| self.workspace.twin(twin, rows, stride)).transpose()?;
        let mut buffers = buffers.to_vec();
        buffers.extend(twin.iter().flatten());
        self.recorder.dispatch(kernel, &buffers, params, groups)
    }

    /// Rows of a table, by the entries that the words from `entries_at` on name.
    fn look_up(
        &mut self,
        table: WeightId,
        scale: f32,
        entries_at: usize,
        add: bool,
        out: BufferId,
    ) -> Result<()> {
        let (table, shape) = (self.stage.matrix(table), self.shape(out));
        let out = self.workspace.storage(out);
        let (cols, chunks) = (table.cols, table.cols.div_ceil(CHUNK));
        let (stride, add, scale) = (shape.stride4(), usize::from(add), bits(scale));
        let groups = [chunks.div_ceil(64), shape.rows, 1];
        for Part { bytes, first, rows, .. } in &table.parts.parts {
            let row = table.row_bytes;
            let params = [cols, chunks, row, *first, *rows, stride, entries_at, add, scale];
            self.recorder.dispatch(Kernel::Embed(table.block), &[bytes, &out], &params, groups)?;
        }
        Ok(())
    }

    fn norm(&mut self, x: BufferId, norm: Norm, out: BufferId, bytes: Option<Twin>) -> Result<()> {
        let (shape, from) = (self.shape(x), self.workspace.storage(x));
        let [weight, bias] = [norm.weight, norm.bias].map(|id| self.stage.vector(id));
        let to = self.workspace.storage(out);
        let (whole, epsilon) = (norm.group == shape.width, bits(norm.epsilon));
        let (params, groups) = ([shape.width, shape.stride4(), epsilon], [shape.rows, 1, 1]);
        match (norm.kind, norm.weight, norm.bias) {
            (NormKind::Rms, Some(_), None) if whole => {
                self.recorder.dispatch(Kernel::RmsNorm, &[&from, weight, &to], &params, groups)
            }
            (NormKind::Layer, Some(_), Some(_)) if whole => {
                let kernel = Kernel::LayerNorm { bytes: bytes.is_some() };
                self.round(kernel, &[&from, weight, bias, &to], bytes, out, &params, groups)
            }
            (kind, ..) => {
                // How far the numbers of two groups are apart: all may have the same.
                let step = |id: Option<WeightId>| {
                    let view = id.map(|id| self.stage.program.weight(id).tensor.view());
                    let is_of_rows = view.is_some_and(|view| view.rows * view.cols == shape.width);
                    if is_of_rows { norm.group } else { 0 }
                };
                let steps = [norm.weight, norm.bias].map(step);
                let params = [norm.group, shape.stride, epsilon, steps[0], steps[1]];
                let (weighted, biased) = (norm.weight.is_some(), norm.bias.is_some());
                let kernel = Kernel::GroupNorm { kind, weight: weighted, bias: biased };
                let groups = [shape.width / norm.group, shape.rows, 1];
                self.recorder.dispatch(kernel, &[&from, weight, bias, &to], &params, groups)
            }
        }
    }

    /// Products of the same rows with matrices of which each follows the one before.
    fn product(&mut self, product: &Product) -> Result<()> {
        let stage = self.stage;
        let (matrix, x) = (stage.matrix(product.matrices[0].0), self.shape(product.x));
        let outs: Vec<_> = product.matrices.iter().map(|(_, out)| *out).collect();
        let [nothing, no_second, no_third] = &stage.gpu.nothing;
        let (values, scales) = match product.rounded {
            Some(rounded) => self.workspace.twin(rounded.twin, x.rows, x.stride)?.into(),
            None => (self.workspace.storage(product.x), nothing.clone()),
        };
        let epsilon = product.rounded.and_then(|rounded| rounded.epsilon);
        let arithmetic = stage.gpu.arithmetic_with(matrix.block);
        let in_step = if arithmetic == Arithmetic::Int8 { CHUNK } else { 4 };
        // All rows of several matrices, or the parts of one.
        let several = outs.len() > 1;
        // Where the outputs begin among the rows of all matrices, and where these end.
        let mut begins = [0; MOST_OUTPUTS + 1];
        for (i, begin) in (1..).zip(&mut begins[1..]) {
            let before = product.matrices.iter().take(i);
            *begin = before.map(|(id, _)| stage.matrix(*id).rows as u32).sum();
        }
        let strides = [0, 1, 2].map(|i| outs.get(i).map_or(0, |id| self.shape(*id).stride as u32));
        let mut params = ProductParams {
            chunks: matrix.cols.div_ceil(CHUNK) as u32,
            row_bytes: matrix.row_bytes as u32,
            batch_rows: x.rows as u32,
            x_stride: (x.stride / in_step) as u32,
            squares: epsilon.map_or(0, |_| x.squares_at() as u32),
            inverse_width: 1.0 / x.width as f32,
            epsilon: epsilon.unwrap_or_default(),
            add: u32::from(product.add),
            strides,
            second: begins[1],
            third: begins[2],
            ..ProductParams::default()
        };
        let mut outputs = vec![self.workspace.storage(outs[0])];
        let out = self.shape(outs[0]);
        let epilogue = match product.epilogue {
            fuse::Epilogue::Store if several => {
                for (i, none) in [(1, no_second), (2, no_third)] {
                    let other = outs.get(i).map(|id| self.workspace.storage(*id));
                    outputs.push(other.unwrap_or_else(|| none.clone()));
                }
                Epilogue::Three
            }
            fuse::Epilogue::Store => Epilogue::One,
            fuse::Epilogue::Norm { weight, to } => {
                params.out_squares = out.squares_at() as u32;
                outputs.push(stage.vector(Some(weight)).clone());
                outputs.extend(self.workspace.twin(to, out.rows, out.stride)?);
                Epilogue::Norm
            }
            fuse::Epilogue::Gate { gating, to } => {
                params.numbers = fuse::numbers(gating);
                outputs.extend(self.workspace.twin(to, out.rows, out.stride)?);
                Epilogue::Gate(gating.into())
            }
            fuse::Epilogue::Rope { outs: [q, k, _], rotary, layer, above } => {
                let kv = stage.program.layers[layer];
                let (q_shape, k_width) = (self.shape(q), self.shape(k).width);
                let [pairs, halves, rotations_at] = self.rotation(rotary).map(|n| n as u32);
                params = ProductParams {
                    strides: [q_shape.stride as u32, 0, 0],
                    second: q_shape.width as u32,
                    third: (q_shape.width + k_width) as u32,
                    above: above as u32,
                    head_dim: kv.head_dim as u32,
                    pairs,
                    halves,
                    rotations_at,
                    first_slot: self.rows.segments[0].first_slot as u32,
                    kv_pairs: (kv.width() / 2) as u32,
                    ..params
                };
                let cache = &self.caches[0];
                outputs = vec![self.workspace.storage(q)];
                outputs.extend(cache.layer(layer).iter().cloned());
                Epilogue::Rope(cache.cache_type)
            }
        };
        let widest = BATCH_ROWS[BATCH_ROWS.len() - 1];
        // The least that is enough, or the largest.
        let fits = BATCH_ROWS.iter().copied().find(|&n| n as usize >= x.rows).unwrap_or(widest);
        let batch_rows = if matrix.agreement.tiles && x.rows > MOST_UNTILED_ROWS {
            TILE_BATCH_ROWS
        } else if stage.gpu.variants.padded || !matrix.agreement.batch_rows {
            widest
        } else {
            fits
        };
        let matmul = Matmul { block: matrix.block, arithmetic, batch_rows, epilogue };
        let batches = x.rows.div_ceil(batch_rows as usize);
        let bias = matrix.bias.as_ref().map_or(nothing, |(floats, _)| floats);
        for part in &matrix.parts.parts {
            let rows = if several { begins[MOST_OUTPUTS] as usize } else { part.rows };
            let row_groups = match epilogue {
                Epilogue::Gate(_) => matrix.rows / CHUNK,
                _ => rows.div_ceil(matmul.group_rows()),
            };
            let bias_at = matrix.bias.as_ref().map_or(NONE, |(_, at)| at + part.first);
            let params = ProductParams {
                rows: rows as u32,
                begins: part.begins as u32,
                first: part.first as u32,
                bias_at: bias_at as u32,
                ..params
            };
            let mut buffers = vec![&part.bytes, &values, &scales, bias];
            buffers.extend(&outputs);
            let groups =
                if matmul.is_tiled() { [batches, row_groups, 1] } else { [row_groups, batches, 1] };
            let (params, shape) = ([params], Some([rows, matrix.cols]));
            let words = bytemuck::cast_slice(&params);
            self.recorder.dispatch_words(Kernel::Matmul(matmul), &buffers, words, groups, shape)?;
        }
        Ok(())
    }

    /// How many pairs of a head are rotated, whether they are halves, and where the rotations are.
    fn rotation(&self, rotary: Option<RotaryId>) -> [usize; 3] {
        let Some(id) = rotary else { return [0; 3] };
        let table = &self.stage.program.rotaries[id.index()];
        let halves = usize::from(table.pairs == RotaryPairs::Halves);
        [table.frequencies.len(), halves, self.rotations_at[id.index()]]
    }

    fn rope(
        &mut self,
        [q, k, v]: [BufferId; 3],
        rotary: Option<RotaryId>,
        layer: usize,
    ) -> Result<()> {
        let kv = self.stage.program.layers[layer];
        let [pairs, halves, rotations_at] = self.rotation(rotary);
        let (q_shape, kv_stride) = (self.shape(q), self.shape(k).stride);
        let (heads, kv_heads, dim) = (q_shape.width / kv.head_dim, kv.heads, kv.head_dim);
        let [q, k, v] = [q, k, v].map(|id| self.workspace.storage(id));
        for (segment, cache) in self.rows.segments.iter().zip(&self.caches) {
            let [keys, values] = cache.layer(layer);
            let [first, slot] = [segment.rows.start, segment.first_slot];
            let shape = [heads, kv_heads, dim, pairs, q_shape.stride, kv_stride];
            let params = [&shape[..], &[first, slot, rotations_at, halves]].concat();
            let kernel = Kernel::RopeAppendKv(cache.cache_type);
            let threads = heads * pairs + kv.width();
            let groups = [threads.div_ceil(64), segment.rows.len(), 1];
            self.recorder.dispatch(kernel, &[&q, &k, &v, keys, values], &params, groups)?;
        }
        Ok(())
    }

    fn attend(
        &mut self,
        q: BufferId,
        layer: usize,
        attention: Attention,
        out: BufferId,
        bytes: Option<Twin>,
    ) -> Result<()> {
        let sinks_at = match attention.sinks.map(|id| &self.stage.weights[id.index()]) {
            Some(Some(Weight::Sinks(sinks))) => {
                self.recorder.data(sinks.iter().map(|sink| sink.to_bits()))
            }
            _ => NONE,
        };
        let KvShape { heads: kv_heads, head_dim } = self.stage.program.layers[layer];
        let shape = self.shape(q);
        let (heads, stride) = (shape.width / head_dim, shape.stride);
        let window = attention.window.map_or(NONE, |window| window.min(NONE));
        let [scale, cap] = [attention.scale, attention.soft_cap.unwrap_or(0.0)].map(bits);
        let (paths_at, q, to) =
            (self.paths_at, self.workspace.storage(q), self.workspace.storage(out));
        for (i, Segment { rows, line, .. }) in self.rows.segments.iter().enumerate() {
            let (line, count) = (*line, rows.len());
            let ancestors = &self.rows.ancestors[rows.clone()];
            let deepest = ancestors.iter().map(|path| path.count_ones()).max().unwrap_or(0);
            let splits = (line + deepest as usize).div_ceil(SPLIT);
            // One split is written where it belongs; several are merged.
            let row_floats = if splits > 1 { heads * splits * (head_dim + 2) } else { 0 };
            let fit = match row_floats {
                0 => count,
                floats => self.stage.gpu.partial_limit / (4 * floats),
            };
            // Rows of a chain share what they read, if there are many: few had better be many workgroups.
            let shares = count >= LEAST_SHARING && is_chain(ancestors);
            let queries = if shares { QUERIES as usize } else { 1 };
            let whole = (fit / queries).max(1) * queries;
            let at_once = if fit < count { whole } else { count };
            let partial = self.workspace.scratch(0, at_once * row_floats)?;
            let cache = &self.caches[i];
            let ([keys, values], cache) = (cache.layer(layer).clone(), cache.cache_type);
            // What is read at once has up to 16 bytes, and does not go beyond a head.
            let most = if cache == CacheType::F16 { 4 } else { 2 };
            let fits = |n: &usize| *n <= most && (head_dim / 2).is_multiple_of(*n);
            let pairs = [4, 2].into_iter().find(fits).unwrap_or(1) as u32;
            let of_bytes = bytes.is_some();
            let attend = Kernel::Attend { cache, pairs, queries: queries as u32, bytes: of_bytes };
            let buffers = [&q, &keys, &values, &partial, &to];
            for first in rows.clone().step_by(at_once) {
                let end = rows.end.min(first + at_once);
                let heads_and_rows = [heads / kv_heads, kv_heads, head_dim, stride, line, paths_at];
                let others = [scale, first, end, splits, window, cap, sinks_at];
                let params = [&heads_and_rows[..], &others].concat();
                let groups = [heads, (end - first).div_ceil(queries), splits];
                self.round(attend, &buffers, bytes, out, &params, groups)?;
                if splits > 1 {
                    let reduce = Kernel::AttendReduce { bytes: of_bytes };
                    let params =
                        [head_dim, stride, line, paths_at, first, splits, window, sinks_at];
                    let groups = [heads, end - first, 1];
                    self.round(reduce, &[&partial, &to], bytes, out, &params, groups)?;
                }
            }
        }
        Ok(())
    }
}

/// Whether each row sees what the one before it does, in the same order, and more.
fn is_chain(paths: &[u128]) -> bool {
    paths.windows(2).all(|two| {
        let more = two[0] ^ two[1];
        // (All that is new comes behind all that was.)
        more & two[0] == 0 && more.trailing_zeros() >= 128 - two[0].leading_zeros()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_chain_see_what_those_before_them_do_and_more_behind_it() {
        assert!(is_chain(&[]) && is_chain(&[0b1]) && is_chain(&[0b1, 0b11, 0b10_0111]));
        assert!(is_chain(&[0b10, 0b10, 0b1010, u128::MAX << 3 & !0b100 | 0b1010]));
        for no_chain in [[0b1, 0b10], [0b11, 0b1], [0b101, 0b111], [1 << 127, 1 << 127 | 1]] {
            assert!(!is_chain(&no_chain), "{no_chain:?}");
        }
    }

    #[test]
    fn tokens_that_the_vocabulary_does_not_have_are_errors() {
        let row = |token: u32| [2.0, f32::from_bits(token), 1.5, f32::from_bits(3), 1.0];
        let mut top = TopK::default();
        assert_eq!(take_top(&row(9), 2, 10, 1.0, &mut top), Ok(true));
        assert_eq!(top.top, [(9, 1.5), (3, 1.0)]);
        assert!(take_top(&row(10), 2, 10, 1.0, &mut top).unwrap_err().contains("token 10"));
        assert_eq!(take_top(&[f32::NAN; 5], 2, 10, 1.0, &mut top), Ok(false));
    }
}
