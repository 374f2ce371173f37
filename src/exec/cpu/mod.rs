//! The CPU: panels of packed weights, a team of threads per pass, kernels chosen at run time.
//!
//! - `panel`: the form of the weights; `matmul`: products of a few rows with them;
//! - `attention`: cache rows and attention; `kernels`: what is compiled for which instruction
//!   set, over the vector operations of `simd`;
//! - `team`: how threads share a pass; `probe`: what the machine can do at most.
//!
//! Weights are packed once, when a model is loaded, unless they are to stay in the mapped file, as
//! embedding tables do.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod attention;
mod kernels;
mod matmul;
#[cfg(test)]
mod noise;
mod panel;
mod probe;
mod simd;
mod team;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::RefCell;
use std::ops::Range;

use super::{Backend, CacheShape, Pass, RotaryPairs, Rows};
use crate::error::{Error, Result};
use crate::gguf::{SharedTensor, Tensor};
use crate::quant::BlockType;
use attention::{Attention, Layers, Scratch};
use kernels::{Kernels, LayerNorm};
use matmul::Form;
use panel::Panels;
use team::{Crew, Team};

pub use attention::Cache;
pub use kernels::Isa;
pub use probe::Readable;

/// Rows are padded to whole vectors.
const LANES: usize = 16;

/// A pass of fewer multiplications than this stays on the calling thread: waking the others takes
/// some tens of microseconds.
const ALONE_MACS: usize = 4 << 20;

/// An operation on fewer elements than this is not worth a barrier.
const ALONE_ELEMENTS: usize = 32 << 10;

/// Products of one input that are computed together: queries, keys and values.
const MOST_PRODUCTS: usize = 3;

/// The CPU as a backend.
#[derive(Debug)]
pub struct Cpu {
    team: Team,
    isa: Isa,
    repack: bool,
}

impl Cpu {
    /// The CPU with `threads` threads (0: one for each physical core that this process may use)
    /// and the best instruction set, or the one named by the environment variable `MTAD_CPU`.
    ///
    /// # Errors
    /// `MTAD_CPU` names something that this machine lacks; threads cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, kernels::chosen()?)
    }

    /// The CPU with a given instruction set.
    ///
    /// # Errors
    /// This machine lacks it; threads cannot be started.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        if !isa.is_available() {
            return Err(Error::invalid(format!("this machine does not have {isa}")));
        }
        let threads = match threads {
            0 => num_cpus::get_physical().min(num_cpus::get()),
            n => n,
        };
        let team = Team::new(threads)
            .map_err(|e| Error::invalid(format!("cannot start {threads} threads: {e}")))?;
        Ok(Cpu { team, isa, repack: true })
    }

    /// The same, but weights stay in their file and are packed anew whenever they are used: takes
    /// no time to load and no memory beyond the mapped file, and is several times as slow for few
    /// rows. The results are the same.
    pub fn without_repacking(self) -> Self {
        Cpu { repack: false, ..self }
    }

    /// The instruction set that runs.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads that run.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }
}

/// A packed weight matrix.
#[derive(Debug)]
pub struct Matrix {
    panels: Panels,
    bias: Option<Vec<f32>>,
}

/// A vector, padded with zeros.
#[derive(Debug)]
pub struct Vector(Vec<f32>);

/// An embedding table in its file.
#[derive(Debug)]
pub struct Embedding(SharedTensor);

/// Activations: rows of `width` f32, each padded with zeros to whole vectors.
#[derive(Debug)]
pub struct Buffer {
    width: usize,
    stride: usize,
    data: Vec<f32>,
}

impl Buffer {
    fn new(width: usize) -> Self {
        Buffer { width, stride: width.next_multiple_of(LANES), data: Vec::new() }
    }

    fn rows(&self) -> usize {
        self.data.len() / self.stride
    }

    /// Makes room for `rows` rows. Old contents stay: every verb writes whole rows.
    fn set_rows(&mut self, rows: usize) {
        self.data.resize(rows * self.stride, 0.0);
    }

    fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.stride..][..self.stride]
    }

    fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.stride..][..self.stride]
    }
}

/// A tensor whose type can be read.
fn readable(tensor: &SharedTensor) -> Result<Tensor<'_>> {
    let view = tensor.view();
    if view.block_type.can_dequantize() {
        return Ok(view);
    }
    let (name, block_type) = (view.name, view.block_type);
    let what = format!("tensor `{name}` has the type {block_type}, which cannot be read");
    Err(Error::unsupported(view.file, what))
}

/// A tensor's elements as f32, padded with zeros to whole vectors.
fn dequantized(tensor: &SharedTensor) -> Result<Vec<f32>> {
    let view = readable(tensor)?;
    let len = view.rows * view.cols;
    let mut out = vec![0.0; len.next_multiple_of(LANES)];
    view.block_type.dequantize(view.bytes, &mut out[..len]);
    Ok(out)
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Vector = Vector;
    type Embedding = Embedding;
    type Buffer = Buffer;
    type Cache = Cache;
    type Pass<'p> = CpuPass<'p>;

    fn describe(&self) -> String {
        let threads = match self.threads() {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        let repacking = if self.repack { "" } else { ", not repacked" };
        format!("cpu ({}, {threads}{repacking})", self.isa)
    }

    fn matrix(&self, weight: &SharedTensor, bias: Option<&SharedTensor>) -> Result<Matrix> {
        if let Some(bias) = bias {
            let view = bias.view();
            assert_eq!(view.rows * view.cols, weight.view().rows, "one bias for each output");
        }
        let panels = if self.repack {
            let on_all = |parts: usize, job: &(dyn Fn(usize) + Sync)| {
                self.team.enter(true, |crew| crew.run(parts, job));
            };
            let panels = Panels::pack(&weight.view(), on_all)?;
            // The panels hold it now: the mapped pages need not stay in memory too.
            weight.release();
            panels
        } else {
            Panels::mapped(weight)?
        };
        Ok(Matrix { panels, bias: bias.map(dequantized).transpose()? })
    }

    fn vector(&self, weight: &SharedTensor) -> Result<Vector> {
        dequantized(weight).map(Vector)
    }

    fn embedding(&self, weight: &SharedTensor) -> Result<Embedding> {
        readable(weight)?;
        Ok(Embedding(weight.clone()))
    }

    fn buffer(&self, width: usize) -> Buffer {
        Buffer::new(width)
    }

    fn cache(&self, shape: CacheShape) -> Cache {
        Cache::new(shape)
    }

    fn move_rows(&self, cache: &mut Cache, moves: &[(usize, usize)]) -> Result<()> {
        cache.move_rows(moves);
        Ok(())
    }

    fn save_rows(&self, cache: &Cache, slots: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        cache.save_rows(slots, out);
        Ok(())
    }

    fn load_rows(&self, cache: &mut Cache, slots: Range<usize>, bytes: &[u8]) -> Result<()> {
        cache.load_rows(slots, bytes);
        Ok(())
    }

    fn pass<R>(
        &self,
        rows: &Rows<'_>,
        macs: usize,
        record: impl FnOnce(&mut CpuPass<'_>) -> Result<R>,
    ) -> Result<R> {
        let together = macs.saturating_mul(rows.len()) >= ALONE_MACS;
        self.team.enter(together, |crew| {
            record(&mut CpuPass { rows: *rows, crew, kernels: self.isa.kernels() })
        })
    }

    fn read<'a>(&self, buffer: &'a Buffer, copy: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        if buffer.stride == buffer.width {
            return Ok(&buffer.data);
        }
        copy.clear();
        (0..buffer.rows()).for_each(|i| copy.extend_from_slice(&buffer.row(i)[..buffer.width]));
        Ok(copy)
    }
}

/// A pass under way on the CPU.
#[derive(Clone, Copy)]
pub struct CpuPass<'p> {
    rows: Rows<'p>,
    crew: &'p Crew<'p>,
    kernels: &'static Kernels,
}

/// A pointer that threads may share, because each writes where no other does.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: who uses it sees to it that no element is used by two threads at once.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// (A method, so that closures take the whole wrapper and not the pointer in it.)
    fn get(&self) -> *mut T {
        self.0
    }
}

/// The `part`-th of `parts` equal stretches of `0..count`.
fn share(count: usize, part: usize, parts: usize) -> Range<usize> {
    count * part / parts..count * (part + 1) / parts
}

thread_local! {
    /// Activations laid out for kernels; the leader's is used by all threads of a pass.
    static LAID_OUT: RefCell<Vec<(Form, Vec<u32>)>> = const { RefCell::new(Vec::new()) };
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

impl CpuPass<'_> {
    /// Runs `job` for each of `count` rows of `width` elements, on all threads if it pays.
    fn each_row(&self, count: usize, width: usize, job: impl Fn(usize) + Sync) {
        if count * width < ALONE_ELEMENTS || count == 1 {
            (0..count).for_each(job);
        } else {
            let parts = self.crew.threads();
            self.crew.run(parts, &|part| share(count, part, parts).for_each(&job));
        }
    }

    fn multiply(&mut self, x: &Buffer, to: &mut [(&Matrix, &mut Buffer)], add: bool) {
        let rows = x.rows();
        assert!(to.len() <= MOST_PRODUCTS);
        for (matrix, out) in to.iter_mut() {
            assert_eq!((matrix.panels.cols, matrix.panels.rows), (x.width, out.width));
            if add {
                assert_eq!(out.rows(), rows);
            } else {
                out.set_rows(rows);
            }
        }
        LAID_OUT.with_borrow_mut(|laid_out| {
            // Products of one input mostly read one form of it, and never more than each its own.
            let mut places = [0; MOST_PRODUCTS];
            let mut forms = 0;
            for (place, (matrix, _)) in places.iter_mut().zip(to.iter()) {
                let form = (self.kernels.matmul)(matrix.panels.block_type).form;
                *place = match laid_out[..forms].iter().position(|(f, _)| *f == form) {
                    Some(at) => at,
                    None => {
                        if laid_out.len() == forms {
                            laid_out.push((form, Vec::new()));
                        }
                        laid_out[forms].0 = form;
                        self.lay_out(form, x, &mut laid_out[forms].1);
                        forms += 1;
                        forms - 1
                    }
                };
            }
            let targets: Vec<_> = to
                .iter_mut()
                .zip(places)
                .map(|((m, out), place)| (&**m, Shared(out.data.as_mut_ptr()), out.stride, place))
                .collect();
            let (laid_out, parts) = (&*laid_out, self.crew.threads());
            self.crew.run(parts, &|part| {
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
                            laid_out[*place].1.as_ptr(),
                            rows,
                            out.get(),
                            *stride,
                            matrix.bias.as_deref(),
                            add,
                        );
                    }
                }
            });
        });
    }

    /// Lays the rows of `x` out in tiles.
    fn lay_out(&self, form: Form, x: &Buffer, out: &mut Vec<u32>) {
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
                let at = out.get().add(t * tile * row_dwords);
                let to = std::slice::from_raw_parts_mut(at, n * row_dwords);
                for r in 0..n {
                    (self.kernels.lay_out)(form, &x.row(t * tile + r)[..x.width], to, r, n);
                }
            }
        };
        self.each_row(rows.div_ceil(tile), tile.min(rows) * x.width, job);
    }
}

impl Pass<Cpu> for CpuPass<'_> {
    fn embed(&mut self, table: &Embedding, out: &mut Buffer) {
        let view = table.0.view();
        let width = out.width;
        out.set_rows(self.rows.len());
        for (i, &token) in self.rows.tokens.iter().enumerate() {
            view.block_type.dequantize(view.row(token as usize), &mut out.row_mut(i)[..width]);
        }
    }

    fn add_positions(&mut self, table: &Embedding, x: &mut Buffer) {
        let (view, width) = (table.0.view(), x.width);
        let mut positions = vec![0.0; width];
        for i in 0..self.rows.len() {
            let position = self.rows.seen(i) - 1;
            view.block_type.dequantize(view.row(position), &mut positions);
            x.row_mut(i).iter_mut().zip(&positions).for_each(|(x, p)| *x += p);
        }
    }

    fn write(&mut self, rows: &[f32], out: &mut Buffer) {
        let width = out.width;
        assert_eq!(rows.len() % width, 0);
        out.set_rows(rows.len() / width);
        for (i, row) in rows.chunks_exact(width).enumerate() {
            out.row_mut(i)[..width].copy_from_slice(row);
        }
    }

    fn rms_norm(&mut self, x: &Buffer, weight: &Vector, epsilon: f32, out: &mut Buffer) {
        assert_eq!(x.width, out.width);
        let stride = x.stride;
        out.set_rows(x.rows());
        let to = Shared(out.data.as_mut_ptr());
        self.each_row(x.rows(), x.width, |i| {
            // SAFETY: row i of `out` belongs to this call; the kernels are this machine's.
            unsafe {
                let to = std::slice::from_raw_parts_mut(to.get().add(i * stride), stride);
                (self.kernels.rms_norm)(x.row(i), x.width, &weight.0, epsilon, to);
            }
        });
    }

    fn layer_norm(
        &mut self,
        x: &Buffer,
        weight: &Vector,
        bias: &Vector,
        epsilon: f32,
        out: &mut Buffer,
    ) {
        assert_eq!(x.width, out.width);
        let stride = x.stride;
        let norm = LayerNorm { weight: &weight.0, bias: &bias.0, epsilon };
        out.set_rows(x.rows());
        let to = Shared(out.data.as_mut_ptr());
        self.each_row(x.rows(), x.width, |i| {
            // SAFETY: row i of `out` belongs to this call; the kernels are this machine's.
            unsafe {
                let to = std::slice::from_raw_parts_mut(to.get().add(i * stride), stride);
                (self.kernels.layer_norm)(x.row(i), x.width, &norm, to);
            }
        });
    }

    fn linear(&mut self, x: &Buffer, to: &mut [(&Matrix, &mut Buffer)]) {
        self.multiply(x, to, false);
    }

    fn linear_add(&mut self, x: &Buffer, weight: &Matrix, out: &mut Buffer) {
        self.multiply(x, &mut [(weight, out)], true);
    }

    fn rotate_and_store(
        &mut self,
        q: &mut Buffer,
        k: &mut Buffer,
        v: &Buffer,
        pairs: RotaryPairs,
        cache: &mut Cache,
        layer: usize,
    ) {
        let rows = self.rows;
        let half = rows.rotations.len() / rows.len();
        cache.reserve(layer, rows.first_slot + rows.len());
        let Cache { shape, layers } = cache;
        let width = shape.kv_heads * shape.head_dim;
        for i in 0..rows.len() {
            let rotations = &rows.rotations[i * half..][..half];
            let q_width = q.width;
            attention::rotate(&mut q.row_mut(i)[..q_width], shape.head_dim, rotations, pairs);
            attention::rotate(&mut k.row_mut(i)[..width], shape.head_dim, rotations, pairs);
            let (slot, k, v) = (rows.first_slot + i, &k.row(i)[..width], &v.row(i)[..width]);
            match layers {
                Layers::F16(layers) => attention::store(shape, &mut layers[layer], slot, k, v),
                Layers::F32(layers) => attention::store(shape, &mut layers[layer], slot, k, v),
            }
        }
    }

    fn attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        layer: usize,
        window: Option<usize>,
        out: &mut Buffer,
    ) {
        assert_eq!((q.width, q.rows()), (out.width, self.rows.len()));
        out.set_rows(q.rows());
        let heads = q.width / cache.shape.head_dim;
        let window = window.unwrap_or(usize::MAX);
        let a = Attention {
            rows: self.rows,
            shape: &cache.shape,
            window,
            group: heads / cache.shape.kv_heads,
            q: &q.data,
            out: out.data.as_mut_ptr(),
            stride: q.stride,
        };
        let seen = (self.rows.line + self.rows.len()).min(window);
        let parts = match seen * self.rows.len() * q.width {
            n if n < ALONE_ELEMENTS => 1,
            _ => self.crew.threads(),
        };
        let job = |part: usize| {
            let heads = share(heads, part, parts);
            SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: the rows were stored, so the layer has all their slots; heads are
                // shared out without overlap; the kernels are this machine's.
                unsafe {
                    match &cache.layers {
                        Layers::F16(l) => (self.kernels.attend_f16)(&a, &l[layer], heads, scratch),
                        Layers::F32(l) => (self.kernels.attend_f32)(&a, &l[layer], heads, scratch),
                    }
                }
            });
        };
        self.crew.run(parts, &job);
    }

    fn swiglu(&mut self, gate: &mut Buffer, up: &Buffer) {
        assert_eq!((gate.stride, gate.rows()), (up.stride, up.rows()));
        let (stride, rows) = (gate.stride, gate.rows());
        let to = Shared(gate.data.as_mut_ptr());
        self.each_row(rows, stride, |i| {
            // SAFETY: row i of `gate` belongs to this call; the kernels are this machine's.
            unsafe {
                let to = std::slice::from_raw_parts_mut(to.get().add(i * stride), stride);
                (self.kernels.swiglu)(to, up.row(i));
            }
        });
    }

    fn relu(&mut self, x: &mut Buffer) {
        let (stride, rows) = (x.stride, x.rows());
        let to = Shared(x.data.as_mut_ptr());
        self.each_row(rows, stride, |i| {
            // SAFETY: row i of `x` belongs to this call.
            let row = unsafe { std::slice::from_raw_parts_mut(to.get().add(i * stride), stride) };
            // (What is not a number stays so.)
            row.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = 0.0);
        });
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        out.set_rows(rows.len());
        for (i, &row) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(row as usize));
        }
    }
}
