//! Models that run: weights on devices, the sequences of their users, and the passes that these share.
//!
//! - `pipeline`: a program's stages one after another; `sequence`: one text's rows, and the [`Lm`] that decoders
//!   see of it; `scheduler`: what sequences post, gathered into passes;
//! - [`device`]: the devices that a model can be loaded to; `failover`: what happens when one is lost;
//! - `memory`: what is needed, known before it is taken; `notes`: what a person should know.

pub mod device;
mod failover;
mod memory;
mod notes;
mod pipeline;
mod scheduler;
mod sequence;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
pub use crate::exec::cpu::{Cpu, Isa, Readable};
#[cfg(feature = "gpu")]
pub use crate::exec::wgpu::{Adapter, Gpu, KernelTimes};
pub use crate::exec::{CacheType, Executor};
use crate::exec::{place, row_bytes};
use crate::gguf::Gguf;
use crate::graph::{KvShape, Program};
use crate::lm::{Lm, MAX_TREE};
use crate::models;
pub use device::Device;
use failover::{Failover, Standby};
use memory::Reservation;
pub use memory::{Budget, Size};
pub use notes::NoteListener;
use notes::Notes;
use pipeline::Pipeline;
pub use scheduler::PassCounts;
use scheduler::Scheduler;
use sequence::Handle;

/// How a session keeps its rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct SessionOptions {
    /// The most rows; `None` is what the model was trained for, `usize::MAX` as many as memory holds.
    pub context: Option<usize>,
    /// How keys and values are stored.
    pub cache_type: CacheType,
}

/// A model's figures.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Positions that it was trained for.
    pub context: usize,
    /// Multiplications with weights for one row, logits included.
    pub macs: usize,
    /// Bytes of the weights that every pass reads: all matrices, as the file stores them.
    pub weight_bytes: usize,
    /// The most positions that it has any notion of, if there is a limit: learned ones.
    pub position_limit: Option<usize>,
    /// What each layer keeps of a row.
    pub layers: Vec<KvShape>,
}

/// A model's weights on a device, shared by all sessions. Sessions on several threads share passes.
#[derive(Clone)]
pub struct Model {
    scheduler: Arc<Scheduler>,
    shape: Arc<Shape>,
    file: Arc<Gguf>,
    device: Device,
    digest: Arc<OnceLock<u128>>,
    /// Where sessions go on if the device is lost.
    standby: Option<Arc<Standby>>,
    notes: Arc<Notes>,
    budget: Budget,
    /// What weights and activations take.
    _taken: Arc<Reservation>,
}

/// Told of loading: bytes done and bytes in all. Returning false stops it.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

impl Model {
    /// Loads a file's weights onto a device.
    ///
    /// # Errors
    /// The file's architecture, metadata or tensors do not do; the device has no room;
    /// [`Error::Cancelled`] if `progress` said so.
    pub fn load(file: Arc<Gguf>, device: &Device, progress: Progress<'_>) -> Result<Self> {
        Self::load_within(file, device, &Budget::available(), progress)
    }

    /// The same within a budget. On the CPU a model whose packed weights would not fit runs from its file, which
    /// is slower; a note says so.
    ///
    /// # Errors
    /// As [`Model::load`]; [`Error::Memory`].
    pub fn load_within(
        file: Arc<Gguf>,
        device: &Device,
        budget: &Budget,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let error = match Self::load_on(file.clone(), device, Arc::default(), budget, progress) {
            Err(error @ (Error::Device { .. } | Error::DeviceLost { .. })) => error,
            loaded => return loaded,
        };
        let Some(fallback) = device.fallback() else { return Err(error) };
        let note = format!("{error}; runs on {} instead", fallback.describe());
        let notes = Arc::new(Notes::default());
        notes.tell(note);
        Self::load_on(file, &fallback, notes, budget, progress)
    }

    fn load_on(
        file: Arc<Gguf>,
        device: &Device,
        notes: Arc<Notes>,
        budget: &Budget,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let total: u64 = file.tensors().map(|t| t.bytes.len() as u64).sum();
        let mut done = 0;
        let mut loaded = |bytes: u64| {
            done += bytes;
            if progress(done.min(total), total) { Ok(()) } else { Err(Error::Cancelled) }
        };
        let program = Arc::new(models::program(&file)?);
        let layers = program.layers.len();
        let standby = device.fallback().map(|fallback| {
            let (file, budget) = (file.clone(), budget.clone());
            Arc::new(Standby::new(notes.clone(), move || {
                Model::load_within(file.clone(), &fallback, &budget, &mut |_, _| true)
            }))
        });
        let placement: place::Placement = match device {
            Device::Cpu(cpu) => {
                let (cpu, note) = packing_if_it_fits(cpu, &program, file.name(), budget);
                note.into_iter().for_each(|note| notes.tell(note));
                vec![(cpu, layers)]
            }
            #[cfg(feature = "gpu")]
            Device::Gpu(on_gpu) => on_gpu.placement(layers),
        };
        let shape = Arc::new(shape_of(&program));
        let weights = weight_memory(&program, &placement)?;
        let taken = budget.take(&[
            (&format!("the weights of {}", file.name()), weights),
            ("its activations", program.activation_bytes(MAX_TREE)),
        ])?;
        let pipeline = Pipeline::load(program, placement, &mut loaded)?;
        let scheduler = Arc::new(Scheduler::new(pipeline));
        let digest = Arc::default();
        Ok(Model {
            scheduler,
            shape,
            file,
            device: device.clone(),
            digest,
            standby,
            notes,
            budget: budget.clone(),
            _taken: Arc::new(taken),
        })
    }

    /// A new session with an empty cache. Without [`SessionOptions::context`] it has the rows that the model was
    /// trained for, or as many as memory holds.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is none for the context that was asked for.
    pub fn session(&self, options: &SessionOptions) -> Result<Box<dyn Lm>> {
        let limit = self.shape.position_limit.unwrap_or(usize::MAX);
        let asked = options.context.filter(|context| *context < usize::MAX);
        if let Some(wanted) = asked.filter(|wanted| *wanted > limit) {
            self.notes.tell(format!(
                "{} has {limit} learned positions; a context of {wanted} ends there",
                self.file.name()
            ));
        }
        let trained = self.shape.context;
        if let Some(wanted) = asked.filter(|wanted| *wanted > trained && trained < limit) {
            self.notes.tell(format!(
                "{} was trained for a context of {trained}, and is given one of {wanted}",
                self.file.name()
            ));
        }
        let row = self.row_bytes(options.cache_type);
        let mut capacity = options.context.unwrap_or(self.shape.context).min(limit);
        if let (None, Some(left)) = (asked, self.budget.left()) {
            // (Half of what is left, so that another session has room too.)
            let fits = usize::try_from(left / 2 / row.max(1)).unwrap_or(usize::MAX);
            if fits < capacity && options.context.is_none() {
                self.notes.tell(format!(
                    "{} was trained for a context of {capacity}; memory holds {fits} rows of it",
                    self.file.name()
                ));
            }
            capacity = capacity.min(fits);
        }
        let what = format!("a context of {capacity} rows");
        let taken = self.budget.take(&[(&what, row.saturating_mul(capacity as u64))])?;
        let session = Handle::new(self.scheduler.clone(), capacity, options.cache_type, taken);
        Ok(match &self.standby {
            None => Box::new(session),
            Some(standby) => Box::new(Failover::new(Box::new(session), standby.clone(), *options)),
        })
    }

    /// Bytes that a session takes for each row of its context.
    pub fn row_bytes(&self, cache_type: CacheType) -> u64 {
        row_bytes(&self.shape.layers, cache_type) as u64
    }

    /// The memory that it may take, with what is left of it.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The passes that its sessions have run so far.
    pub fn pass_counts(&self) -> PassCounts {
        self.scheduler.counts()
    }

    /// What runs it, for people.
    pub fn describe(&self) -> String {
        self.scheduler.pipeline().describe()
    }

    /// What a person should know of where it runs: that a device did not do, or was lost. Each note
    /// is handed out once.
    pub fn take_notes(&self) -> Vec<String> {
        self.notes.take()
    }

    /// Has such notes heard by `listener`, as they come up.
    pub fn on_note(&self, listener: NoteListener) {
        self.notes.listen(listener);
    }

    /// The file that it came from.
    pub fn file(&self) -> &Arc<Gguf> {
        &self.file
    }

    /// The hash of what it is, see [`Gguf::digest`]: computed when it is first asked for.
    pub fn digest(&self) -> u128 {
        *self.digest.get_or_init(|| self.file.digest())
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its figures.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

/// A CPU that packs weights, if these then fit a budget; otherwise one that leaves them in their file, and a note
/// that says so.
fn packing_if_it_fits(
    cpu: &Arc<Cpu>,
    program: &Program,
    file: &str,
    budget: &Budget,
) -> (Arc<Cpu>, Option<String>) {
    let needed = cpu.weight_memory(program, 0..program.ops.len());
    let needed = needed.saturating_add(program.activation_bytes(MAX_TREE));
    match budget.left() {
        Some(left) if cpu.repacks() && needed > left => {
            let note = format!(
                "{file} runs from its file, which is slower: packed it would take {}, and there are {}",
                Size(needed),
                Size(left)
            );
            (Arc::new(cpu.as_ref().clone().without_repacking()), Some(note))
        }
        _ => (cpu.clone(), None),
    }
}

/// Bytes that the weights take in memory.
fn weight_memory(program: &Program, placement: &place::Placement) -> Result<u64> {
    let layers: Vec<_> = placement.iter().map(|(_, layers)| *layers).collect();
    let ranges = place::cut(program, &layers)?;
    let parts = placement.iter().zip(ranges);
    Ok(parts.map(|((executor, _), ops)| executor.weight_memory(program, ops)).sum())
}

fn shape_of(program: &Program) -> Shape {
    let cost = program.cost_of(0..program.ops.len());
    Shape {
        vocab_size: program.vocab_size,
        context: program.context,
        macs: cost.macs,
        weight_bytes: cost.weight_bytes,
        position_limit: program.position_limit,
        layers: program.layers.clone(),
    }
}
