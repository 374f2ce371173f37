//! Finding GPUs: what the machine has, and which of it is meant by a name.

use std::path::Path;

use super::kernels::MOST_THREADS;
use crate::error::{Error, Result};

/// A device that wgpu found, before it is opened.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub(super) raw: wgpu::Adapter,
    info: wgpu::AdapterInfo,
    limits: wgpu::Limits,
    features: wgpu::Features,
}

impl Adapter {
    /// All adapters of all interfaces, in the order of their numbers. Empty where there is no
    /// driver.
    pub fn all() -> Vec<Adapter> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
            flags: wgpu::InstanceFlags::empty(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let found = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
        found
            .into_iter()
            .map(|raw| Adapter {
                info: raw.get_info(),
                limits: raw.limits(),
                features: raw.features(),
                raw,
            })
            .collect()
    }

    /// Whether there may be a GPU at all: on Linux, whether the kernel shows one. That is a look at
    /// a few names, where asking the drivers takes its time and is not always quiet.
    pub fn may_be_there() -> bool {
        const NODES: [&str; 6] = ["dri", "nvidiactl", "nvidia0", "dxg", "kgsl-3d0", "mali0"];
        let shown = |name: &&str| Path::new("/dev").join(name).exists();
        !cfg!(target_os = "linux") || NODES.iter().any(shown)
    }

    /// Its name, as its driver gives it.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// The driver and its version.
    pub fn driver(&self) -> String {
        format!("{} {}", self.info.driver, self.info.driver_info).trim().to_owned()
    }

    /// The interface that it is used through: `vulkan`, `metal` or `dx12`.
    pub fn interface(&self) -> String {
        self.info.backend.to_string()
    }

    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub fn kind(&self) -> &'static str {
        match self.info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        }
    }

    /// Whether it is the CPU in disguise: slower than our own CPU path, so it runs only if it is
    /// asked for.
    pub fn is_software(&self) -> bool {
        self.info.device_type == wgpu::DeviceType::Cpu
    }

    /// The most bytes that one binding may have: larger matrices are split by rows.
    pub fn binding_limit(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size)
    }

    /// The most bytes of one buffer.
    pub fn buffer_limit(&self) -> u64 {
        self.limits.max_buffer_size
    }

    /// Bytes of its largest memory that is its own (where CPU and GPU share memory: the shared one), if the
    /// interface tells: Vulkan does.
    pub fn memory(&self) -> Option<u64> {
        #[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
        {
            const DEVICE_LOCAL: u32 = 1;
            // SAFETY: the adapter is only looked at, while it is held; nothing of it is destroyed.
            let adapter = unsafe { self.raw.as_hal::<wgpu::hal::api::Vulkan>() }?;
            let instance = adapter.shared_instance().raw_instance();
            // SAFETY: the handle is that of an adapter of this instance, and both exist while it is held.
            let memory = unsafe {
                instance.get_physical_device_memory_properties(adapter.raw_physical_device())
            };
            let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
            let own = heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0);
            own.map(|heap| heap.size).max()
        }
        #[cfg(not(any(
            windows,
            target_os = "linux",
            target_os = "android",
            target_os = "freebsd"
        )))]
        None
    }

    /// Bytes of memory that a workgroup may share.
    pub fn workgroup_memory(&self) -> u32 {
        self.limits.max_compute_workgroup_storage_size
    }

    /// Whether its workgroups are large enough for tiled products: 256 threads that share up to
    /// 30 KiB.
    pub(super) fn has_room_for_tiles(&self) -> bool {
        let limits = &self.limits;
        limits.max_compute_invocations_per_workgroup >= 256
            && limits.max_compute_workgroup_size_x >= 256
            && limits.max_compute_workgroup_storage_size >= 30 << 10
    }

    /// Whether its workgroups are large enough for products that do the operation that follows as well, and whether
    /// these can be given enough buffers.
    pub(super) fn has_room_for_fused_products(&self) -> bool {
        let limits = &self.limits;
        limits.max_compute_invocations_per_workgroup >= MOST_THREADS
            && limits.max_compute_workgroup_size_x >= MOST_THREADS
            && limits.max_storage_buffers_per_shader_stage >= 9
    }

    /// The least and the largest size of a subgroup, if threads of a subgroup can exchange values.
    pub fn subgroups(&self) -> Option<(u32, u32)> {
        let sizes = (self.info.subgroup_min_size, self.info.subgroup_max_size);
        (self.features.contains(wgpu::Features::SUBGROUP) && sizes.0 > 0).then_some(sizes)
    }

    /// Whether shaders may compute in half precision.
    pub fn has_f16(&self) -> bool {
        self.features.contains(wgpu::Features::SHADER_F16)
    }

    /// Whether shaders can read the half-precision numbers of weights and caches: nothing runs
    /// without.
    pub fn reads_f16(&self) -> bool {
        let flags = self.raw.get_downlevel_capabilities().flags;
        flags.contains(
            wgpu::DownlevelFlags::SHADER_F16_IN_F32 | wgpu::DownlevelFlags::COMPUTE_SHADERS,
        )
    }

    /// Whether it can say when its work begins and ends.
    pub fn has_timestamps(&self) -> bool {
        self.features.contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// What it can do.
    pub(super) fn features(&self) -> wgpu::Features {
        self.features
    }

    /// Its limits, to open it with all of them.
    pub(super) fn limits(&self) -> &wgpu::Limits {
        &self.limits
    }

    /// Sorts better GPUs first.
    fn rank(&self) -> u8 {
        match self.info.device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        }
    }

    /// Of `adapters`, the one that `gpu` means: the best that is no software.
    pub fn best(adapters: &[Adapter]) -> Option<&Adapter> {
        adapters.iter().filter(|adapter| !adapter.is_software()).min_by_key(|a| a.rank())
    }

    /// Of `adapters`, the one that is meant by `gpu`, `gpu:N` or a part of its name.
    ///
    /// # Errors
    /// [`Error::Invalid`] that says what there is, if there is none of that name.
    pub fn named<'a>(adapters: &'a [Adapter], name: &str) -> Result<&'a Adapter> {
        let wanted = name.to_lowercase();
        let found = match wanted.strip_prefix("gpu") {
            Some("") => Self::best(adapters),
            Some(number) if number.starts_with(':') => {
                number[1..].parse().ok().and_then(|number: usize| adapters.get(number))
            }
            _ if wanted.is_empty() => None,
            _ => {
                let fits = |a: &&Adapter| a.name().to_lowercase().contains(&wanted);
                adapters.iter().filter(fits).min_by_key(|adapter| adapter.rank())
            }
        };
        found.ok_or_else(|| {
            let what = match wanted.as_str() {
                "gpu" => "no GPU was found".to_owned(),
                _ => format!("there is no device `{name}`"),
            };
            let list = adapters
                .iter()
                .enumerate()
                .map(|(i, a)| format!("`gpu:{i}` ({}, {})", a.name(), a.kind()));
            let list: Vec<_> = ["`cpu`".to_owned()].into_iter().chain(list).collect();
            Error::invalid(format!("{what}; there is {}", list.join(", ")))
        })
    }
}
