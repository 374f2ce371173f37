//! Models that run: weights on devices, the sequences of their users, and the passes that these share.
//!
//! - `pipeline`: a program's stages one after another; `sequence`: one text's rows, and the [`Lm`] that decoders
//!   see of it; `scheduler`: what sequences post, gathered into passes;
//! - [`device`]: the devices that a model can be loaded to; `failover`: what happens when one is lost.

pub mod device;
mod failover;
mod pipeline;
mod scheduler;
mod sequence;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::exec::{CacheType, Executor, place};
use crate::gguf::Gguf;
use crate::graph::{KvShape, Program};
use crate::lm::Lm;
use crate::models;
pub use device::Device;
use device::OnGpu;
use failover::{Failover, Standby};
use pipeline::Pipeline;
use scheduler::Scheduler;
use sequence::Handle;

/// How a session keeps its rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct SessionOptions {
    /// The most rows; `None` is what the model was trained for.
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
    notes: Arc<Mutex<Vec<String>>>,
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
        let notes = Arc::default();
        let Device::Gpu(on_gpu) = device else {
            return Self::load_on(file, device, notes, progress);
        };
        match Self::load_on(file.clone(), device, notes, progress) {
            Err(error @ (Error::Device { .. } | Error::DeviceLost { .. }))
                if on_gpu.may_fall_back =>
            {
                let cpu = Device::Cpu(on_gpu.cpu.clone());
                let note = format!("{error}; runs on {} instead", cpu.describe());
                Self::load_on(file, &cpu, Arc::new(Mutex::new(vec![note])), progress)
            }
            loaded => loaded,
        }
    }

    fn load_on(
        file: Arc<Gguf>,
        device: &Device,
        notes: Arc<Mutex<Vec<String>>>,
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
        let mut standby = None;
        let placement: place::Placement = match device {
            Device::Cpu(cpu) => vec![(cpu.clone(), layers)],
            Device::Gpu(OnGpu { gpu, cpu, layers: on_gpu, may_fall_back }) => {
                if *may_fall_back {
                    let (file, cpu) = (file.clone(), Device::Cpu(cpu.clone()));
                    standby = Some(Arc::new(Standby::new(notes.clone(), move || {
                        Model::load(file.clone(), &cpu, &mut |_, _| true)
                    })));
                }
                let on_gpu = on_gpu.unwrap_or(layers).min(layers);
                let parts: [(Arc<dyn Executor>, usize); 2] =
                    [(cpu.clone(), layers - on_gpu), (gpu.clone(), on_gpu)];
                parts.into_iter().filter(|(_, layers)| *layers > 0).collect()
            }
        };
        let shape = Arc::new(shape_of(&program));
        let pipeline = Pipeline::load(program, placement, &mut loaded)?;
        let scheduler = Arc::new(Scheduler::new(pipeline));
        let digest = Arc::default();
        Ok(Model { scheduler, shape, file, device: device.clone(), digest, standby, notes })
    }

    /// A new session with an empty cache.
    pub fn session(&self, options: &SessionOptions) -> Box<dyn Lm> {
        if let (Some(limit), Some(wanted)) = (self.shape().position_limit, options.context)
            && wanted > limit
        {
            let note = format!(
                "{} has {limit} learned positions; a context of {wanted} ends there",
                self.file.name()
            );
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            if !notes.contains(&note) {
                notes.push(note);
            }
        }
        let capacity = options.context.unwrap_or(self.shape.context);
        let capacity = capacity.min(self.shape.position_limit.unwrap_or(usize::MAX));
        let session = Handle::new(self.scheduler.clone(), capacity, options.cache_type);
        match &self.standby {
            None => Box::new(session),
            Some(standby) => Box::new(Failover::new(Box::new(session), standby.clone(), *options)),
        }
    }

    /// What runs it, for people.
    pub fn describe(&self) -> String {
        self.scheduler.pipeline().describe()
    }

    /// What a person should know of where it runs: that a device did not do, or was lost. Each note
    /// is handed out once.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner))
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
