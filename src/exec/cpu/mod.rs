//! The CPU: panels of packed weights, a pool of threads per pass, kernels chosen at run time.
//!
//! - `stage`: operations with their weights, and the interpreter that runs them; `workspace`: activations;
//! - `panel`: the form of the weights; `matmul`: products of a few rows with them;
//! - `cache`: key and value rows; `attention`: attention over them;
//! - `kernels`: what is compiled for which instruction set, over the vector operations of `simd`;
//! - `pool`: how threads share a pass; `probe`: what the machine can do at most.
//!
//! Weights are packed once, when a model is loaded, unless they are to stay in the mapped file, as
//! embedding tables do.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod attention;
mod cache;
mod kernels;
mod matmul;
#[cfg(test)]
mod noise;
mod panel;
mod pool;
mod probe;
mod simd;
mod stage;
#[cfg(test)]
mod tests;
mod workspace;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;
use std::sync::Arc;

use super::{Executor, Loaded};
use crate::error::{Error, Result};
use crate::exec;
use crate::gguf::{SharedTensor, Tensor};
use crate::graph::{Program, WeightUse};
use panel::Panels;
use pool::Pool;
use stage::Stage;

pub use kernels::Isa;
pub use probe::Readable;

/// Rows are padded to whole vectors.
const LANES: usize = 16;

/// A pass of fewer multiplications than this stays on the calling thread: waking the others takes
/// some tens of microseconds.
const ALONE_MACS: usize = 4 << 20;

/// An operation on fewer elements than this is not worth a barrier.
const ALONE_ELEMENTS: usize = 32 << 10;

/// The CPU as an executor. Clones share their threads.
#[derive(Debug, Clone)]
pub struct Cpu {
    pool: Arc<Pool>,
    isa: Isa,
    repack: bool,
}

impl Cpu {
    /// The CPU with `threads` threads (0: one for each physical core that this process may use)
    /// and the best instruction set.
    ///
    /// # Errors
    /// Threads cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::best())
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
        let pool = Pool::new(threads)
            .map_err(|e| Error::invalid(format!("cannot start {threads} threads: {e}")))?;
        Ok(Cpu { pool: Arc::new(pool), isa, repack: true })
    }

    /// The same, but weights stay in their file and are packed anew whenever they are used: takes
    /// no time to load and no memory beyond the mapped file, and is several times as slow for few
    /// rows. The results are the same.
    pub fn without_repacking(self) -> Self {
        Cpu { repack: false, ..self }
    }

    /// Whether weights are packed when they are loaded.
    pub fn repacks(&self) -> bool {
        self.repack
    }

    /// The instruction set that runs.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads that run.
    pub fn threads(&self) -> usize {
        self.pool.threads()
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

impl Cpu {
    /// A weight matrix in panels, packed or left in its file.
    fn panels(&self, weight: &SharedTensor) -> Result<Panels> {
        if !self.repack {
            return Panels::mapped(weight);
        }
        let on_all = |parts: usize, job: &(dyn Fn(usize) + Sync)| {
            self.pool.enter(true, |scope| scope.run(parts, job));
        };
        let panels = Panels::pack(&weight.view(), on_all)?;
        // The panels hold it now: the mapped pages need not stay in memory too.
        weight.release();
        Ok(panels)
    }
}

impl Executor for Cpu {
    fn describe(&self) -> String {
        let threads = match self.threads() {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        let repacking = if self.repack { "" } else { ", not repacked" };
        format!("cpu ({}, {threads}{repacking})", self.isa)
    }

    fn weight_memory(&self, program: &Program, ops: Range<usize>) -> u64 {
        let bytes = |id| {
            let weight = program.weight(id);
            let view = weight.tensor.view();
            match weight.used_as {
                WeightUse::Matrix if self.repack => Panels::memory_of(&view),
                WeightUse::Vector => 4 * view.rows * view.cols,
                WeightUse::Matrix | WeightUse::Table => 0,
            }
        };
        program.weights_of(ops).into_iter().map(|id| bytes(id) as u64).sum()
    }

    fn load(
        self: Arc<Self>,
        program: &Arc<Program>,
        ops: Range<usize>,
        loaded: Loaded<'_>,
    ) -> Result<Box<dyn exec::Stage>> {
        Ok(Box::new(Stage::load(self, program, ops, loaded)?))
    }
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

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// They are there for as long as the slice is used, and nobody else uses them meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, first: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), len) }
    }
}

/// The `part`-th of `parts` equal stretches of `0..count`.
fn share(count: usize, part: usize, parts: usize) -> Range<usize> {
    count * part / parts..count * (part + 1) / parts
}
