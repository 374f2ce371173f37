//! The GPU, through Vulkan, Metal or DX12: every verb is a compute shader.
//!
//! - `adapter`: what the machine has; `device`: buffers, pipelines and submissions of an open GPU;
//! - `layout`: how the rows of a matrix lie on the device;
//! - `pass`: the verbs of a pass as dispatches, and which of them become one;
//! - `pipelines`: compiled shaders on disk;
//! - `shaders`: what a shader is joined from (the WGSL itself is in `shaders/`).
//!
//! Weights lie on the device in the bytes of their file, in an order that suits it; large matrices are
//! split by rows at its binding limit, and those that are multiplied with the same rows lie together, so
//! that one dispatch has them all. A pass records dispatches, which become one compute pass in one submission
//! (several where that would take the device too long), and nothing waits until results are read.
//!
//! A product takes up to eight rows of activations at once, or tiles of 32 of many, and adds each
//! element up in the same order however many there are. Compilers of drivers may still disagree from
//! one shader to the next: the first time that a weight type is loaded its shaders are compared, and
//! where they differ in a bit the one for eight rows is used for any number.

mod adapter;
mod device;
mod layout;
mod pass;
mod pipelines;
mod shaders;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use super::{Backend, CacheShape, CacheType, Largest, Pass, Rows};
use crate::error::{Error, Result};
use crate::gguf::{SharedTensor, Tensor};
use crate::quant::BlockType;
use device::{Device, Storage, UPLOAD, lock};
use layout::Layout;
use shaders::{COLUMNS, Frame, SORTED, Shader, TILE_COLUMNS, TILE_ROWS};

pub use adapter::Adapter;
pub use device::KernelTimes;
pub use pass::GpuPass;
pub use shaders::Arithmetic;

/// Rows of activations are padded with zeros to whole chunks.
const CHUNK: usize = 32;

/// Where the biases of a product begin that has none.
const NO_BIAS: usize = u32::MAX as usize;

/// The most workgroups in one direction.
const MOST_GROUPS: usize = 65535;

/// A workgroup of a product has so many weight rows, or more.
const LEAST_GROUP_ROWS: usize = 8;

/// The most numbers of a row that are looked for on the device.
const MOST_LARGEST: usize = 64;

/// Which of several ways to compute is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variants {
    /// Sums are exchanged in registers where the device has subgroups, else through workgroup
    /// memory alone.
    pub subgroups: bool,
    /// How activations are multiplied with quantized weights; `None` is the fastest within the
    /// numerics contract: bytes, or single precision on software devices, which have no products of
    /// bytes.
    pub arithmetic: Option<Arithmetic>,
    /// Products with more than 16 rows of activations share them, and unpacked weights, among
    /// threads.
    pub tiles: bool,
    /// Products take eight rows of activations always, however many there are; there are no tiles.
    pub padded: bool,
    /// Products of bytes with up to 16 rows do the verb that follows as well: norms, SwiGLU, rotations.
    pub fused: bool,
}

impl Default for Variants {
    fn default() -> Self {
        Variants { subgroups: true, arithmetic: None, tiles: true, padded: false, fused: true }
    }
}

impl Variants {
    /// The defaults, changed as the environment variable `MTAD_GPU` says: a list of `f32`, `int8`
    /// or `f16`, and `subgroups`, `tiles`, `padded`, `fused`, each of these possibly after `no-`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another word.
    pub fn from_env() -> Result<Self> {
        Self::parse(&std::env::var("MTAD_GPU").unwrap_or_default())
    }

    /// The defaults, changed as a list of words says.
    ///
    /// # Errors
    /// As [`Variants::from_env`].
    pub fn parse(words: &str) -> Result<Self> {
        let mut variants = Variants::default();
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let (name, on) = match word.strip_prefix("no-") {
                Some(name) => (name, false),
                None => (word, true),
            };
            match name {
                "f32" if on => variants.arithmetic = Some(Arithmetic::F32),
                "int8" if on => variants.arithmetic = Some(Arithmetic::Int8),
                "f16" if on => variants.arithmetic = Some(Arithmetic::F16),
                "subgroups" => variants.subgroups = on,
                "tiles" => variants.tiles = on,
                "padded" => variants.padded = on,
                "fused" => variants.fused = on,
                _ => {
                    return Err(Error::invalid(format!(
                        "MTAD_GPU has `{word}`; there are f32, int8, f16, and subgroups, tiles, padded, fused, each with or without no- before it"
                    )));
                }
            }
        }
        Ok(variants)
    }
}

/// A GPU as a backend.
#[derive(Debug)]
pub struct Gpu {
    adapter: Adapter,
    device: Device,
    variants: Variants,
    /// How activations are multiplied with quantized weights.
    arithmetic: Arithmetic,
    /// Whether sums are exchanged in registers.
    subgroups: bool,
    /// The most bytes of a part of a matrix.
    part_limit: usize,
    /// The most bytes of partial sums of attention: rows go in several dispatches if they would take more.
    partial_limit: usize,
    /// Tensors on the device, by where they lie in memory: one that is used twice is there once.
    uploads: Mutex<HashMap<(usize, usize), Weak<Parts>>>,
    /// For each type that was loaded, which of its shaders agree.
    agreeing: Mutex<HashMap<BlockType, Agreement>>,
    /// Bound where a product has no bias or no scales, or no second or third output.
    nothing: [Arc<Storage>; 3],
}

/// Which shaders of a weight type give the same bits, and so can be used side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Agreement {
    /// Those for 1, 2, 4 and 8 rows of activations: else the last is used for any number.
    columns: bool,
    /// Those for tiles with them: else there are none.
    tiles: bool,
}

impl Gpu {
    /// Opens an adapter with the variants that the environment asks for.
    ///
    /// # Errors
    /// As [`Gpu::with`] and [`Variants::from_env`].
    pub fn open(adapter: &Adapter) -> Result<Self> {
        Self::with(adapter, Variants::from_env()?)
    }

    /// Opens an adapter.
    ///
    /// # Errors
    /// [`Error::Device`] with the driver's reason.
    pub fn with(adapter: &Adapter, variants: Variants) -> Result<Self> {
        // (Eight threads share a sum; what is no power of two has never been seen.)
        let fits = |&(least, _): &(u32, u32)| least >= 8 && least.is_power_of_two();
        let subgroups = variants.subgroups && adapter.subgroups().as_ref().is_some_and(fits);
        if !adapter.reads_f16() {
            let what = "has no compute shaders that read half precision; use `--device cpu`";
            return Err(Error::Device { device: adapter.name().to_owned(), what: what.to_owned() });
        }
        let arithmetic = match variants.arithmetic {
            Some(arithmetic) => arithmetic,
            None if adapter.is_software() => Arithmetic::F32,
            None => Arithmetic::Int8,
        };
        if arithmetic == Arithmetic::F16 && !adapter.has_f16() {
            let what = "does not compute in half precision, which MTAD_GPU asks for (`f16`)";
            return Err(Error::Device { device: adapter.name().to_owned(), what: what.to_owned() });
        }
        let device = Device::open(adapter, subgroups, arithmetic == Arithmetic::F16)?;
        let nothing = [(); 3].map(|()| device.storage(16));
        device.check()?;
        Ok(Gpu {
            part_limit: device.binding_limit() as usize - 64,
            partial_limit: 32 << 20,
            adapter: adapter.clone(),
            variants: Variants {
                tiles: variants.tiles && adapter.has_room_for_tiles(),
                fused: variants.fused
                    && arithmetic == Arithmetic::Int8
                    && adapter.has_room_for_fused_products(),
                ..variants
            },
            arithmetic,
            subgroups,
            device,
            uploads: Mutex::default(),
            agreeing: Mutex::default(),
            nothing,
        })
    }

    /// What it was opened from.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The variants that it was opened with.
    pub fn variants(&self) -> Variants {
        self.variants
    }

    /// The weight types whose shaders disagreed, so that the widest is used for any number of rows.
    pub fn padded_types(&self) -> Vec<BlockType> {
        self.types_that(|agreement| !agreement.columns)
    }

    /// The weight types for which there are no tiles, though there could be: their shaders disagreed.
    pub fn untiled_types(&self) -> Vec<BlockType> {
        let tiles = self.variants.tiles && !self.variants.padded;
        self.types_that(|agreement| tiles && agreement.columns && !agreement.tiles)
    }

    fn types_that(&self, fits: impl Fn(&Agreement) -> bool) -> Vec<BlockType> {
        let agreeing = lock(&self.agreeing);
        agreeing.iter().filter(|(_, found)| fits(found)).map(|(block, _)| *block).collect()
    }

    /// How activations are multiplied with weights of a type.
    fn arithmetic_with(&self, block: BlockType) -> Arithmetic {
        if block.is_float() { Arithmetic::F32 } else { self.arithmetic }
    }

    /// What of it is used, for people: `subgroups, f32 activations, tiles`.
    pub fn kernels(&self) -> String {
        let Variants { tiles, padded, .. } = self.variants;
        let mut out = if self.subgroups { "subgroups" } else { "shared memory" }.to_owned();
        out += &format!(", {} activations", self.arithmetic.name());
        let names = |types: Vec<BlockType>| {
            let names: Vec<_> = types.iter().map(|t| t.name()).collect();
            (!names.is_empty()).then(|| names.join(" "))
        };
        match (padded, tiles) {
            (true, _) => out += ", padded",
            (false, true) => out += ", tiles",
            (false, false) => {}
        }
        if self.variants.fused {
            out += ", fused";
        }
        if let Some(types) = names(self.untiled_types()) {
            out += &format!(" (not for {types})");
        }
        if let Some(types) = names(self.padded_types()).filter(|_| !padded) {
            out += &format!(", padded for {types}");
        }
        out
    }

    /// Gives the device back to the system, as if it had been unplugged: whatever is asked of it
    /// from now on is [`Error::DeviceLost`]. For tests of what then happens.
    pub fn destroy(&self) {
        self.device.destroy();
    }

    /// Has kernels timed from now on, which makes passes slower. False if the device cannot.
    pub fn time_kernels(&self) -> bool {
        self.device.time_kernels()
    }

    /// Seconds on the device and calls, by kernel, since [`Gpu::time_kernels`]; ends the timing.
    pub fn kernel_times(&self) -> KernelTimes {
        self.device.times()
    }

    /// Waits until the device has nothing left to do.
    ///
    /// # Errors
    /// What the device reports.
    pub fn finish(&self) -> Result<()> {
        self.device.finish()
    }

    /// Bytes per second at which a shader reads a buffer of `bytes` (or as many as bind at once),
    /// again and again.
    ///
    /// # Errors
    /// What the device reports.
    pub fn read_bandwidth(&self, bytes: usize) -> Result<f64> {
        const GROUPS: usize = 4096;
        let bytes = bytes.min(self.part_limit) / 16 * 16;
        let (source, out) = (self.device.storage(bytes as u64), self.device.storage(16));
        let rows = Rows { tokens: &[0], line: 0, first_slot: 0, paths: &[1], rotations: &[] };
        let read = |times: usize| {
            let start = std::time::Instant::now();
            self.pass(&rows, 0, |pass| {
                for _ in 0..times {
                    let params = [(bytes / 16) as u32, 256 * GROUPS as u32];
                    let shader = Shader::plain(Frame::Stream);
                    pass.dispatch(shader, &[&source, &out], &params, [GROUPS, 1, 1], bytes / 16);
                }
                Ok(())
            })?;
            self.device.finish()?;
            Ok::<_, Error>(start.elapsed().as_secs_f64())
        };
        // (The first time, memory is cleared and the shader compiled.)
        let once = read(1).and_then(|_| read(1))?;
        // For so long that what a submission costs is nothing beside it.
        let times = (0.05 / once).clamp(1.0, 100.0) as usize;
        Ok((times * bytes) as f64 / read(times)?)
    }

    /// The rows of a tensor on the device, in buffers of their own unless they are there already.
    fn parts(&self, shared: &SharedTensor) -> Result<Arc<Parts>> {
        let tensor = &shared.view();
        readable(tensor)?;
        if let Some(parts) = lock(&self.uploads).get(&place(tensor)).and_then(Weak::upgrade) {
            return Ok(parts);
        }
        let stride = Layout::of(tensor).stride;
        let most = (self.part_limit / stride).min(MOST_GROUPS * LEAST_GROUP_ROWS);
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
            let bytes = self.device.storage((rows * stride) as u64);
            self.upload(tensor, first..first + rows, &bytes, 0)?;
            Ok(Part { first, rows, begins: 0, bytes })
        };
        let parts: Result<Vec<_>> = (0..tensor.rows).step_by(most).map(piece).collect();
        Ok(self.keep(shared, parts?))
    }

    /// Puts tensors on the device one behind another, in one buffer, if that can hold them and none is there
    /// already. They have rows of the same type and length. Returns what keeps them there.
    fn put_together(&self, tensors: &[&SharedTensor]) -> Result<Vec<Arc<Parts>>> {
        let stride = Layout::of(&tensors[0].view()).stride;
        let rows: usize = tensors.iter().map(|tensor| tensor.view().rows).sum();
        let is_there = |tensor: &&SharedTensor| {
            lock(&self.uploads)
                .get(&place(&tensor.view()))
                .is_some_and(|weak| weak.strong_count() > 0)
        };
        let most = (self.part_limit / stride).min(MOST_GROUPS * LEAST_GROUP_ROWS);
        if tensors.len() < 2 || rows > most || tensors.iter().any(is_there) {
            return Ok(Vec::new());
        }
        let bytes = self.device.storage((rows * stride) as u64);
        let mut kept = Vec::new();
        let mut begins = 0;
        for &shared in tensors {
            let tensor = &shared.view();
            self.upload(tensor, 0..tensor.rows, &bytes, begins)?;
            let part = Part { first: 0, rows: tensor.rows, begins, bytes: bytes.clone() };
            kept.push(self.keep(shared, vec![part]));
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
            self.device.upload(
                to,
                (begins + (first - rows.start) * layout.stride) as u64,
                &bytes,
            )?;
        }
        Ok(())
    }

    /// Remembers where a tensor is, for as long as somebody uses it.
    fn keep(&self, tensor: &SharedTensor, parts: Vec<Part>) -> Arc<Parts> {
        let parts = Arc::new(Parts { parts, _tensor: Some(tensor.clone()) });
        lock(&self.uploads).insert(place(&tensor.view()), Arc::downgrade(&parts));
        parts
    }

    /// The floats of some tensors on the device, one behind another.
    fn floats(&self, tensors: &[&SharedTensor]) -> Result<Arc<Storage>> {
        let mut floats = Vec::new();
        for tensor in tensors {
            let view = tensor.view();
            readable(&view)?;
            let first = floats.len();
            floats.resize(first + view.rows * view.cols, 0.0);
            view.block_type.dequantize(view.bytes, &mut floats[first..]);
        }
        // As rows of activations are.
        floats.resize(floats.len().next_multiple_of(CHUNK), 0.0);
        let storage = self.device.storage(4 * floats.len() as u64);
        self.device.upload(&storage, 0, bytemuck::cast_slice(&floats))?;
        Ok(storage)
    }

    /// A pass over `rows`, to be recorded.
    pub(super) fn begin<'p>(&'p self, rows: &Rows<'p>) -> Result<GpuPass<'p>> {
        self.device.check()?;
        Ok(GpuPass::new(self, *rows))
    }

    /// The rows of a buffer, in `copy`.
    pub(super) fn read_into(&self, buffer: &Buffer, copy: &mut Vec<f32>) -> Result<()> {
        copy.clear();
        let Buffer { rows, stride, width, .. } = *buffer;
        self.device.read(buffer.storage(), rows * stride, copy)?;
        if stride != width {
            for row in 1..rows {
                copy.copy_within(row * stride..row * stride + width, row * width);
            }
            copy.truncate(rows * width);
        }
        Ok(())
    }

    /// Which shaders of a type agree; tried with the first rows of the first matrix of that type.
    fn agreement(&self, tensor: &Tensor<'_>) -> Result<Agreement> {
        if let Some(agreement) = lock(&self.agreeing).get(&tensor.block_type) {
            return Ok(*agreement);
        }
        let rows = tensor.rows.min(2 * TILE_ROWS as usize);
        let bytes = self.device.storage((rows * Layout::of(tensor).stride) as u64);
        self.upload(tensor, 0..rows, &bytes, 0)?;
        let part = Part { first: 0, rows, begins: 0, bytes };
        let parts = Arc::new(Parts { parts: vec![part], _tensor: None });
        let most = TILE_COLUMNS as usize;
        let mut state = 1u32;
        let x: Vec<f32> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .take(most * tensor.cols)
        .collect();
        let product = |n: usize, agreement: Agreement| -> Result<Vec<u32>> {
            let mut matrix = Matrix::new(tensor, parts.clone(), None, agreement);
            matrix.rows = rows;
            let pass = Rows {
                tokens: &vec![0; n],
                line: 0,
                first_slot: 0,
                paths: &vec![1; n],
                rotations: &[],
            };
            let (mut from, mut to) = (self.buffer(tensor.cols), self.buffer(rows));
            self.pass(&pass, 0, |pass| {
                pass.write(&x[..n * tensor.cols], &mut from);
                pass.linear(&from, &mut [(&matrix, &mut to)]);
                Ok(())
            })?;
            let mut copy = Vec::new();
            Ok(self.read(&to, &mut copy)?.iter().map(|x| x.to_bits()).collect())
        };
        let mut agreement = Agreement { columns: true, tiles: false };
        let all = product(most, agreement)?;
        if !self.variants.padded {
            for &columns in &COLUMNS[..COLUMNS.len() - 1] {
                let few = columns as usize;
                agreement.columns &= product(few, agreement)? == all[..few * rows];
            }
        }
        if self.variants.tiles && !self.variants.padded && agreement.columns {
            let tiles = Agreement { tiles: true, ..agreement };
            agreement.tiles = product(most, tiles)? == all;
        }
        lock(&self.agreeing).insert(tensor.block_type, agreement);
        Ok(agreement)
    }
}

/// Where a tensor lies in memory.
fn place(tensor: &Tensor<'_>) -> (usize, usize) {
    (tensor.bytes.as_ptr() as usize, tensor.bytes.len())
}

fn readable(tensor: &Tensor<'_>) -> Result<()> {
    if tensor.block_type.can_dequantize() {
        return Ok(());
    }
    let (name, block_type) = (tensor.name, tensor.block_type);
    let what = format!("tensor `{name}` has the type {block_type}, which cannot be read");
    Err(Error::unsupported(tensor.file, what))
}

/// Some rows of a matrix.
#[derive(Debug)]
struct Part {
    first: usize,
    rows: usize,
    /// Their buffer, and the byte of it where they begin.
    bytes: Arc<Storage>,
    begins: usize,
}

/// All rows of a matrix.
#[derive(Debug)]
struct Parts {
    parts: Vec<Part>,
    /// The tensor, whose place in memory no other can have while these are in use.
    _tensor: Option<SharedTensor>,
}

/// A weight matrix on the device.
#[derive(Debug)]
pub struct Matrix {
    block: BlockType,
    rows: usize,
    cols: usize,
    /// Bytes from one row to the next.
    row_bytes: usize,
    parts: Arc<Parts>,
    bias: Option<Bias>,
    agreement: Agreement,
}

/// The biases of a matrix: floats of a buffer, from one on.
#[derive(Debug, Clone)]
struct Bias {
    floats: Arc<Storage>,
    at: usize,
}

impl Matrix {
    fn new(
        tensor: &Tensor<'_>,
        parts: Arc<Parts>,
        bias: Option<Bias>,
        agreement: Agreement,
    ) -> Self {
        Matrix {
            block: tensor.block_type,
            rows: tensor.rows,
            cols: tensor.cols,
            row_bytes: Layout::of(tensor).stride,
            parts,
            bias,
            agreement,
        }
    }

    /// Whether its rows follow those of another on the device, and its biases too, so that one product
    /// can have both.
    fn follows(&self, other: &Matrix) -> bool {
        let ([mine], [theirs]) = (&self.parts.parts[..], &other.parts.parts[..]) else {
            return false;
        };
        let behind = |other_at: usize, at: usize, step: usize| at == other_at + step * other.rows;
        let biases_follow = match (&self.bias, &other.bias) {
            (None, None) => true,
            (Some(b), Some(o)) => Arc::ptr_eq(&b.floats, &o.floats) && behind(o.at, b.at, 1),
            _ => false,
        };
        let same = |m: &Matrix| (m.block, m.cols, m.agreement);
        same(self) == same(other)
            && Arc::ptr_eq(&mine.bytes, &theirs.bytes)
            && behind(theirs.begins, mine.begins, self.row_bytes)
            && biases_follow
    }
}

/// A vector on the device.
#[derive(Debug)]
pub struct Vector {
    len: usize,
    floats: Arc<Storage>,
}

/// An embedding table on the device.
#[derive(Debug)]
pub struct Embedding {
    block: BlockType,
    cols: usize,
    row_bytes: usize,
    parts: Arc<Parts>,
}

/// Activations on the device: rows of `width` f32, each padded with zeros.
#[derive(Debug)]
pub struct Buffer {
    width: usize,
    stride: usize,
    rows: usize,
    /// Rows that there is room for.
    capacity: usize,
    storage: Option<Arc<Storage>>,
}

impl Buffer {
    fn storage(&self) -> &Arc<Storage> {
        self.storage.as_ref().expect("a buffer is written before it is read")
    }

    /// vec4s of a row.
    fn stride4(&self) -> u32 {
        (self.stride / 4) as u32
    }
}

/// Key and value rows on the device.
#[derive(Debug)]
pub struct Cache {
    shape: CacheShape,
    /// Slots that each layer has room for.
    slots: Vec<usize>,
    /// Keys and values of each layer.
    layers: Vec<Option<[Arc<Storage>; 2]>>,
}

impl Cache {
    /// Words of the keys or values of a slot.
    fn words(&self) -> usize {
        let width = self.shape.kv_heads * self.shape.head_dim;
        if self.is_f16() { width / 2 } else { width }
    }

    fn is_f16(&self) -> bool {
        self.shape.cache_type == CacheType::F16
    }
}

impl Backend for Gpu {
    type Matrix = Matrix;
    type Vector = Vector;
    type Embedding = Embedding;
    type Buffer = Buffer;
    type Cache = Cache;
    type Pass<'p> = GpuPass<'p>;

    fn describe(&self) -> String {
        let Gpu { adapter, .. } = self;
        format!("{} ({}, {})", adapter.name(), adapter.interface(), self.kernels())
    }

    fn matrix(&self, weight: &SharedTensor, bias: Option<&SharedTensor>) -> Result<Matrix> {
        let bias = match bias {
            Some(bias) => Some(Bias { floats: self.floats(&[bias])?, at: 0 }),
            None => None,
        };
        let view = weight.view();
        let parts = self.parts(weight)?;
        let agreement = self.agreement(&view)?;
        // The device holds it now: the mapped pages need not stay in memory too.
        weight.release();
        Ok(Matrix::new(&view, parts, bias, agreement))
    }

    fn matrices(&self, weights: &[(SharedTensor, Option<SharedTensor>)]) -> Result<Vec<Matrix>> {
        let alike = |a: &(SharedTensor, Option<_>), b: &(SharedTensor, Option<_>)| {
            let kind = |(tensor, bias): &(SharedTensor, Option<_>)| {
                (tensor.view().block_type, tensor.view().cols, bias.is_some())
            };
            kind(a) == kind(b)
        };
        let mut matrices = Vec::new();
        for run in weights.chunk_by(alike) {
            let (tensors, biases): (Vec<_>, Vec<_>) =
                run.iter().map(|(t, b)| (t, b.as_ref())).unzip();
            readable(&tensors[0].view())?;
            let _kept = self.put_together(&tensors)?;
            let biases: Option<Vec<_>> = biases.into_iter().collect();
            let floats = biases.map(|biases| self.floats(&biases)).transpose()?;
            let mut at = 0;
            for tensor in tensors {
                let mut matrix = self.matrix(tensor, None)?;
                matrix.bias = floats.clone().map(|floats| Bias { floats, at });
                at += matrix.rows;
                matrices.push(matrix);
            }
        }
        Ok(matrices)
    }

    fn vector(&self, weight: &SharedTensor) -> Result<Vector> {
        let len = weight.view().rows * weight.view().cols;
        Ok(Vector { len, floats: self.floats(&[weight])? })
    }

    fn embedding(&self, weight: &SharedTensor) -> Result<Embedding> {
        let view = weight.view();
        let parts = self.parts(weight)?;
        let (block, row_bytes) = (view.block_type, Layout::of(&view).stride);
        Ok(Embedding { block, cols: view.cols, row_bytes, parts })
    }

    fn buffer(&self, width: usize) -> Buffer {
        let stride = width.next_multiple_of(CHUNK);
        Buffer { width, stride, rows: 0, capacity: 0, storage: None }
    }

    fn cache(&self, shape: CacheShape) -> Cache {
        Cache { slots: vec![0; shape.layers], layers: vec![None; shape.layers], shape }
    }

    fn move_rows(&self, cache: &mut Cache, moves: &[(usize, usize)]) -> Result<()> {
        let rows = Rows { tokens: &[], line: 0, first_slot: 0, paths: &[], rotations: &[] };
        self.pass(&rows, 0, |pass| {
            let at = pass.arena.work.data.len() as u32;
            let words = moves.iter().flat_map(|&(from, to)| [from as u32, to as u32]);
            pass.arena.work.data.extend(words);
            let words = cache.words();
            for [keys, values] in cache.layers.iter().flatten() {
                pass.dispatch(
                    Shader::plain(Frame::MoveRows),
                    &[keys, values],
                    &[words as u32, moves.len() as u32, at],
                    [words.div_ceil(64), 1, 1],
                    0,
                );
            }
            Ok(())
        })
    }

    fn save_rows(&self, cache: &Cache, slots: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        if slots.is_empty() {
            return Ok(());
        }
        // The cache is laid out as saved rows are.
        let row = 4 * cache.words() as u64;
        for storage in cache.layers.iter().flatten().flatten() {
            let (at, bytes) = (slots.start as u64 * row, slots.len() as u64 * row);
            self.device.read_bytes(storage, at, bytes, |bytes| out.extend_from_slice(bytes))?;
        }
        Ok(())
    }

    fn load_rows(&self, cache: &mut Cache, slots: Range<usize>, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), slots.len() * cache.shape.row_bytes());
        if slots.is_empty() {
            return Ok(());
        }
        let rows = Rows { tokens: &[], line: 0, first_slot: slots.end, paths: &[], rotations: &[] };
        self.pass(&rows, 0, |pass| {
            (0..cache.layers.len()).for_each(|layer| pass.reserve(cache, layer));
            Ok(())
        })?;
        let row = 4 * cache.words();
        let parts = bytes.chunks_exact(slots.len() * row);
        for (storage, bytes) in cache.layers.iter().flatten().flatten().zip(parts) {
            self.device.write_bytes(storage, (slots.start * row) as u64, bytes);
        }
        self.device.check()
    }

    fn pass<R>(
        &self,
        rows: &Rows<'_>,
        _macs: usize,
        record: impl FnOnce(&mut GpuPass<'_>) -> Result<R>,
    ) -> Result<R> {
        let mut pass = self.begin(rows)?;
        let recorded = record(&mut pass);
        pass.end(recorded)
    }

    fn read<'a>(&self, buffer: &'a Buffer, copy: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        self.read_into(buffer, copy)?;
        Ok(copy)
    }

    fn read_largest(
        &self,
        buffer: &Buffer,
        k: usize,
        temperature: f32,
        largest: &mut Largest,
    ) -> Result<bool> {
        if k == 0 || k > MOST_LARGEST || k > buffer.width {
            return Ok(false);
        }
        let words = 1 + 2 * k;
        let slices = buffer.width.div_ceil(SORTED);
        let none = Rows { tokens: &[], line: 0, first_slot: 0, paths: &[], rotations: &[] };
        let mut pass = self.begin(&none)?;
        let lists = pass.scratch(0, buffer.rows * slices * (words + 1));
        let found = pass.scratch(3, buffer.rows * words);
        let inverse = (1.0 / temperature).to_bits();
        pass.dispatch(
            Shader::plain(Frame::Largest),
            &[buffer.storage(), &lists],
            &[buffer.width as u32, buffer.stride as u32, k as u32, inverse],
            [slices, buffer.rows, 1],
            buffer.rows * buffer.width,
        );
        pass.dispatch(
            Shader::plain(Frame::Merge),
            &[&lists, &found],
            &[slices as u32, k as u32, inverse],
            [buffer.rows, 1, 1],
            buffer.rows * slices * k,
        );
        pass.end(Ok(()))?;
        let mut copy = Vec::new();
        self.device.read(&found, buffer.rows * words, &mut copy)?;
        largest.k = k;
        largest.top.clear();
        largest.log_sum_exp.clear();
        for row in copy.chunks_exact(words) {
            // What is not a number must be seen: it is in the sum, and nowhere else.
            if !row[0].is_finite() {
                return Ok(false);
            }
            largest
                .top
                .extend(row[1..].chunks_exact(2).map(|entry| (entry[0].to_bits(), entry[1])));
            largest.log_sum_exp.push(f64::from(row[2] / temperature) + f64::from(row[0]).ln());
        }
        Ok(true)
    }
}
