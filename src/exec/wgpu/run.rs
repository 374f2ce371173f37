//! Passes: the steps of a plan as dispatches over the rows of a pass.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::cache::GpuCache;
use super::device::{Recorder, Storage};
use super::fuse::{self, Facts, MatrixFacts, Product, RowClass, Step, Twin};
use super::kernels::{
    Arithmetic, BATCH_ROWS, Epilogue, Kernel, MAX_HEAD, Matmul, PATH_WORDS, QUERIES, SORTED, SPLIT,
    TILE_BATCH_ROWS,
};
use super::weights::{Matrix, Weight};
use super::{CHUNK, Gpu};
use crate::error::{Error, Result};
use crate::exec::{self, CacheType, KvCache, Loaded, Rows, Segment, Stage, Workspace};
use crate::graph::{
    Attention, BufferId, BufferShape, KvShape, Norm, NormKind, Op, Program, RotaryId, RotaryPairs,
    RowSet, WeightId,
};
use crate::lm::TopK;

/// More rows of activations than these go in tiles: two batches of eight cost less than a tile.
const MOST_UNTILED_ROWS: usize = 16;

/// The fewest rows of which several share what attention reads.
const LEAST_SHARING: usize = 32;

/// Where the biases of a product begin that has none, or the sinks of an attention.
const NONE: u32 = u32::MAX;

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
    out_stride: u32,
    second_stride: u32,
    third_stride: u32,
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
            Err(Error::unsupported(file, format!("{what}; use `--device cpu`")))
        };
        let name = gpu.adapter.name();
        for op in &program.ops[ops.clone()] {
            if let Op::Experts { .. } = op {
                return refuse(format!(
                    "{name} was to run it, and mixtures of experts run on the CPU"
                ));
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
            workspace.make_room(id, rows_of(rows, self.program.buffer(id).rows))?;
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

fn rows_of(rows: &Rows<'_>, set: RowSet) -> usize {
    match set {
        RowSet::All => rows.len(),
        RowSet::Wanted => rows.wanted.len(),
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
        let inverse = (1.0 / temperature).to_bits();
        let mut recorder = Recorder::new(&self.gpu.device)?;
        recorder.dispatch(
            Kernel::TopK,
            &[&storage, &lists],
            &[width as u32, stride as u32, k as u32, inverse, rows.start as u32],
            [slices, rows.len(), 1],
            rows.len() * width,
        )?;
        recorder.dispatch(
            Kernel::TopKMerge,
            &[&lists, &found],
            &[slices as u32, k as u32, inverse],
            [rows.len(), 1, 1],
            rows.len() * slices * k,
        )?;
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
    fn stride4(&self) -> u32 {
        (self.stride / 4) as u32
    }

    /// Workgroups that have a vec4 of a row to a thread.
    fn groups4(&self) -> [usize; 3] {
        [(self.stride / 4).div_ceil(64), self.rows, 1]
    }

    fn cost(&self) -> usize {
        self.rows * self.stride
    }

    /// Where the sums of squares of a twin's blocks begin among its scales: never at 0.
    fn squares_at(&self) -> u32 {
        (2 * self.rows * self.stride / CHUNK) as u32
    }
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
    positions_at: u32,
    paths_at: u32,
    rotations_at: Vec<u32>,
    wanted_at: u32,
}

impl Pass<'_> {
    fn shape(&self, id: BufferId) -> Shape {
        let BufferShape { width, rows } = self.stage.program.buffer(id);
        let stride = width.next_multiple_of(CHUNK);
        Shape { rows: rows_of(self.rows, rows), width, stride }
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let storage = |id| self.workspace.storage(id);
        match *step {
            Step::Embed { table, scale, out } => self.look_up(table, scale, 0, false, out),
            Step::AddPositions { table, x } => self.look_up(table, 1.0, self.positions_at, true, x),
            Step::Norm { x, norm, out, bytes } => self.norm(x, norm, out, bytes),
            Step::NormScale { x, weight, to } => {
                let shape = self.shape(x);
                let buffers = vec![storage(x), self.stage.vector(Some(weight)).clone()];
                let params = [shape.stride4(), shape.squares_at()];
                let (groups, cost) = (shape.groups4(), shape.cost());
                self.activations(
                    Kernel::RmsNormScale,
                    buffers,
                    Some(to),
                    shape,
                    &params,
                    groups,
                    cost,
                )
            }
            Step::Round { x, to } => {
                let shape = self.shape(x);
                let blocks = shape.stride / CHUNK;
                let (kernel, groups) = match self.stage.gpu.arithmetic {
                    Arithmetic::F16 => (Kernel::CastF16, [shape.rows, 1, 1]),
                    _ => (Kernel::Quantize, [blocks.div_ceil(64), shape.rows, 1]),
                };
                let params = [shape.stride4(), blocks as u32];
                let buffers = vec![storage(x)];
                self.activations(kernel, buffers, Some(to), shape, &params, groups, shape.cost())
            }
            Step::Product(ref product) => self.product(product),
            Step::RopeAppendKv { outs, rotary, layer } => self.rope(outs, rotary, layer),
            Step::Attend { q, layer, attention, out, bytes } => {
                self.attend(q, layer, attention, out, bytes)
            }
            Step::Elementwise { function, x, y, numbers, bytes } => {
                let shape = self.shape(x);
                let y = y.map_or_else(|| self.stage.gpu.nothing[0].clone(), storage);
                let [a, b] = numbers.map(f32::to_bits);
                let kernel = Kernel::Elementwise { function, bytes: bytes.is_some() };
                let (params, buffers) = ([shape.stride4(), a, b], vec![storage(x), y]);
                let (groups, cost) = (shape.groups4(), shape.cost());
                self.activations(kernel, buffers, bytes, shape, &params, groups, cost)
            }
            Step::SelectRows { x, out } => {
                let shape = self.shape(out);
                let params = [shape.stride4(), self.wanted_at];
                let (groups, cost) = (shape.groups4(), shape.cost());
                let (x, out) = (storage(x), storage(out));
                self.recorder.dispatch(Kernel::SelectRows, &[&x, &out], &params, groups, cost)
            }
        }
    }

    /// Runs a kernel over rows that products may read next: `bytes` is where it writes them as bytes.
    #[allow(clippy::too_many_arguments)]
    fn activations(
        &mut self,
        kernel: Kernel,
        mut buffers: Vec<Arc<Storage>>,
        bytes: Option<Twin>,
        shape: Shape,
        params: &[u32],
        groups: [usize; 3],
        cost: usize,
    ) -> Result<()> {
        if let Some(twin) = bytes {
            buffers.extend(self.workspace.twin(twin, shape.rows, shape.stride)?);
        }
        let buffers: Vec<_> = buffers.iter().collect();
        self.recorder.dispatch(kernel, &buffers, params, groups, cost)
    }

    /// Rows of a table, by the entries that the words from `entries_at` on name.
    fn look_up(
        &mut self,
        table: WeightId,
        scale: f32,
        entries_at: u32,
        add: bool,
        out: BufferId,
    ) -> Result<()> {
        let (table, shape) = (self.stage.matrix(table), self.shape(out));
        let out = self.workspace.storage(out);
        let chunks = table.cols.div_ceil(CHUNK);
        for part in &table.parts.parts {
            let params = [
                table.cols as u32,
                chunks as u32,
                table.row_bytes as u32,
                part.first as u32,
                part.rows as u32,
                shape.stride4(),
                entries_at,
                u32::from(add),
                scale.to_bits(),
            ];
            self.recorder.dispatch(
                Kernel::Embed(table.block),
                &[&part.bytes, &out],
                &params,
                [chunks.div_ceil(64), shape.rows, 1],
                shape.rows * table.cols,
            )?;
        }
        Ok(())
    }

    fn norm(&mut self, x: BufferId, norm: Norm, out: BufferId, bytes: Option<Twin>) -> Result<()> {
        let shape = self.shape(x);
        let [weight, bias] = [norm.weight, norm.bias].map(|id| self.stage.vector(id).clone());
        let (x, out) = (self.workspace.storage(x), self.workspace.storage(out));
        let whole = norm.group == shape.width;
        let epsilon = norm.epsilon.to_bits();
        let params = [shape.width as u32, shape.stride4(), epsilon];
        let (cost, a_row) = (shape.cost(), [shape.rows, 1, 1]);
        match (norm.kind, norm.weight, norm.bias) {
            (NormKind::Rms, Some(_), None) if whole => {
                self.recorder.dispatch(Kernel::RmsNorm, &[&x, &weight, &out], &params, a_row, cost)
            }
            (NormKind::Layer, Some(_), Some(_)) if whole => {
                let kernel = Kernel::LayerNorm { bytes: bytes.is_some() };
                let buffers = vec![x, weight, bias, out];
                self.activations(kernel, buffers, bytes, shape, &params, a_row, cost)
            }
            (kind, ..) => {
                let step = |id: Option<WeightId>| {
                    let len = id.map_or(0, |id| {
                        let view = self.stage.program.weight(id).tensor.view();
                        view.rows * view.cols
                    });
                    if len == norm.group { 0 } else { norm.group as u32 }
                };
                let (group, stride) = (norm.group as u32, shape.stride as u32);
                let params = [group, stride, epsilon, step(norm.weight), step(norm.bias)];
                let (has_weight, has_bias) = (norm.weight.is_some(), norm.bias.is_some());
                let kernel = Kernel::GroupNorm { kind, weight: has_weight, bias: has_bias };
                let groups = [shape.width / norm.group, shape.rows, 1];
                self.recorder.dispatch(kernel, &[&x, &weight, &bias, &out], &params, groups, cost)
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
        let all_rows: usize = product.matrices.iter().map(|(id, _)| stage.matrix(*id).rows).sum();
        // All rows of several matrices, or the parts of one.
        let several = outs.len() > 1;
        let stride = |i: usize| outs.get(i).map_or(0, |id| self.shape(*id).stride as u32);
        let mut params = ProductParams {
            chunks: matrix.cols.div_ceil(CHUNK) as u32,
            row_bytes: matrix.row_bytes as u32,
            batch_rows: x.rows as u32,
            x_stride: match arithmetic {
                Arithmetic::Int8 => x.stride / CHUNK,
                Arithmetic::F32 | Arithmetic::F16 => x.stride / 4,
            } as u32,
            squares: epsilon.map_or(0, |_| x.squares_at()),
            inverse_width: 1.0 / x.width as f32,
            epsilon: epsilon.unwrap_or_default(),
            add: u32::from(product.add),
            out_stride: stride(0),
            second_stride: stride(1),
            third_stride: stride(2),
            second: if several { matrix.rows } else { all_rows } as u32,
            third: match product.matrices.get(1) {
                Some((second, _)) => matrix.rows + stage.matrix(*second).rows,
                None => all_rows,
            } as u32,
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
                params.out_squares = out.squares_at();
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
                let (pairs, halves, rotations_at) = self.rotation(rotary);
                let (q_shape, k_width) = (self.shape(q), self.shape(k).width);
                params = ProductParams {
                    out_stride: q_shape.stride as u32,
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
            let rows = if several { all_rows } else { part.rows };
            let row_groups = match epilogue {
                Epilogue::Gate(_) => params.second as usize / CHUNK,
                _ => rows.div_ceil(matmul.group_rows()),
            };
            let params = ProductParams {
                rows: rows as u32,
                begins: part.begins as u32,
                first: part.first as u32,
                bias_at: matrix.bias.as_ref().map_or(NONE, |(_, at)| (at + part.first) as u32),
                ..params
            };
            let mut buffers = vec![&part.bytes, &values, &scales, bias];
            buffers.extend(&outputs);
            self.recorder.dispatch_shaped(
                Kernel::Matmul(matmul),
                &buffers,
                bytemuck::cast_slice(&[params]),
                if matmul.is_tiled() { [batches, row_groups, 1] } else { [row_groups, batches, 1] },
                rows * matrix.cols * x.rows,
                Some([rows, matrix.cols]),
            )?;
        }
        Ok(())
    }

    /// How many pairs of a head are rotated, whether they are halves, and where the rotations are.
    fn rotation(&self, rotary: Option<RotaryId>) -> (u32, u32, u32) {
        let Some(id) = rotary else { return (0, 0, 0) };
        let table = &self.stage.program.rotaries[id.index()];
        let halves = u32::from(table.pairs == RotaryPairs::Halves);
        (table.frequencies.len() as u32, halves, self.rotations_at[id.index()])
    }

    fn rope(
        &mut self,
        [q, k, v]: [BufferId; 3],
        rotary: Option<RotaryId>,
        layer: usize,
    ) -> Result<()> {
        let kv = self.stage.program.layers[layer];
        let (pairs, halves, rotations_at) = self.rotation(rotary);
        let (q_shape, k_shape) = (self.shape(q), self.shape(k));
        let heads = q_shape.width / kv.head_dim;
        let threads = heads * pairs as usize + kv.width();
        let [q, k, v] = [q, k, v].map(|id| self.workspace.storage(id));
        for (Segment { rows, first_slot, .. }, cache) in self.rows.segments.iter().zip(&self.caches)
        {
            let [keys, values] = cache.layer(layer);
            let params = [
                heads as u32,
                kv.heads as u32,
                kv.head_dim as u32,
                pairs,
                q_shape.stride as u32,
                k_shape.stride as u32,
                rows.start as u32,
                *first_slot as u32,
                rotations_at,
                halves,
            ];
            self.recorder.dispatch(
                Kernel::RopeAppendKv(cache.cache_type),
                &[&q, &k, &v, keys, values],
                &params,
                [threads.div_ceil(64), rows.len(), 1],
                rows.len() * threads,
            )?;
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
        for segment in 0..self.rows.segments.len() {
            self.attend_segment(segment, [q, out], layer, attention, sinks_at, bytes)?;
        }
        Ok(())
    }

    fn attend_segment(
        &mut self,
        segment: usize,
        [q, out]: [BufferId; 2],
        layer: usize,
        attention: Attention,
        sinks_at: u32,
        bytes: Option<Twin>,
    ) -> Result<()> {
        let KvShape { heads: kv_heads, head_dim } = self.stage.program.layers[layer];
        let Segment { rows, line, .. } = &self.rows.segments[segment];
        let (line, count) = (*line, rows.len());
        let ancestors = &self.rows.ancestors[rows.clone()];
        let shape = self.shape(q);
        let heads = shape.width / head_dim;
        let deepest = ancestors.iter().map(|path| path.count_ones()).max().unwrap_or(0) as usize;
        let splits = (line + deepest).div_ceil(SPLIT);
        // One split is written where it belongs; several are merged.
        let row_floats = if splits > 1 { heads * splits * (head_dim + 2) } else { 0 };
        let fit = match row_floats {
            0 => count,
            floats => self.stage.gpu.partial_limit / (4 * floats),
        };
        // Rows of a chain share what they read, if there are many: few had better be many workgroups.
        let queries = if count >= LEAST_SHARING && is_chain(ancestors) { QUERIES } else { 1 };
        let whole = (fit / queries as usize).max(1) * queries as usize;
        let at_once = if fit < count { whole } else { count };
        let partial = self.workspace.scratch(0, at_once * row_floats)?;
        let cache = &self.caches[segment];
        let ([keys, values], cache) = (cache.layer(layer).clone(), cache.cache_type);
        // What is read at once has up to 16 bytes, and does not go beyond a head.
        let most = if cache == CacheType::F16 { 4 } else { 2 };
        let fits = |n: &usize| *n <= most && (head_dim / 2).is_multiple_of(*n);
        let pairs = [4, 2].into_iter().find(fits).unwrap_or(1) as u32;
        let window = attention.window.map_or(NONE, |n| u32::try_from(n).unwrap_or(NONE));
        let (q, out) = (self.workspace.storage(q), self.workspace.storage(out));
        for first in (0..count).step_by(at_once) {
            let n = at_once.min(count - first);
            let first = rows.start + first;
            let params = [
                (heads / kv_heads) as u32,
                kv_heads as u32,
                head_dim as u32,
                shape.stride as u32,
                line as u32,
                self.paths_at,
                attention.scale.to_bits(),
                first as u32,
                (first + n) as u32,
                splits as u32,
                window,
                attention.soft_cap.unwrap_or(0.0).to_bits(),
                sinks_at,
            ];
            self.activations(
                Kernel::Attend { cache, pairs, queries, bytes: bytes.is_some() },
                [&q, &keys, &values, &partial, &out].map(Arc::clone).to_vec(),
                bytes,
                shape,
                &params,
                [heads, n.div_ceil(queries as usize), splits],
                2 * n * (line + deepest) * shape.width,
            )?;
            if splits > 1 {
                let params = [
                    head_dim as u32,
                    shape.stride as u32,
                    line as u32,
                    self.paths_at,
                    first as u32,
                    splits as u32,
                    window,
                    sinks_at,
                ];
                self.activations(
                    Kernel::AttendReduce { bytes: bytes.is_some() },
                    [&partial, &out].map(Arc::clone).to_vec(),
                    bytes,
                    shape,
                    &params,
                    [heads, n, 1],
                    n * splits * shape.width,
                )?;
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
