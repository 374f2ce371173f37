//! Key and value rows on the device.

use std::ops::Range;
use std::sync::Arc;

use super::Gpu;
use super::device::{Recorder, Storage};
use super::kernels::Kernel;
use crate::error::Result;
use crate::exec::{self, CacheType, KvCache};
use crate::graph::KvShape;

/// The cache of one sequence in the layers of a stage.
pub(super) struct GpuCache {
    gpu: Arc<Gpu>,
    pub cache_type: CacheType,
    /// The number of its first layer.
    first_layer: usize,
    shapes: Vec<KvShape>,
    /// Slots that there is room for.
    slots: usize,
    /// Keys and values of each layer, once there is room for any.
    pub(super) layers: Vec<[Arc<Storage>; 2]>,
}

impl GpuCache {
    pub fn new(
        gpu: Arc<Gpu>,
        first_layer: usize,
        shapes: Vec<KvShape>,
        cache_type: CacheType,
    ) -> Self {
        GpuCache { gpu, cache_type, first_layer, shapes, slots: 0, layers: Vec::new() }
    }

    /// Words of the keys or values of a slot.
    fn words(&self, shape: &KvShape) -> usize {
        shape.width() * self.cache_type.bytes() / 4
    }

    /// Keys and values of a layer of the program; there must be room for some slots.
    pub fn layer(&self, layer: usize) -> &[Arc<Storage>; 2] {
        &self.layers[layer - self.first_layer]
    }

    /// Makes room for so many slots. What the cache holds stays; if there is no room, it is as it was.
    pub fn reserve(&mut self, wanted: usize) -> Result<()> {
        if wanted <= self.slots {
            return Ok(());
        }
        let device = &self.gpu.device;
        let widest = self.shapes.iter().map(|shape| self.words(shape)).max().unwrap_or(1);
        let limit = device.binding_limit() as usize / (4 * widest);
        if wanted > limit {
            return Err(device.fault(format!("holds {limit} rows of context, {wanted} are wanted")));
        }
        let slots = wanted.max(2 * self.slots).next_multiple_of(256).min(limit);
        let room = |shape: &KvShape| {
            let storage = || device.storage(4 * (slots * self.words(shape)) as u64);
            Ok([storage()?, storage()?])
        };
        let new: Vec<[Arc<Storage>; 2]> = self.shapes.iter().map(room).collect::<Result<_>>()?;
        if !self.layers.is_empty() {
            self.copy_to(&new, self.slots)?;
            device.replaced();
        }
        (self.slots, self.layers) = (slots, new);
        Ok(())
    }

    /// Copies the first slots of each layer, on the device.
    fn copy_to(&self, layers: &[[Arc<Storage>; 2]], slots: usize) -> Result<()> {
        assert!(slots <= self.slots, "{slots} of {} slots", self.slots);
        let mut copies = Vec::new();
        for ((from, to), shape) in self.layers.iter().zip(layers).zip(&self.shapes) {
            let bytes = 4 * (slots * self.words(shape)) as u64;
            copies.extend(from.iter().zip(to).map(|(from, to)| (&**from, &**to, bytes)));
        }
        self.gpu.device.copy(&copies)
    }
}

impl Drop for GpuCache {
    /// Bind groups of passes would keep its buffers alive for as long as they are kept themselves.
    fn drop(&mut self) {
        if !self.layers.is_empty() {
            self.gpu.device.replaced();
        }
    }
}

impl KvCache for GpuCache {
    fn move_rows(&mut self, moves: &[(usize, usize)]) -> Result<()> {
        let mut recorder = Recorder::new(&self.gpu.device)?;
        let at = recorder.data(moves.iter().flat_map(|&(from, to)| [from as u32, to as u32]));
        for ([keys, values], shape) in self.layers.iter().zip(&self.shapes) {
            let words = self.words(shape);
            let (params, groups) = ([words, moves.len(), at], [words.div_ceil(64), 1, 1]);
            recorder.dispatch(Kernel::MoveRows, &[keys, values], &params, groups)?;
        }
        recorder.finish()
    }

    fn save_rows(&self, slots: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        if slots.is_empty() {
            return Ok(());
        }
        // The cache is laid out as saved rows are.
        for (layer, shape) in self.layers.iter().zip(&self.shapes) {
            let row = 4 * self.words(shape) as u64;
            let (at, bytes) = (slots.start as u64 * row, slots.len() as u64 * row);
            for storage in layer {
                let show = |bytes: &[u8]| out.extend_from_slice(bytes);
                self.gpu.device.read_bytes(storage, at, bytes, show)?;
            }
        }
        Ok(())
    }

    fn load_rows(&mut self, slots: Range<usize>, mut bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), slots.len() * self.row_bytes());
        if slots.is_empty() {
            return Ok(());
        }
        self.gpu.device.check()?;
        self.reserve(slots.end)?;
        for (layer, shape) in self.layers.iter().zip(&self.shapes) {
            let row = 4 * self.words(shape);
            for storage in layer {
                let part;
                (part, bytes) = bytes.split_at(slots.len() * row);
                self.gpu.device.write_bytes(storage, (slots.start * row) as u64, part);
            }
        }
        self.gpu.device.check()
    }

    fn fork(&self, slots: usize) -> Result<Box<dyn KvCache>> {
        let (gpu, shapes) = (self.gpu.clone(), self.shapes.clone());
        let mut fork = GpuCache::new(gpu, self.first_layer, shapes, self.cache_type);
        if slots > 0 {
            fork.reserve(slots)?;
            self.copy_to(&fork.layers, slots)?;
        }
        Ok(Box::new(fork))
    }

    fn row_bytes(&self) -> usize {
        exec::row_bytes(&self.shapes, self.cache_type)
    }
}
