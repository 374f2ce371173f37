//! The devices that a model can be loaded to, and the names that people give them.

use std::sync::Arc;

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::gpu::{Adapter, Gpu};
use crate::error::{Error, Result};

/// Where a model is loaded to. The only place that knows all backends.
#[derive(Debug, Clone)]
pub enum Device {
    /// The CPU; models on one `Cpu` share its threads.
    Cpu(Arc<Cpu>),
    /// A GPU, with all or some of the model's layers.
    Gpu(OnGpu),
}

/// A GPU, and what stands beside it.
#[derive(Debug, Clone)]
pub struct OnGpu {
    /// The GPU.
    pub gpu: Arc<Gpu>,
    /// Runs the layers that the GPU does not, and takes over if it may.
    pub cpu: Arc<Cpu>,
    /// How many layers the GPU runs: the last ones, with the logits. `None` is all.
    pub layers: Option<usize>,
    /// Whether the CPU takes over if the GPU has no room or is lost. Otherwise that is an error.
    pub may_fall_back: bool,
}

impl Device {
    /// The device that a person means by `name`:
    ///
    /// - `cpu`;
    /// - `gpu`: the best GPU that is no software; `gpu:N`: adapter N of `mtad devices`; or a part
    ///   of an adapter's name, in any case;
    /// - `auto`: the best GPU if there is one, else the CPU.
    ///
    /// `layers` of a model run on the GPU, the last ones; `None` is all. `threads` are the CPU's, 0
    /// for one on each physical core.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such device; [`Error::Device`] if it cannot be opened.
    pub fn named(name: &str, threads: usize, layers: Option<usize>) -> Result<Self> {
        let cpu = Arc::new(Cpu::new(threads)?);
        let auto = name.eq_ignore_ascii_case("auto");
        if name.eq_ignore_ascii_case("cpu") {
            return Ok(Device::Cpu(cpu));
        }
        if auto && !Adapter::may_be_there() {
            return Ok(Device::Cpu(cpu));
        }
        let adapters = Adapter::all();
        let gpu = match auto {
            false => Gpu::open(Adapter::named(&adapters, name)?)?,
            true => match Adapter::best(&adapters).map(Gpu::open) {
                Some(Ok(gpu)) => gpu,
                // A word in the environment that is not understood should not go unnoticed.
                Some(Err(error @ Error::Invalid(_))) => return Err(error),
                None | Some(Err(_)) => return Ok(Device::Cpu(cpu)),
            },
        };
        if layers == Some(0) {
            return Ok(Device::Cpu(cpu));
        }
        Ok(Device::Gpu(OnGpu { gpu: Arc::new(gpu), cpu, layers, may_fall_back: auto }))
    }

    /// Where `auto` runs a model, and why.
    pub fn auto_choice() -> (String, String) {
        let adapters = if Adapter::may_be_there() { Adapter::all() } else { Vec::new() };
        match Adapter::best(&adapters).map(|adapter| (adapter.name(), Gpu::open(adapter))) {
            Some((name, Ok(_))) => (name.to_owned(), "it is the best GPU here".to_owned()),
            Some((_, Err(error))) => ("cpu".to_owned(), error.to_string()),
            None => ("cpu".to_owned(), "no GPU was found".to_owned()),
        }
    }

    /// What it is, for people.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(cpu) => cpu.describe(),
            Device::Gpu(OnGpu { gpu, layers: None, .. }) => gpu.describe(),
            Device::Gpu(OnGpu { gpu, cpu, layers: Some(layers), .. }) => {
                format!(
                    "the last {layers} layers on {}, others on {}",
                    gpu.describe(),
                    cpu.describe()
                )
            }
        }
    }
}
