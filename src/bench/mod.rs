//! Measuring a model on a device: milliseconds per pass of n rows against the machine's limits.
//!
//! Decoding reads every weight once per pass, so a pass over n rows takes at least
//! max(weight bytes / read bandwidth, n x MACs / rate of byte products). Machines share their memory
//! with others and change their clock, so both limits are measured in the same rounds as the
//! passes, and what is reported are medians with their spread.

mod synthetic;

use std::time::Instant;

pub use synthetic::Synthetic;

use crate::engine::{Cpu, Readable};
use crate::engine::{Device, Model, SessionOptions};
use crate::engine::{Gpu, KernelTimes};
use crate::error::{Error, Result};
use crate::lm::{Batch, Lm, MAX_TREE, Row, Token, Want, extend};

/// Rows in the cache while passes are timed.
const CACHED: usize = 128;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rows of the passes to time.
    pub passes: Vec<usize>,
    /// Lengths of the prompts to time.
    pub prompts: Vec<usize>,
    /// Tokens to generate one at a time; 0 for none.
    pub generate: usize,
    /// Rounds: each times every pass once.
    pub rounds: usize,
    /// Whether to time the kernels of each pass, too, on devices that can.
    pub kernels: bool,
}

/// Median and extremes of some seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Spread { median: values[values.len() / 2], min: values[0], max: values[values.len() - 1] }
    }
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Report {
    /// Where it ran.
    pub device: String,
    /// Which kernels ran.
    pub kernels: String,
    /// Bandwidth in bytes per second, over as much memory as a pass reads: of reading on a CPU, of
    /// copying (bytes read and bytes written) on a GPU.
    pub bandwidth: Spread,
    /// Byte products per second in registers, where they can be measured.
    pub byte_products: Option<Spread>,
    /// Bytes of weights that a pass reads.
    pub weight_bytes: usize,
    /// Multiplications with weights for each row.
    pub macs: usize,
    /// Seconds of a pass, by its rows.
    pub passes: Vec<(usize, Spread)>,
    /// Tokens per second of prompts, by their length.
    pub prompts: Vec<(usize, f64)>,
    /// Seconds per token, generating one at a time.
    pub generate: Option<f64>,
    /// For passes by their rows: each kernel's seconds on the device, and its calls.
    pub kernel_times: Vec<(usize, KernelTimes)>,
}

impl Report {
    /// The least that a pass of `rows` rows can take, in seconds.
    pub fn roofline(&self, rows: usize) -> f64 {
        let read = self.weight_bytes as f64 / self.bandwidth.median;
        let products = self.byte_products.map_or(0.0, |s| (rows * self.macs) as f64 / s.median);
        read.max(products)
    }

    /// Seconds of a pass of one row, if it was measured.
    pub fn one_row(&self) -> Option<f64> {
        self.passes.iter().find(|(rows, _)| *rows == 1).map(|(_, spread)| spread.median)
    }
}

/// Tokens to feed: which ones does not matter.
fn tokens(count: usize, vocab_size: usize) -> Vec<Token> {
    (0..count).map(|i| (3 + i * 7919) % vocab_size).map(|t| t as Token).collect()
}

/// Seconds of one pass of `rows` rows, with logits for every row, on the line as it is.
fn time_pass(lm: &mut dyn Lm, rows: usize) -> Result<f64> {
    let mut batch = Batch::new();
    for (i, token) in tokens(rows, lm.vocab_size()).into_iter().enumerate() {
        batch.push(token, i.checked_sub(1).map(|p| Row(p as u32)), Want::Logits);
    }
    let start = Instant::now();
    lm.eval(&batch)?;
    let seconds = start.elapsed().as_secs_f64();
    lm.commit(None)?;
    Ok(seconds)
}

/// What limits a pass, and how it is measured.
enum Limits<'a> {
    Cpu(&'a Cpu, Readable),
    Gpu(&'a Gpu, usize),
}

impl<'a> Limits<'a> {
    fn of(device: &'a Device, bytes: usize) -> Self {
        match device {
            Device::Cpu(cpu) => Limits::Cpu(cpu, Readable::new(bytes.clamp(1 << 20, 2 << 30))),
            Device::Gpu(on_gpu) => Limits::Gpu(&on_gpu.gpu, bytes.clamp(1 << 20, 512 << 20)),
        }
    }

    fn kernels(&self) -> String {
        match self {
            Limits::Cpu(cpu, _) => cpu.isa().name().to_owned(),
            Limits::Gpu(gpu, _) => gpu.kernels(),
        }
    }

    fn bandwidth(&self) -> Result<f64> {
        match self {
            Limits::Cpu(cpu, memory) => Ok(cpu.read_bandwidth(memory)),
            Limits::Gpu(gpu, bytes) => gpu.read_bandwidth(*bytes),
        }
    }

    fn byte_products(&self) -> Option<f64> {
        match self {
            Limits::Cpu(cpu, _) => Some(cpu.byte_products()),
            Limits::Gpu(..) => None,
        }
    }
}

/// Told how a measurement goes.
pub trait Observer {
    /// Steps done, and steps in all. Returning false stops.
    fn step(&mut self, done: usize, steps: usize) -> bool;

    /// Tokens are about to be generated one at a time (`true`), or have been (`false`): for
    /// energy meters.
    fn generating(&mut self, _begins: bool) {}
}

/// Measures.
///
/// # Errors
/// The plan asks for more rows than fit; what the model reports; [`Error::Cancelled`].
pub fn measure(model: &Model, plan: &Plan, observer: &mut dyn Observer) -> Result<Report> {
    if let Some(rows) = plan.passes.iter().find(|&&rows| rows == 0 || rows > MAX_TREE) {
        return Err(Error::invalid(format!("a pass has 1 to {MAX_TREE} rows, not {rows}")));
    }
    let shape = model.shape();
    let longest = plan.prompts.iter().copied().max().unwrap_or(0);
    let needed = (CACHED + MAX_TREE).max(longest).max(CACHED + plan.generate);
    let options = SessionOptions { context: Some(needed), ..SessionOptions::default() };
    let mut lm = model.session(&options)?;
    let steps = plan.rounds + plan.prompts.len() + usize::from(plan.generate > 0);
    let mut done = 0;
    let mut step = |observer: &mut dyn Observer| {
        done += 1;
        if observer.step(done, steps) { Ok(()) } else { Err(Error::Cancelled) }
    };

    let limits = Limits::of(model.device(), shape.weight_bytes);
    extend(&mut *lm, &tokens(CACHED, shape.vocab_size))?;
    let mut bandwidth = Vec::new();
    let mut byte_products = Vec::new();
    let mut seconds = vec![Vec::new(); plan.passes.len()];
    // Shaders are compiled when they are first used, and caches grow.
    for rows in &plan.passes {
        time_pass(&mut *lm, *rows)?;
    }
    for _ in 0..plan.rounds.max(1) {
        bandwidth.push(limits.bandwidth()?);
        byte_products.extend(limits.byte_products());
        // What that left behind, in clocks and in freed memory, is not the first pass's to pay.
        if let Some(rows) = plan.passes.first() {
            time_pass(&mut *lm, *rows)?;
        }
        for (rows, seconds) in plan.passes.iter().zip(&mut seconds) {
            seconds.push(time_pass(&mut *lm, *rows)?);
        }
        step(observer)?;
    }
    let mut kernel_times = Vec::new();
    if let (Limits::Gpu(gpu, _), true) = (&limits, plan.kernels) {
        for &rows in &plan.passes {
            if !gpu.time_kernels() {
                return Err(Error::invalid(format!(
                    "{} cannot time its kernels: it has no timestamps",
                    model.describe()
                )));
            }
            time_pass(&mut *lm, rows)?;
            kernel_times.push((rows, gpu.kernel_times()));
        }
    }
    let kernels = limits.kernels();
    drop(limits);

    let mut generate = None;
    if plan.generate > 0 {
        let tokens = tokens(plan.generate, shape.vocab_size);
        observer.generating(true);
        let start = Instant::now();
        for token in tokens {
            lm.eval(&Batch::chain(&[token], None, Row(0), Want::Logits))?;
            lm.commit(Some(Row(0)))?;
        }
        generate = Some(start.elapsed().as_secs_f64() / plan.generate as f64);
        observer.generating(false);
        step(observer)?;
    }
    let mut prompts = Vec::new();
    for &len in &plan.prompts {
        lm.truncate(0)?;
        let tokens = tokens(len, shape.vocab_size);
        // (The logits that follow it are a part of reading a prompt; devices need not be done before.)
        let (before, last) = tokens.split_at(len.saturating_sub(1) / MAX_TREE * MAX_TREE);
        let start = Instant::now();
        extend(&mut *lm, before)?;
        lm.eval(&Batch::chain(last, None, Row(0), Want::Logits))?;
        prompts.push((len, len as f64 / start.elapsed().as_secs_f64()));
        step(observer)?;
    }
    Ok(Report {
        device: model.describe(),
        kernels,
        bandwidth: Spread::of(bandwidth),
        byte_products: (!byte_products.is_empty()).then(|| Spread::of(byte_products)),
        weight_bytes: shape.weight_bytes,
        macs: shape.macs,
        passes: plan.passes.iter().copied().zip(seconds.into_iter().map(Spread::of)).collect(),
        prompts,
        generate,
        kernel_times,
    })
}
