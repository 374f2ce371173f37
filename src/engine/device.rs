//! The devices that a model can be loaded to, and the names that people give them.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::exec::cpu::{Cpu, Isa};
#[cfg(feature = "gpu")]
use crate::exec::place::Placement;
#[cfg(feature = "gpu")]
use crate::exec::wgpu::{Adapter, Gpu};

/// Where a model is loaded to. The only place that knows all executors.
#[derive(Debug, Clone)]
pub enum Device {
    /// The CPU; models on one `Cpu` share its threads.
    Cpu(Arc<Cpu>),
    /// A GPU, with all or some of the model's layers.
    #[cfg(feature = "gpu")]
    Gpu(OnGpu),
}

/// A GPU, and what stands beside it.
#[cfg(feature = "gpu")]
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

#[cfg(feature = "gpu")]
impl OnGpu {
    /// Which layers of a model with so many run where.
    pub(super) fn placement(&self, layers: usize) -> Placement {
        let on_gpu = self.layers.unwrap_or(layers).min(layers);
        let parts: [(Arc<dyn Executor>, usize); 2] =
            [(self.cpu.clone(), layers - on_gpu), (self.gpu.clone(), on_gpu)];
        parts.into_iter().filter(|(_, layers)| *layers > 0).collect()
    }
}

impl Device {
    /// Where a model goes on if this device has no room for it or is lost, if it may.
    pub(super) fn fallback(&self) -> Option<Device> {
        match self {
            Device::Cpu(_) => None,
            #[cfg(feature = "gpu")]
            Device::Gpu(on_gpu) => on_gpu.may_fall_back.then(|| Device::Cpu(on_gpu.cpu.clone())),
        }
    }

    /// The device that a person means by `name`:
    ///
    /// - `cpu`;
    /// - `gpu`: the best GPU that is no software; `gpu:N`: adapter N of `mtad devices`; or a part
    ///   of an adapter's name, in any case;
    /// - `auto`: the best GPU if there is one, else the CPU.
    ///
    /// `layers` of a model run on the GPU, the last ones; `None` is all. `cpu` runs the others.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such device; [`Error::Device`] if it cannot be opened.
    pub fn named(name: &str, cpu: Cpu, layers: Option<usize>) -> Result<Self> {
        let cpu = Arc::new(cpu);
        let auto = name.eq_ignore_ascii_case("auto");
        if name.eq_ignore_ascii_case("cpu") {
            return Ok(Device::Cpu(cpu));
        }
        Self::gpu_named(name, auto, cpu, layers)
    }

    #[cfg(not(feature = "gpu"))]
    fn gpu_named(name: &str, auto: bool, cpu: Arc<Cpu>, _layers: Option<usize>) -> Result<Self> {
        match auto {
            true => Ok(Device::Cpu(cpu)),
            false => Err(Error::invalid(format!(
                "there is no device `{name}`: mtad was built without its feature `gpu`; there is `cpu`"
            ))),
        }
    }

    #[cfg(feature = "gpu")]
    fn gpu_named(name: &str, auto: bool, cpu: Arc<Cpu>, layers: Option<usize>) -> Result<Self> {
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
        #[cfg(feature = "gpu")]
        {
            let adapters = if Adapter::may_be_there() { Adapter::all() } else { Vec::new() };
            match Adapter::best(&adapters).map(|adapter| (adapter.name(), Gpu::open(adapter))) {
                Some((name, Ok(_))) => (name.to_owned(), "it is the best GPU here".to_owned()),
                Some((_, Err(error))) => ("cpu".to_owned(), error.to_string()),
                None => ("cpu".to_owned(), "no GPU was found".to_owned()),
            }
        }
        #[cfg(not(feature = "gpu"))]
        ("cpu".to_owned(), "mtad was built without its feature `gpu`".to_owned())
    }

    /// All devices, and where `auto` runs a model, as JSON: {"devices": [{"name", "description",
    /// ...}], "auto": {"device", "why"}}.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn all_as_json() -> Result<Json> {
        let cpu = Cpu::with_isa(0, Isa::from_env()?.unwrap_or(Isa::best()))?;
        let sets = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name);
        #[allow(unused_mut)]
        let mut devices = vec![json!({
            "name": "cpu",
            "description": cpu.describe(),
            "instruction_set": cpu.isa().name(),
            "instruction_sets": sets.collect::<Vec<_>>(),
            "threads": cpu.threads(),
        })];
        #[cfg(feature = "gpu")]
        devices.extend(Adapter::all().iter().enumerate().map(|(i, gpu)| adapter_json(i, gpu)));
        let (auto, why) = Device::auto_choice();
        Ok(json!({"devices": devices, "auto": {"device": auto, "why": why}}))
    }

    /// What it is, for people.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(cpu) => cpu.describe(),
            #[cfg(feature = "gpu")]
            Device::Gpu(OnGpu { gpu, layers: None, .. }) => gpu.describe(),
            #[cfg(feature = "gpu")]
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

#[cfg(feature = "gpu")]
fn adapter_json(i: usize, adapter: &Adapter) -> Json {
    let mut out = json!({
        "name": format!("gpu:{i}"),
        "description": adapter.name(),
        "driver": adapter.driver(),
        "interface": adapter.interface(),
        "type": adapter.kind(),
        "binding_limit": adapter.binding_limit(),
        "buffer_limit": adapter.buffer_limit(),
        "workgroup_memory": adapter.workgroup_memory(),
        // The interfaces do not tell how much there is.
        "memory": Json::Null,
        "subgroups": adapter.subgroups().map(|(least, most)| json!([least, most])),
        "f16": adapter.has_f16(),
        "timestamps": adapter.has_timestamps(),
    });
    match Gpu::open(adapter).map(|gpu| gpu.kernels()) {
        Ok(kernels) => out["kernels"] = kernels.into(),
        Err(error) => out["error"] = error.to_string().into(),
    }
    out
}
