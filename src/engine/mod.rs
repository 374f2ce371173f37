//! Models: what decoders see ([`lm`]), the bookkeeping of line and tree ([`tree`]), and the
//! architectures whose forward passes run on a backend.

pub mod config;
pub mod device;
pub mod llama;
pub mod lm;
pub mod opt;
mod rescue;
pub mod rotary;
pub mod session;
pub mod table;
pub mod tree;
pub mod weights;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::backend::split::Split;
use crate::backend::{Backend, CacheType};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use config::Hyperparameters;
pub use device::Device;
use device::OnGpu;
use lm::Lm;
use rescue::{Rescued, Spare};
use session::{Architecture, Session, Shape};

/// How a session keeps its rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct SessionOptions {
    /// The most rows; `None` is what the model was trained for.
    pub context: Option<usize>,
    /// How keys and values are stored.
    pub cache_type: CacheType,
}

/// A model's weights on a device, shared by all sessions.
#[derive(Clone)]
pub struct Model {
    sessions: Arc<dyn Sessions>,
    file: Arc<Gguf>,
    device: Device,
    digest: Arc<OnceLock<u128>>,
    /// Where sessions go on if the device is lost.
    spare: Option<Arc<Spare>>,
    notes: Arc<Mutex<Vec<String>>>,
}

/// What a loaded model does, whatever its architecture and backend.
trait Sessions: Send + Sync {
    fn shape(&self) -> &Shape;
    fn describe(&self) -> String;
    fn session(&self, options: &SessionOptions) -> Box<dyn Lm>;
}

struct Loaded<B, A> {
    backend: Arc<B>,
    model: Arc<A>,
}

impl<B: Backend, A: Architecture<B>> Sessions for Loaded<B, A> {
    fn shape(&self) -> &Shape {
        self.model.shape()
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn session(&self, options: &SessionOptions) -> Box<dyn Lm> {
        let shape = self.shape();
        let capacity = options.context.unwrap_or(shape.context);
        let capacity = capacity.min(shape.position_limit.unwrap_or(usize::MAX));
        let cache = crate::backend::CacheShape { cache_type: options.cache_type, ..shape.cache };
        Box::new(Session::new(self.backend.clone(), self.model.clone(), capacity, cache))
    }
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
        let layers = Hyperparameters::of(&file)?.required("block_count")?;
        let mut spare = None;
        let sessions = match device {
            Device::Cpu(cpu) => sessions(&file, cpu.clone(), &mut loaded)?,
            Device::Gpu(OnGpu { gpu, cpu, layers: on_gpu, may_fall_back }) => {
                if *may_fall_back {
                    let (file, cpu) = (file.clone(), Device::Cpu(cpu.clone()));
                    spare = Some(Arc::new(Spare::new(notes.clone(), move || {
                        Model::load(file.clone(), &cpu, &mut |_, _| true)
                    })));
                }
                match on_gpu.map_or(0, |on_gpu| layers.saturating_sub(on_gpu)) {
                    0 => sessions(&file, gpu.clone(), &mut loaded)?,
                    first => {
                        let split = Split::new(cpu.clone(), gpu.clone(), first);
                        sessions(&file, Arc::new(split), &mut loaded)?
                    }
                }
            }
        };
        let digest = Arc::default();
        Ok(Model { sessions, file, device: device.clone(), digest, spare, notes })
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
        let session = self.sessions.session(options);
        match &self.spare {
            None => session,
            Some(spare) => Box::new(Rescued::new(session, spare.clone(), *options)),
        }
    }

    /// What runs it, for people.
    pub fn describe(&self) -> String {
        self.sessions.describe()
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
        self.sessions.shape()
    }
}

/// Loads a file onto a backend.
fn sessions<B: Backend>(
    file: &Arc<Gguf>,
    backend: Arc<B>,
    loaded: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Arc<dyn Sessions>> {
    Ok(match Hyperparameters::of(file)?.architecture() {
        "opt" => {
            let model = Arc::new(opt::Opt::load(file, &*backend, loaded)?);
            Arc::new(Loaded { backend, model })
        }
        _ => {
            let model = Arc::new(llama::Llama::load(file, &*backend, loaded)?);
            Arc::new(Loaded { backend, model })
        }
    })
}
