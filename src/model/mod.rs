//! Models: what decoders see ([`lm`]), the bookkeeping of line and tree ([`tree`]), and the
//! architectures whose forward passes run on a backend.

pub mod config;
pub mod llama;
pub mod lm;
pub mod session;
pub mod table;
pub mod tree;
pub mod weights;

use std::sync::{Arc, OnceLock};

use crate::backend::CacheType;
use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use lm::Lm;
use session::{Architecture, Session, Shape};

/// Where a model is loaded to.
#[derive(Debug, Clone)]
pub enum Device {
    /// The CPU; models on one `Cpu` share its threads.
    Cpu(Arc<Cpu>),
}

impl Device {
    /// What it is, for people.
    pub fn describe(&self) -> String {
        use crate::backend::Backend;
        match self {
            Device::Cpu(cpu) => cpu.describe(),
        }
    }
}

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
}

/// What a loaded model does, whatever its architecture and backend.
trait Sessions: Send + Sync {
    fn shape(&self) -> &Shape;
    fn session(&self, options: &SessionOptions) -> Box<dyn Lm>;
}

struct Loaded<B, A> {
    backend: Arc<B>,
    model: Arc<A>,
}

impl<B: crate::backend::Backend, A: Architecture<B>> Sessions for Loaded<B, A> {
    fn shape(&self) -> &Shape {
        self.model.shape()
    }

    fn session(&self, options: &SessionOptions) -> Box<dyn Lm> {
        let capacity = options.context.unwrap_or(self.shape().context);
        let cache =
            crate::backend::CacheShape { cache_type: options.cache_type, ..self.shape().cache };
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
        let total: u64 = file.tensors().map(|t| t.bytes.len() as u64).sum();
        let mut done = 0;
        let mut loaded = |bytes: u64| {
            done += bytes;
            if progress(done.min(total), total) { Ok(()) } else { Err(Error::Cancelled) }
        };
        let sessions: Arc<dyn Sessions> = match device {
            Device::Cpu(backend) => {
                let model = llama::Llama::load(&file, &**backend, &mut loaded)?;
                Arc::new(Loaded { backend: backend.clone(), model: Arc::new(model) })
            }
        };
        Ok(Model { sessions, file, device: device.clone(), digest: Arc::default() })
    }

    /// A new session with an empty cache.
    pub fn session(&self, options: &SessionOptions) -> Box<dyn Lm> {
        self.sessions.session(options)
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
