//! The GPU, through Vulkan, Metal or DX12: every operation is a compute shader.
//!
//! - `adapter`: what the machine has; `device`: buffers, pipelines and submissions of an open GPU;
//! - `fuse`: from operations to steps, without hardware; `run`: the steps of a pass as dispatches;
//! - `kernels`: what a shader is joined from (the WGSL itself is in `shaders/`); `pipelines`: compiled ones on disk;
//! - `weights`: weights on the device; `layout`: how their rows lie there; `cache`: keys and values.
//!
//! Weights lie on the device in the bytes of their file, in an order that suits it; large matrices are
//! split by rows at its binding limit, and those that are multiplied with the same rows lie together, so
//! that one dispatch has them all. A pass records dispatches, which become one compute pass in one submission
//! (several where that would take the device too long), and nothing waits until results are read.
//!
//! A product takes up to eight rows of activations at once, or tiles of 32 of many, and adds each
//! element up in the same order however many there are. Compilers of drivers may still disagree from
//! one shader to the next: the first time that a weight type is loaded its shaders are compared, and
//! where they differ in a bit the one for eight rows is used for any number.

mod adapter;
mod cache;
mod device;
mod fuse;
mod kernels;
mod layout;
mod pipelines;
mod run;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::{Executor, Loaded, Stage};
use crate::error::{Error, Result};
use crate::graph::Program;
use crate::quant::BlockType;
use device::{Device, Recorder, Storage, lock};
use kernels::Kernel;
use run::GpuStage;
use weights::{Agreement, Uploads};

pub use adapter::Adapter;
pub use device::KernelTimes;
pub use kernels::Arithmetic;

/// Rows of activations are padded with zeros to whole chunks.
const CHUNK: usize = 32;

/// The most workgroups in one direction.
const MOST_GROUPS: usize = 65535;

/// A workgroup of a product has so many weight rows, or more.
const LEAST_GROUP_ROWS: usize = 8;

/// Which of several ways to compute is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variants {
    /// Sums are exchanged in registers where the device has subgroups, else through workgroup
    /// memory alone.
    pub subgroups: bool,
    /// How activations are multiplied with quantized weights; `None` is the fastest within the
    /// numerics contract: bytes, or single precision on software devices, which have no products of
    /// bytes.
    pub arithmetic: Option<Arithmetic>,
    /// Products with more than 16 rows of activations share them, and unpacked weights, among
    /// threads.
    pub tiles: bool,
    /// Products take eight rows of activations always, however many there are; there are no tiles.
    pub padded: bool,
    /// Products of bytes with up to 16 rows do the operation that follows as well: norms, gates, rotations.
    pub fused: bool,
}

impl Default for Variants {
    fn default() -> Self {
        Variants { subgroups: true, arithmetic: None, tiles: true, padded: false, fused: true }
    }
}

impl Variants {
    /// The defaults, changed as the environment variable `MTAD_GPU` says: a list of `f32`, `int8`
    /// or `f16`, and `subgroups`, `tiles`, `padded`, `fused`, each of these possibly after `no-`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another word.
    pub fn from_env() -> Result<Self> {
        Self::parse(&std::env::var("MTAD_GPU").unwrap_or_default())
    }

    /// The defaults, changed as a list of words says.
    ///
    /// # Errors
    /// As [`Variants::from_env`].
    pub fn parse(words: &str) -> Result<Self> {
        let mut variants = Variants::default();
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let (name, on) = match word.strip_prefix("no-") {
                Some(name) => (name, false),
                None => (word, true),
            };
            match name {
                "f32" if on => variants.arithmetic = Some(Arithmetic::F32),
                "int8" if on => variants.arithmetic = Some(Arithmetic::Int8),
                "f16" if on => variants.arithmetic = Some(Arithmetic::F16),
                "subgroups" => variants.subgroups = on,
                "tiles" => variants.tiles = on,
                "padded" => variants.padded = on,
                "fused" => variants.fused = on,
                _ => {
                    return Err(Error::invalid(format!(
                        "MTAD_GPU has `{word}`; there are f32, int8, f16, and subgroups, tiles, padded, fused, each with or without no- before it"
                    )));
                }
            }
        }
        Ok(variants)
    }
}

/// A GPU that runs programs.
#[derive(Debug)]
pub struct Gpu {
    adapter: Adapter,
    device: Device,
    variants: Variants,
    /// How activations are multiplied with quantized weights.
    arithmetic: Arithmetic,
    /// Whether sums are exchanged in registers.
    subgroups: bool,
    /// The most bytes of a part of a matrix.
    part_limit: usize,
    /// The most bytes of partial sums of attention: rows go in several dispatches if they would take more.
    partial_limit: usize,
    uploads: Uploads,
    /// For each type that was loaded, which of its kernels agree.
    agreeing: Mutex<HashMap<BlockType, Agreement>>,
    /// Bound where a product has no bias or no scales, or no second or third output.
    nothing: [Arc<Storage>; 3],
}

impl Gpu {
    /// Opens an adapter with the variants that the environment asks for.
    ///
    /// # Errors
    /// As [`Gpu::with`] and [`Variants::from_env`].
    pub fn open(adapter: &Adapter) -> Result<Self> {
        Self::with(adapter, Variants::from_env()?)
    }

    /// Opens an adapter.
    ///
    /// # Errors
    /// [`Error::Device`] with the driver's reason.
    pub fn with(adapter: &Adapter, variants: Variants) -> Result<Self> {
        // (Eight threads share a sum; what is no power of two has never been seen.)
        let fits = |&(least, _): &(u32, u32)| least >= 8 && least.is_power_of_two();
        let subgroups = variants.subgroups && adapter.subgroups().as_ref().is_some_and(fits);
        if !adapter.reads_f16() {
            let what = "has no compute shaders that read half precision; use the CPU";
            return Err(Error::Device { device: adapter.name().to_owned(), what: what.to_owned() });
        }
        let arithmetic = match variants.arithmetic {
            Some(arithmetic) => arithmetic,
            None if adapter.is_software() => Arithmetic::F32,
            None => Arithmetic::Int8,
        };
        if arithmetic == Arithmetic::F16 && !adapter.has_f16() {
            let what = "does not compute in half precision, which MTAD_GPU asks for (`f16`)";
            return Err(Error::Device { device: adapter.name().to_owned(), what: what.to_owned() });
        }
        let device = Device::open(adapter, subgroups, arithmetic == Arithmetic::F16)?;
        let nothing = [device.storage(16)?, device.storage(16)?, device.storage(16)?];
        Ok(Gpu {
            part_limit: device.binding_limit() as usize - 64,
            partial_limit: 32 << 20,
            adapter: adapter.clone(),
            variants: Variants {
                tiles: variants.tiles && adapter.has_room_for_tiles(),
                fused: variants.fused
                    && arithmetic == Arithmetic::Int8
                    && adapter.has_room_for_fused_products(),
                ..variants
            },
            arithmetic,
            subgroups,
            device,
            uploads: Uploads::default(),
            agreeing: Mutex::default(),
            nothing,
        })
    }

    /// What it was opened from.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The variants that it was opened with.
    pub fn variants(&self) -> Variants {
        self.variants
    }

    /// The weight types whose shaders disagreed, so that the widest is used for any number of rows.
    pub fn padded_types(&self) -> Vec<BlockType> {
        self.types_that(|agreement| !agreement.batch_rows)
    }

    /// The weight types for which there are no tiles, though there could be: their shaders disagreed.
    pub fn untiled_types(&self) -> Vec<BlockType> {
        let tiles = self.variants.tiles && !self.variants.padded;
        self.types_that(|agreement| tiles && agreement.batch_rows && !agreement.tiles)
    }

    fn types_that(&self, fits: impl Fn(&Agreement) -> bool) -> Vec<BlockType> {
        let agreeing = lock(&self.agreeing);
        agreeing.iter().filter(|(_, found)| fits(found)).map(|(block, _)| *block).collect()
    }

    /// What of it is used, for people: `subgroups, f32 activations, tiles`.
    pub fn kernels(&self) -> String {
        let Variants { tiles, padded, .. } = self.variants;
        let mut out = if self.subgroups { "subgroups" } else { "shared memory" }.to_owned();
        out += &format!(", {} activations", self.arithmetic.name());
        let names = |types: Vec<BlockType>| {
            let names: Vec<_> = types.iter().map(|t| t.name()).collect();
            (!names.is_empty()).then(|| names.join(" "))
        };
        match (padded, tiles) {
            (true, _) => out += ", padded",
            (false, true) => out += ", tiles",
            (false, false) => {}
        }
        if self.variants.fused {
            out += ", fused";
        }
        if let Some(types) = names(self.untiled_types()) {
            out += &format!(" (not for {types})");
        }
        if let Some(types) = names(self.padded_types()).filter(|_| !padded) {
            out += &format!(", padded for {types}");
        }
        out
    }

    /// Gives the device back to the system, as if it had been unplugged: whatever is asked of it
    /// from now on is [`Error::DeviceLost`]. For tests of what then happens.
    pub fn destroy(&self) {
        self.device.destroy();
    }

    /// Has kernels timed from now on, which makes passes slower. False if the device cannot.
    pub fn time_kernels(&self) -> bool {
        self.device.time_kernels()
    }

    /// Seconds on the device and calls, by kernel, since [`Gpu::time_kernels`]; ends the timing.
    pub fn kernel_times(&self) -> KernelTimes {
        self.device.times()
    }

    /// Waits until the device has nothing left to do.
    ///
    /// # Errors
    /// What the device reports.
    pub fn finish(&self) -> Result<()> {
        self.device.finish()
    }

    /// Bytes per second at which a shader reads a buffer of `bytes` (or as many as bind at once),
    /// again and again.
    ///
    /// # Errors
    /// What the device reports.
    pub fn read_bandwidth(&self, bytes: usize) -> Result<f64> {
        const GROUPS: usize = 4096;
        let bytes = bytes.min(self.part_limit) / 16 * 16;
        let (source, out) = (self.device.storage(bytes as u64)?, self.device.storage(16)?);
        let read = |times: usize| {
            let start = std::time::Instant::now();
            let mut recorder = Recorder::new(&self.device)?;
            let params = [bytes / 16, 256 * GROUPS];
            for _ in 0..times {
                recorder.dispatch(Kernel::Stream, &[&source, &out], &params, [GROUPS, 1, 1])?;
            }
            recorder.finish()?;
            self.device.finish()?;
            Ok::<_, Error>(start.elapsed().as_secs_f64())
        };
        // (The first time, memory is cleared and the shader compiled.)
        let once = read(1).and_then(|_| read(1))?;
        // For so long that what a submission costs is nothing beside it.
        let times = (0.05 / once).clamp(1.0, 100.0) as usize;
        Ok((times * bytes) as f64 / read(times)?)
    }
}

impl Executor for Gpu {
    fn describe(&self) -> String {
        let Gpu { adapter, .. } = self;
        format!("{} ({}, {})", adapter.name(), adapter.interface(), self.kernels())
    }

    fn weight_memory(&self, _program: &Program, _ops: Range<usize>) -> u64 {
        // (They lie in the device's own memory.)
        0
    }

    fn load(
        self: Arc<Self>,
        program: &Arc<Program>,
        ops: Range<usize>,
        loaded: Loaded<'_>,
    ) -> Result<Box<dyn Stage>> {
        Ok(Box::new(GpuStage::load(self, program, ops, loaded)?))
    }
}
