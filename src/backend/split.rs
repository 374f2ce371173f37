//! Two devices that share a model: its first layers run on the CPU, the others on the GPU.
//!
//! A forward pass knows nothing of it. Weights decide where a verb runs, and the residual stream
//! changes sides once: the CPU computes at once and the GPU only records, so the hidden rows are
//! handed over when the first verb on the GPU asks for them.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

use super::cpu::{self, Cpu, CpuPass};
use super::gpu::{self, Gpu, GpuPass};
use super::{Backend, CacheShape, Largest, Pass, RotaryPairs, Rows};
use crate::error::Result;
use crate::gguf::SharedTensor;

/// A CPU and a GPU as one backend.
#[derive(Debug)]
pub struct Split {
    cpu: Arc<Cpu>,
    gpu: Arc<Gpu>,
    /// Layers on the CPU: the layers from here on, and the logits, are the GPU's.
    first: usize,
}

/// Something that one of the two has.
#[derive(Debug)]
pub enum Side<C, G> {
    /// It is the CPU's.
    Cpu(C),
    /// It is the GPU's.
    Gpu(G),
}

/// Activations on one of the two.
#[derive(Debug)]
pub struct Buffer {
    cpu: cpu::Buffer,
    // (Written when it is first read on the GPU.)
    gpu: RefCell<gpu::Buffer>,
    on_gpu: Cell<bool>,
}

/// The rows of the CPU's layers, and of the GPU's.
#[derive(Debug)]
pub struct Cache {
    layers: usize,
    cpu: cpu::Cache,
    gpu: gpu::Cache,
}

impl Split {
    /// The first `first` layers on the CPU, the others on the GPU.
    pub fn new(cpu: Arc<Cpu>, gpu: Arc<Gpu>, first: usize) -> Self {
        Split { cpu, gpu, first }
    }

    /// Whether a tensor belongs to the CPU: to one of its layers, or to what makes hidden rows of
    /// tokens before the first. Other tensors of no layer come after the last.
    fn is_on_cpu(&self, tensor: &SharedTensor) -> bool {
        let name = tensor.view().name;
        if name.starts_with("token_embd_") {
            return true;
        }
        let number = name.strip_prefix("blk.").and_then(|n| n.split('.').next());
        number.and_then(|n| n.parse::<usize>().ok()).is_some_and(|layer| layer < self.first)
    }
}

impl Backend for Split {
    type Matrix = Side<cpu::Matrix, gpu::Matrix>;
    type Vector = Side<cpu::Vector, gpu::Vector>;
    type Embedding = cpu::Embedding;
    type Buffer = Buffer;
    type Cache = Cache;
    type Pass<'p> = SplitPass<'p>;

    fn describe(&self) -> String {
        let (cpu, gpu) = (self.cpu.describe(), self.gpu.describe());
        format!("{} layers on {cpu}, the others on {gpu}", self.first)
    }

    fn matrix(&self, weight: &SharedTensor, bias: Option<&SharedTensor>) -> Result<Self::Matrix> {
        Ok(match self.is_on_cpu(weight) {
            true => Side::Cpu(self.cpu.matrix(weight, bias)?),
            false => Side::Gpu(self.gpu.matrix(weight, bias)?),
        })
    }

    fn matrices(
        &self,
        weights: &[(SharedTensor, Option<SharedTensor>)],
    ) -> Result<Vec<Self::Matrix>> {
        match weights.iter().any(|(weight, _)| self.is_on_cpu(weight)) {
            // (They are of one layer.)
            true => {
                weights.iter().map(|(weight, bias)| self.matrix(weight, bias.as_ref())).collect()
            }
            false => Ok(self.gpu.matrices(weights)?.into_iter().map(Side::Gpu).collect()),
        }
    }

    fn vector(&self, weight: &SharedTensor) -> Result<Self::Vector> {
        Ok(match self.is_on_cpu(weight) {
            true => Side::Cpu(self.cpu.vector(weight)?),
            false => Side::Gpu(self.gpu.vector(weight)?),
        })
    }

    fn embedding(&self, weight: &SharedTensor) -> Result<cpu::Embedding> {
        self.cpu.embedding(weight)
    }

    fn buffer(&self, width: usize) -> Buffer {
        Buffer {
            cpu: self.cpu.buffer(width),
            gpu: RefCell::new(self.gpu.buffer(width)),
            on_gpu: Cell::new(false),
        }
    }

    fn cache(&self, shape: CacheShape) -> Cache {
        let layers = |layers| CacheShape { layers, ..shape };
        Cache {
            layers: shape.layers,
            cpu: self.cpu.cache(layers(self.first)),
            gpu: self.gpu.cache(layers(shape.layers - self.first)),
        }
    }

    fn move_rows(&self, cache: &mut Cache, moves: &[(usize, usize)]) -> Result<()> {
        self.cpu.move_rows(&mut cache.cpu, moves)?;
        self.gpu.move_rows(&mut cache.gpu, moves)
    }

    fn save_rows(&self, cache: &Cache, slots: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        // Layer by layer, so the CPU's come first.
        self.cpu.save_rows(&cache.cpu, slots.clone(), out)?;
        self.gpu.save_rows(&cache.gpu, slots, out)
    }

    fn load_rows(&self, cache: &mut Cache, slots: Range<usize>, bytes: &[u8]) -> Result<()> {
        let (cpu, gpu) = bytes.split_at(bytes.len() / cache.layers * self.first);
        self.cpu.load_rows(&mut cache.cpu, slots.clone(), cpu)?;
        self.gpu.load_rows(&mut cache.gpu, slots, gpu)
    }

    fn pass<R>(
        &self,
        rows: &Rows<'_>,
        macs: usize,
        record: impl FnOnce(&mut SplitPass<'_>) -> Result<R>,
    ) -> Result<R> {
        let gpu = self.gpu.begin(rows)?;
        self.cpu.pass(rows, macs, |cpu| {
            let mut pass = SplitPass { cpu: *cpu, gpu, split: self };
            let recorded = record(&mut pass);
            pass.gpu.end(recorded)
        })
    }

    fn read<'a>(&self, buffer: &'a Buffer, copy: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        if !buffer.on_gpu.get() {
            return self.cpu.read(&buffer.cpu, copy);
        }
        self.gpu.read_into(&buffer.gpu.borrow(), copy)?;
        Ok(copy)
    }

    fn read_largest(
        &self,
        buffer: &Buffer,
        k: usize,
        temperature: f32,
        largest: &mut Largest,
    ) -> Result<bool> {
        let on_gpu = buffer.on_gpu.get();
        Ok(on_gpu && self.gpu.read_largest(&buffer.gpu.borrow(), k, temperature, largest)?)
    }
}

/// A pass under way on both.
pub struct SplitPass<'p> {
    cpu: CpuPass<'p>,
    gpu: GpuPass<'p>,
    split: &'p Split,
}

impl SplitPass<'_> {
    /// Sees to it that a buffer is on the GPU.
    fn hand_over(&mut self, x: &Buffer) {
        if !x.on_gpu.replace(true) {
            let mut copy = Vec::new();
            let read = self.split.cpu.read(&x.cpu, &mut copy);
            let rows = read.expect("the CPU's buffers can always be read");
            self.gpu.write(rows, &mut x.gpu.borrow_mut());
        }
    }
}

impl Pass<Split> for SplitPass<'_> {
    fn embed(&mut self, table: &cpu::Embedding, out: &mut Buffer) {
        self.cpu.embed(table, &mut out.cpu);
        out.on_gpu.set(false);
    }

    fn add_positions(&mut self, table: &cpu::Embedding, x: &mut Buffer) {
        assert!(!x.on_gpu.get(), "positions are added before the first layer");
        self.cpu.add_positions(table, &mut x.cpu);
    }

    fn write(&mut self, rows: &[f32], out: &mut Buffer) {
        self.cpu.write(rows, &mut out.cpu);
        out.on_gpu.set(false);
    }

    fn rms_norm(
        &mut self,
        x: &Buffer,
        weight: &Side<cpu::Vector, gpu::Vector>,
        epsilon: f32,
        out: &mut Buffer,
    ) {
        match weight {
            Side::Cpu(weight) => self.cpu.rms_norm(&x.cpu, weight, epsilon, &mut out.cpu),
            Side::Gpu(weight) => {
                self.hand_over(x);
                self.gpu.rms_norm(&x.gpu.borrow(), weight, epsilon, out.gpu.get_mut());
            }
        }
        out.on_gpu.set(matches!(weight, Side::Gpu(_)));
    }

    fn layer_norm(
        &mut self,
        x: &Buffer,
        weight: &Side<cpu::Vector, gpu::Vector>,
        bias: &Side<cpu::Vector, gpu::Vector>,
        epsilon: f32,
        out: &mut Buffer,
    ) {
        match (weight, bias) {
            (Side::Cpu(weight), Side::Cpu(bias)) => {
                self.cpu.layer_norm(&x.cpu, weight, bias, epsilon, &mut out.cpu);
            }
            (Side::Gpu(weight), Side::Gpu(bias)) => {
                self.hand_over(x);
                self.gpu.layer_norm(&x.gpu.borrow(), weight, bias, epsilon, out.gpu.get_mut());
            }
            _ => unreachable!("weight and bias of a norm belong to one layer"),
        }
        out.on_gpu.set(matches!(weight, Side::Gpu(_)));
    }

    fn linear(&mut self, x: &Buffer, to: &mut [(&Side<cpu::Matrix, gpu::Matrix>, &mut Buffer)]) {
        let (mut cpu, mut gpu) = (Vec::new(), Vec::new());
        for (matrix, out) in to {
            out.on_gpu.set(matches!(matrix, Side::Gpu(_)));
            match matrix {
                Side::Cpu(matrix) => cpu.push((matrix, &mut out.cpu)),
                Side::Gpu(matrix) => gpu.push((matrix, out.gpu.get_mut())),
            }
        }
        if !cpu.is_empty() {
            self.cpu.linear(&x.cpu, &mut cpu);
        }
        if !gpu.is_empty() {
            self.hand_over(x);
            self.gpu.linear(&x.gpu.borrow(), &mut gpu);
        }
    }

    fn linear_add(
        &mut self,
        x: &Buffer,
        weight: &Side<cpu::Matrix, gpu::Matrix>,
        out: &mut Buffer,
    ) {
        match weight {
            Side::Cpu(weight) => self.cpu.linear_add(&x.cpu, weight, &mut out.cpu),
            Side::Gpu(weight) => {
                self.hand_over(x);
                self.hand_over(out);
                self.gpu.linear_add(&x.gpu.borrow(), weight, out.gpu.get_mut());
            }
        }
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
        if let Some(layer) = layer.checked_sub(self.split.first) {
            let (q, k) = (q.gpu.get_mut(), k.gpu.get_mut());
            self.gpu.rotate_and_store(q, k, &v.gpu.borrow(), pairs, &mut cache.gpu, layer);
        } else {
            let (q, k, cache) = (&mut q.cpu, &mut k.cpu, &mut cache.cpu);
            self.cpu.rotate_and_store(q, k, &v.cpu, pairs, cache, layer);
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
        if let Some(layer) = layer.checked_sub(self.split.first) {
            self.gpu.attend(&q.gpu.borrow(), &cache.gpu, layer, window, out.gpu.get_mut());
            out.on_gpu.set(true);
        } else {
            self.cpu.attend(&q.cpu, &cache.cpu, layer, window, &mut out.cpu);
            out.on_gpu.set(false);
        }
    }

    fn swiglu(&mut self, gate: &mut Buffer, up: &Buffer) {
        if gate.on_gpu.get() {
            self.gpu.swiglu(gate.gpu.get_mut(), &up.gpu.borrow());
        } else {
            self.cpu.swiglu(&mut gate.cpu, &up.cpu);
        }
    }

    fn relu(&mut self, x: &mut Buffer) {
        if x.on_gpu.get() {
            self.gpu.relu(x.gpu.get_mut());
        } else {
            self.cpu.relu(&mut x.cpu);
        }
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        if x.on_gpu.get() {
            self.gpu.gather(&x.gpu.borrow(), rows, out.gpu.get_mut());
        } else {
            self.cpu.gather(&x.cpu, rows, &mut out.cpu);
        }
        out.on_gpu.set(x.on_gpu.get());
    }
}
