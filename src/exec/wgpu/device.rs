//! An open GPU: its buffers, pipelines and submissions, and what goes wrong with them.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::adapter::Adapter;
use super::kernels::{Access, Kernel};
use super::pipelines::Pipelines;
use crate::error::{Error, Result};

/// Bytes of the parameters of a dispatch.
pub(super) const PARAMS: usize = 128;

/// Weights are uploaded in pieces of this many bytes: a driver keeps what is on its way twice.
pub(super) const UPLOAD: usize = 16 << 20;

/// Seconds that one submission should take at most: systems take a device that does not answer
/// for lost after two.
const SUBMISSION_SECONDS: f64 = 0.4;

/// How long the word that a buffer is mapped may take when its device has nothing left to do.
const MAPPING: Duration = Duration::from_secs(10);

/// Dispatches of a pass that are submitted first, while the others are still being recorded.
const FIRST_PIECE: usize = 16;

/// Locks, whatever happened to the thread that held the lock: what is guarded are caches.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer on the device that shaders read and write.
#[derive(Debug)]
pub(super) struct Storage {
    /// Unique among all buffers of the device.
    pub id: u64,
    pub raw: wgpu::Buffer,
    /// Bind groups whose last buffer this is, by layout and the other buffers.
    groups: Mutex<Groups>,
}

#[derive(Debug, Default)]
struct Groups {
    /// The device's epoch in which they were made.
    epoch: u64,
    made: HashMap<(&'static [Access], [u64; 7]), wgpu::BindGroup>,
}

/// What the device reported outside of a call.
#[derive(Debug, Default)]
struct Faults {
    lost: Option<String>,
    error: Option<String>,
}

/// A dispatch, ready to be encoded.
#[derive(Debug)]
struct Dispatch {
    kernel: Kernel,
    pipeline: Arc<wgpu::ComputePipeline>,
    group: wgpu::BindGroup,
    groups: [u32; 3],
    /// Rows and columns of a product's weights.
    shape: Option<[usize; 2]>,
    /// Roughly how many multiplications it is.
    cost: u64,
}

impl Dispatch {
    /// What it is, for tables.
    fn name(&self) -> String {
        let shape = self.shape.map(|[rows, cols]| format!(", {rows} x {cols}"));
        self.kernel.name() + &shape.unwrap_or_default()
    }
}

/// What a pass leads to on the device: dispatches, and the words that they read.
#[derive(Debug, Default)]
struct Work {
    dispatches: Vec<Dispatch>,
    /// Parameters of the dispatches, each at a multiple of the device's alignment.
    params: Vec<u8>,
    /// Words that shaders find in `data`.
    data: Vec<u32>,
    /// Dispatches that were submitted, with their parameters, and words of `data` that were written.
    submitted: usize,
    written: usize,
}

impl Work {
    fn clear(&mut self) {
        self.dispatches.clear();
        self.params.clear();
        self.data.clear();
        (self.submitted, self.written) = (0, 0);
    }
}

/// The buffers of a pass: parameters and data. A pass takes one and gives it back.
#[derive(Debug)]
struct Arena {
    params: wgpu::Buffer,
    data: wgpu::Buffer,
    group: wgpu::BindGroup,
    work: Work,
}

/// Records the dispatches of a pass. What is recorded is handed to the device piece by piece, the last of it by
/// [`Recorder::finish`].
pub(super) struct Recorder<'d> {
    device: &'d Device,
    arena: Arena,
}

impl<'d> Recorder<'d> {
    /// Begins a pass.
    ///
    /// # Errors
    /// What the device reported before.
    pub fn new(device: &'d Device) -> Result<Self> {
        device.check()?;
        Ok(Recorder { device, arena: device.arena() })
    }

    /// Words that kernels of this pass find from the returned place on.
    pub fn data(&mut self, words: impl IntoIterator<Item = u32>) -> usize {
        let data = &mut self.arena.work.data;
        let at = data.len();
        data.extend(words);
        at
    }

    /// Records a kernel over buffers, in as many workgroups.
    pub fn dispatch(
        &mut self,
        kernel: Kernel,
        buffers: &[&Arc<Storage>],
        params: &[usize],
        groups: [usize; 3],
    ) -> Result<()> {
        let params: Vec<u32> = params.iter().map(|n| *n as u32).collect();
        self.dispatch_words(kernel, buffers, &params, groups, None)
    }

    /// The same with parameters as words; `shape` is that of a product's weights.
    pub fn dispatch_words(
        &mut self,
        kernel: Kernel,
        buffers: &[&Arc<Storage>],
        params: &[u32],
        groups: [usize; 3],
        shape: Option<[usize; 2]>,
    ) -> Result<()> {
        if groups.contains(&0) {
            return Ok(());
        }
        let Recorder { device, arena } = self;
        device.submit_early(arena)?;
        let work = &mut arena.work;
        let at = work.dispatches.len() * device.params_step();
        work.params.resize(at + device.params_step(), 0);
        work.params[at..][..4 * params.len()].copy_from_slice(bytemuck::cast_slice(params));
        let group_cost = kernel.group_cost(shape.map_or(0, |[_, cols]| cols));
        work.dispatches.push(Dispatch {
            kernel,
            pipeline: device.pipeline(kernel),
            group: device.group(kernel.access(), buffers),
            groups: groups.map(|n| n as u32),
            shape,
            cost: (groups.iter().product::<usize>() * group_cost) as u64,
        });
        Ok(())
    }

    /// Hands the rest to the device, and does not wait for it.
    pub fn finish(mut self) -> Result<()> {
        self.device.submit(&mut self.arena)?;
        self.arena.work.clear();
        lock(&self.device.arenas).push(self.arena);
        Ok(())
    }
}

/// Seconds on the device, by kernel.
pub type KernelTimes = Vec<(String, f64, usize)>;

/// The device under [`super::Gpu`].
#[derive(Debug)]
pub(super) struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    name: String,
    limits: wgpu::Limits,
    /// Whether threads exchange sums in registers.
    subgroups: bool,
    faults: Arc<Mutex<Faults>>,
    pass_layout: wgpu::BindGroupLayout,
    layouts: Mutex<HashMap<&'static [Access], (wgpu::BindGroupLayout, wgpu::PipelineLayout)>>,
    compiled: Pipelines,
    pipelines: Mutex<HashMap<Kernel, Arc<wgpu::ComputePipeline>>>,
    arenas: Mutex<Vec<Arena>>,
    staging: Mutex<Vec<wgpu::Buffer>>,
    next_id: AtomicU64,
    /// Counts replaced buffers: bind groups of an older epoch would keep them alive.
    epoch: AtomicU64,
    last: Mutex<Option<wgpu::SubmissionIndex>>,
    speed: Mutex<Speed>,
    /// Times by kernel, while they are wanted.
    times: Mutex<Option<HashMap<String, (f64, usize)>>>,
}

impl Drop for Device {
    fn drop(&mut self) {
        self.compiled.save();
    }
}

/// How fast the device was so far.
#[derive(Debug)]
struct Speed {
    /// Multiplications per second.
    rate: f64,
    /// Since the last wait: multiplications, and when they began.
    pending: u64,
    begun: Option<Instant>,
}

impl Device {
    pub fn open(adapter: &Adapter, subgroups: bool, f16: bool) -> Result<Self> {
        let mut features = wgpu::Features::empty();
        if subgroups {
            features |= wgpu::Features::SUBGROUP;
        }
        if f16 {
            features |= wgpu::Features::SHADER_F16;
        }
        if adapter.has_timestamps() {
            features |= wgpu::Features::TIMESTAMP_QUERY;
        }
        features |= adapter.features() & Pipelines::FEATURE;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("mtad"),
            required_features: features,
            required_limits: adapter.limits().clone(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..wgpu::DeviceDescriptor::default()
        };
        let name = adapter.name().to_owned();
        let (device, queue) =
            pollster::block_on(adapter.raw.request_device(&descriptor)).map_err(|error| {
                Error::Device { device: name.clone(), what: format!("cannot be opened: {error}") }
            })?;
        let faults = Arc::new(Mutex::new(Faults::default()));
        let seen = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&seen).error.get_or_insert_with(|| error.to_string());
        }));
        let seen = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            let why = if message.is_empty() { format!("{reason:?}") } else { message };
            lock(&seen).lost.get_or_insert(why);
        });
        let entry = |binding, ty, dynamic, size| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: dynamic,
                min_binding_size: NonZeroU64::new(size),
            },
            count: None,
        };
        let pass_layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &[
                entry(0, wgpu::BufferBindingType::Uniform, true, PARAMS as u64),
                entry(1, wgpu::BufferBindingType::Storage { read_only: true }, false, 4),
            ],
        });
        Ok(Device {
            compiled: Pipelines::open(&device, adapter),
            limits: device.limits(),
            device,
            queue,
            name,
            subgroups,
            faults,
            pass_layout,
            layouts: Mutex::default(),
            pipelines: Mutex::default(),
            arenas: Mutex::default(),
            staging: Mutex::default(),
            next_id: AtomicU64::new(1),
            epoch: AtomicU64::new(0),
            last: Mutex::default(),
            speed: Mutex::new(Speed { rate: 1e11, pending: 0, begun: None }),
            times: Mutex::default(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives the device back to the system; whatever is asked of it from now on fails as if it
    /// had been unplugged.
    pub fn destroy(&self) {
        self.device.destroy();
        lock(&self.faults).lost.get_or_insert("it was destroyed".to_owned());
    }

    /// What the device reported since the last call.
    pub fn check(&self) -> Result<()> {
        let mut faults = lock(&self.faults);
        if let Some(reason) = &faults.lost {
            return Err(Error::DeviceLost { device: self.name.clone(), reason: reason.clone() });
        }
        match faults.error.take() {
            Some(what) => Err(Error::Device { device: self.name.clone(), what }),
            None => Ok(()),
        }
    }

    /// An error of the device that it did not report itself.
    pub fn fault(&self, what: impl Into<String>) -> Error {
        Error::Device { device: self.name.clone(), what: what.into() }
    }

    /// The most bytes that a shader can be given in one binding.
    pub fn binding_limit(&self) -> u64 {
        // Byte offsets are 32-bit numbers.
        let limits = &self.limits;
        limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(2 << 30)
    }

    /// The distance of the parameters of two dispatches.
    fn params_step(&self) -> usize {
        PARAMS.next_multiple_of(self.limits.min_uniform_buffer_offset_alignment as usize)
    }

    fn buffer(&self, bytes: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes.next_multiple_of(16).max(256),
            usage,
            mapped_at_creation: false,
        })
    }

    /// A buffer of zeros for shaders.
    ///
    /// # Errors
    /// It is larger than shaders can be given; there is no memory for it.
    pub fn storage(&self, bytes: u64) -> Result<Arc<Storage>> {
        use wgpu::BufferUsages as Usage;
        if bytes > self.binding_limit() {
            let limit = self.binding_limit();
            return Err(self.fault(format!("binds {limit} bytes at once, {bytes} are wanted")));
        }
        let raw = self.buffer(bytes, Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST);
        self.check()?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Storage { id, raw, groups: Mutex::default() }))
    }

    /// Replaces a buffer by a larger one, unless there is one of so many bytes already.
    pub fn grow(&self, place: &mut Option<Arc<Storage>>, bytes: u64) -> Result<Arc<Storage>> {
        if let Some(storage) = place
            && storage.raw.size() >= bytes
        {
            return Ok(storage.clone());
        }
        let new = self.storage(bytes)?;
        if place.is_some() {
            self.replaced();
        }
        Ok(place.insert(new).clone())
    }

    /// Tells that a buffer was replaced by another.
    pub fn replaced(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Copies the first bytes of some buffers to others, before what is submitted next.
    pub fn copy(&self, copies: &[(&Storage, &Storage, u64)]) -> Result<()> {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        for (from, to, bytes) in copies {
            encoder.copy_buffer_to_buffer(&from.raw, 0, &to.raw, 0, *bytes);
        }
        self.queue.submit([encoder.finish()]);
        self.check()
    }

    /// Whole words into a buffer, from a byte on. Many at a time take as much memory again until they are
    /// there: no more than [`UPLOAD`] at a time, and those are waited for.
    pub fn upload(&self, storage: &Storage, at: u64, bytes: &[u8]) -> Result<()> {
        self.check()?;
        self.write_bytes(storage, at, bytes);
        let index = self.queue.submit([]);
        if bytes.len() > UPLOAD / 2 {
            self.wait(Some(index))?;
        }
        self.check()
    }

    /// Floats into a buffer, before what is submitted next.
    pub fn write(&self, storage: &Storage, offset: u64, floats: &[f32]) {
        self.write_bytes(storage, offset, bytemuck::cast_slice(floats));
    }

    /// Whole words into a buffer, before what is submitted next.
    pub fn write_bytes(&self, storage: &Storage, offset: u64, bytes: &[u8]) {
        self.queue.write_buffer(&storage.raw, offset, bytes);
    }

    fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let poll = wgpu::PollType::Wait { submission_index, timeout: None };
        let waited = self.device.poll(poll);
        self.check()?;
        waited.map(drop).map_err(|error| self.fault(error.to_string()))
    }

    fn layout(&self, access: &'static [Access]) -> (wgpu::BindGroupLayout, wgpu::PipelineLayout) {
        let mut layouts = lock(&self.layouts);
        let layout = layouts.entry(access).or_insert_with(|| {
            let entry = |(binding, access): (usize, &Access)| wgpu::BindGroupLayoutEntry {
                binding: binding as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: *access == Access::Read },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            };
            let entries: Vec<_> = access.iter().enumerate().map(entry).collect();
            let group = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: None,
                entries: &entries,
            });
            let pipeline = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&group), Some(&self.pass_layout)],
                immediate_size: 0,
            });
            (group, pipeline)
        });
        layout.clone()
    }

    /// The compiled kernel; the first time it is asked for it is compiled.
    fn pipeline(&self, kernel: Kernel) -> Arc<wgpu::ComputePipeline> {
        if let Some(pipeline) = lock(&self.pipelines).get(&kernel) {
            return pipeline.clone();
        }
        let source = wgpu::ShaderSource::Wgsl(kernel.source(self.subgroups).into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(&kernel.name()), source };
        // SAFETY: without the checks a shader must not read or write outside its buffers, and its
        // loops must end. Every index is below what the parameters say, which are computed here
        // from the sizes of the buffers: rows and columns of the tensors that were uploaded whole
        // (each row filled up to whole groups of words), rows of activations below the capacity of
        // their buffers, slots below the cache's, tokens and positions below the rows of their tables. Every loop
        // counts up to a parameter or constant.
        let module = unsafe {
            self.device
                .create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        };
        let (_, layout) = self.layout(kernel.access());
        let pipeline =
            Arc::new(self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&kernel.name()),
                layout: Some(&layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Workgroup memory is written before it is read.
                    zero_initialize_workgroup_memory: false,
                    ..wgpu::PipelineCompilationOptions::default()
                },
                cache: self.compiled.cache(),
            }));
        lock(&self.pipelines).insert(kernel, pipeline.clone());
        pipeline
    }

    /// The buffers, as a shader is given them. Kept with the last of them.
    fn group(&self, access: &'static [Access], buffers: &[&Arc<Storage>]) -> wgpu::BindGroup {
        assert_eq!(access.len(), buffers.len());
        let (home, others) = buffers.split_last().expect("a shader has buffers");
        let mut ids = [0; 7];
        ids.iter_mut().zip(others).for_each(|(id, buffer)| *id = buffer.id);
        let mut groups = lock(&home.groups);
        let epoch = self.epoch.load(Ordering::Relaxed);
        if groups.epoch != epoch {
            *groups = Groups { epoch, made: HashMap::new() };
        }
        let group = groups.made.entry((access, ids)).or_insert_with(|| {
            let entries: Vec<_> = (0..)
                .zip(buffers)
                .map(|(binding, buffer)| wgpu::BindGroupEntry {
                    binding,
                    resource: buffer.raw.as_entire_binding(),
                })
                .collect();
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &self.layout(access).0,
                entries: &entries,
            })
        });
        group.clone()
    }

    /// The buffers of a pass, empty.
    fn arena(&self) -> Arena {
        lock(&self.arenas).pop().unwrap_or_else(|| {
            let (params, data, group) = self.arena_buffers(16 << 10, 16 << 10);
            Arena { params, data, group, work: Work::default() }
        })
    }

    fn arena_buffers(
        &self,
        params: u64,
        data: u64,
    ) -> (wgpu::Buffer, wgpu::Buffer, wgpu::BindGroup) {
        use wgpu::BufferUsages as Usage;
        let params = self.buffer(params, Usage::UNIFORM | Usage::COPY_DST);
        let data = self.buffer(data, Usage::STORAGE | Usage::COPY_DST);
        let binding = wgpu::BufferBinding {
            buffer: &params,
            offset: 0,
            size: NonZeroU64::new(PARAMS as u64),
        };
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.pass_layout,
            entries: &[
                wgpu::BindGroupEntry {
                    binding: 0,
                    resource: wgpu::BindingResource::Buffer(binding),
                },
                wgpu::BindGroupEntry { binding: 1, resource: data.as_entire_binding() },
            ],
        });
        (params, data, group)
    }

    /// Hands the work of a pass to the device, and does not wait for it.
    fn submit(&self, arena: &mut Arena) -> Result<()> {
        if lock(&self.times).is_some() {
            self.write_words(arena);
            return self.submit_timed(arena);
        }
        self.hand_over(arena)
    }

    /// Hands over what a pass has recorded so far, if that is enough: the device begins while the rest is still
    /// being recorded. First a little, so that it begins soon, then more and more, since each submission
    /// has its price.
    fn submit_early(&self, arena: &mut Arena) -> Result<()> {
        let pending = arena.work.dispatches.len() - arena.work.submitted;
        if pending < FIRST_PIECE.max(arena.work.submitted) || lock(&self.times).is_some() {
            return Ok(());
        }
        self.hand_over(arena)
    }

    /// Writes the words of a pass that are not on the device yet.
    fn write_words(&self, arena: &mut Arena) {
        let work = &mut arena.work;
        let mut first_param = work.submitted * self.params_step();
        let (params, data) = (work.params.len() as u64, 4 * work.data.len() as u64);
        if params > arena.params.size() || data > arena.data.size() {
            let larger = |bytes: u64, now: u64| bytes.max(now).next_power_of_two();
            (arena.params, arena.data, arena.group) = self.arena_buffers(
                larger(params, arena.params.size()),
                larger(data, arena.data.size()),
            );
            (first_param, work.written) = (0, 0);
        }
        let words: &[u8] = bytemuck::cast_slice(&work.data[work.written..]);
        self.queue.write_buffer(&arena.params, first_param as u64, &work.params[first_param..]);
        self.queue.write_buffer(&arena.data, 4 * work.written as u64, words);
        work.written = work.data.len();
    }

    /// Hands over what is recorded. Work that would take long becomes several submissions.
    fn hand_over(&self, arena: &mut Arena) -> Result<()> {
        self.write_words(arena);
        let budget = (lock(&self.speed).rate * SUBMISSION_SECONDS) as u64;
        let mut first = arena.work.submitted;
        while first < arena.work.dispatches.len() {
            let mut cost = 0;
            let mut encoder = self.device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            while first < arena.work.dispatches.len() && cost <= budget {
                self.encode(&mut pass, arena, first);
                cost += arena.work.dispatches[first].cost;
                first += 1;
            }
            drop(pass);
            self.submit_piece(encoder, cost)?;
        }
        arena.work.submitted = first;
        self.check()
    }

    fn encode(&self, pass: &mut wgpu::ComputePass<'_>, arena: &Arena, i: usize) {
        let op = &arena.work.dispatches[i];
        let [x, y, z] = op.groups;
        pass.set_pipeline(&op.pipeline);
        pass.set_bind_group(0, &op.group, &[]);
        pass.set_bind_group(1, &arena.group, &[(i * self.params_step()) as u32]);
        pass.dispatch_workgroups(x, y, z);
    }

    /// Submits and, where there is much to do, waits for what was submitted before: the device always has
    /// something to do, and never more than two long pieces.
    fn submit_piece(&self, encoder: wgpu::CommandEncoder, cost: u64) -> Result<()> {
        let index = self.queue.submit([encoder.finish()]);
        let mut speed = lock(&self.speed);
        speed.begun.get_or_insert_with(Instant::now);
        speed.pending += cost;
        let is_short = (speed.pending as f64) < speed.rate * SUBMISSION_SECONDS;
        drop(speed);
        match lock(&self.last).replace(index) {
            Some(before) if !is_short => self.wait(Some(before)),
            _ => Ok(()),
        }
    }

    /// Takes down how fast the device was, when it has nothing left to do.
    fn rest(&self) {
        let mut speed = lock(&self.speed);
        let pending = std::mem::take(&mut speed.pending);
        if let Some(begun) = speed.begun.take() {
            let seconds = begun.elapsed().as_secs_f64();
            // Short work tells more of its overhead than of the device.
            if seconds > 0.01 {
                let rate = (pending as f64 / seconds).clamp(1e8, 1e14);
                speed.rate = 0.5 * speed.rate + 0.5 * rate;
            }
        }
    }

    /// Waits for the device and takes the first `floats` of a buffer.
    pub fn read(&self, storage: &Storage, floats: usize, into: &mut Vec<f32>) -> Result<()> {
        let show = |bytes: &[u8]| into.extend_from_slice(bytemuck::cast_slice(bytes));
        self.read_bytes(storage, 0, 4 * floats as u64, show)
    }

    /// Waits for the device and shows some whole words of a buffer.
    pub fn read_bytes(
        &self,
        storage: &Storage,
        offset: u64,
        bytes: u64,
        show: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let mut staging = lock(&self.staging);
        let at = staging.iter().position(|buffer| buffer.size() >= bytes);
        let found = at.map(|at| staging.swap_remove(at));
        drop(staging);
        let staging = found.unwrap_or_else(|| {
            let size = bytes.next_power_of_two().min(self.limits.max_buffer_size).max(bytes);
            self.buffer(size, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&storage.raw, offset, &staging, 0, bytes);
        self.queue.submit([encoder.finish()]);
        self.take(&staging, bytes, show)?;
        self.rest();
        let mut pool = lock(&self.staging);
        if pool.len() < 4 {
            pool.push(staging);
        }
        Ok(())
    }

    /// Waits for everything that was submitted, and shows what a mapped buffer then holds.
    fn take(&self, staging: &wgpu::Buffer, bytes: u64, show: impl FnOnce(&[u8])) -> Result<()> {
        let (tell, told) = mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, ..bytes, move |result| {
            // (Who asked may have given up.)
            let _ = tell.send(result);
        });
        self.wait(None)?;
        lock(&self.last).take();
        // Another thread that waits at the same time may be the one that is to tell.
        let mapped = told.recv_timeout(MAPPING).map_err(|error| error.to_string());
        match mapped.map(|mapped| mapped.map_err(|error| error.to_string())) {
            Ok(Ok(())) => {}
            Ok(Err(what)) | Err(what) => {
                return Err(self.fault(format!("cannot be read back: {what}")));
            }
        }
        let view = staging.get_mapped_range(..bytes).map_err(|e| self.fault(e.to_string()))?;
        show(&view);
        drop(view);
        staging.unmap();
        Ok(())
    }

    /// Waits until everything that was submitted is done.
    pub fn finish(&self) -> Result<()> {
        self.wait(None)
    }

    /// Has kernels timed from now on; the next call of [`Device::times`] ends it.
    pub fn time_kernels(&self) -> bool {
        let can = self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        *lock(&self.times) = can.then(HashMap::new);
        can
    }

    /// Seconds and calls by kernel since [`Device::time_kernels`], the longest first.
    pub fn times(&self) -> KernelTimes {
        let times = lock(&self.times).take().unwrap_or_default();
        let mut times: KernelTimes =
            times.into_iter().map(|(name, (s, calls))| (name, s, calls)).collect();
        times.sort_by(|a, b| b.1.total_cmp(&a.1));
        times
    }

    /// As [`Device::submit`], each dispatch in a pass of its own with its times.
    fn submit_timed(&self, arena: &Arena) -> Result<()> {
        let work = &arena.work;
        // Queries of one set are limited in number.
        for (set, ops) in work.dispatches.chunks(1024).enumerate() {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            let count = 2 * ops.len() as u32;
            let queries = self.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count,
            });
            for i in 0..ops.len() {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: None,
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &queries,
                        beginning_of_pass_write_index: Some(2 * i as u32),
                        end_of_pass_write_index: Some(2 * i as u32 + 1),
                    }),
                });
                self.encode(&mut pass, arena, set * 1024 + i);
            }
            use wgpu::BufferUsages as Usage;
            let bytes = 8 * u64::from(count);
            let resolved = self.buffer(bytes, Usage::QUERY_RESOLVE | Usage::COPY_SRC);
            let staging = self.buffer(bytes, Usage::MAP_READ | Usage::COPY_DST);
            encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, bytes);
            self.queue.submit([encoder.finish()]);
            let period = 1e-9 * f64::from(self.queue.get_timestamp_period());
            self.take(&staging, bytes, |view| {
                let mut times = lock(&self.times);
                let Some(times) = &mut *times else { return };
                let ticks: &[u64] = bytemuck::cast_slice(view);
                for (op, ticks) in ops.iter().zip(ticks.chunks_exact(2)) {
                    let entry = times.entry(op.name()).or_default();
                    entry.0 += ticks[1].saturating_sub(ticks[0]) as f64 * period;
                    entry.1 += 1;
                }
            })?;
        }
        self.check()
    }
}
