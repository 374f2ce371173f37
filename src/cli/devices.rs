//! `mtad devices`: where models can run, and what can measure energy.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value as Json;

use super::metering::{info_json, sources, unavailable_json};
use super::print_line;
use crate::energy::{Discovery, Found};
use crate::engine::Device;
use crate::engine::Executor;
use crate::engine::{Adapter, Gpu};
use crate::engine::{Cpu, Isa};
use crate::error::Result;

/// Show the devices that models can run on
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Show energy meters, too: those that can be read, those that cannot and why
    #[arg(long)]
    meters: bool,

    /// Print one line of JSON
    #[arg(long)]
    json: bool,

    /// Look for meters below this directory instead of / (for tests)
    #[arg(long, value_name = "DIR", hide = true)]
    meter_root: Option<PathBuf>,
}

pub(super) fn devices(args: &DevicesArgs) -> Result<()> {
    let meters = args.meters.then(|| sources(args.meter_root.as_ref()).find());
    if args.json {
        let mut out = Device::all_as_json()?;
        if let Some(meters) = &meters {
            out["meters"] = meters_json(meters);
        }
        return print_line(out);
    }
    let cpu = Cpu::with_isa(0, Isa::from_env()?.unwrap_or(Isa::best()))?;
    let sets: Vec<&str> =
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect();
    print_line(format_args!("cpu  {}", cpu.describe()))?;
    print_line(format_args!(
        "     instruction sets: {} (runs {}; MTAD_CPU=NAME chooses another)",
        sets.join(", "),
        cpu.isa()
    ))?;
    print_line(format_args!("     threads: {} (--threads N chooses)", cpu.threads()))?;
    for (i, adapter) in Adapter::all().iter().enumerate() {
        print_adapter(i, adapter)?;
    }
    let (auto, why) = Device::auto_choice();
    print_line(format_args!("auto runs on {auto}: {why} (--device NAME chooses another)"))?;
    meters.as_ref().map_or(Ok(()), print_meters)
}

/// What of a GPU is used, or why it cannot be.
fn opened(adapter: &Adapter) -> Result<String> {
    Gpu::open(adapter).map(|gpu| gpu.kernels())
}

fn print_adapter(i: usize, adapter: &Adapter) -> Result<()> {
    const MIB: u64 = 1 << 20;
    print_line(format_args!("gpu:{i}  {}", adapter.name()))?;
    print_line(format_args!(
        "     {} through {}, driver {}",
        adapter.kind(),
        adapter.interface(),
        adapter.driver()
    ))?;
    print_line(format_args!(
        "     limits: {} MiB a binding, {} MiB a buffer, {} KiB workgroup memory; memory {}",
        adapter.binding_limit() / MIB,
        adapter.buffer_limit() / MIB,
        adapter.workgroup_memory() / 1024,
        adapter.memory().map_or("not told".to_owned(), |bytes| format!("{} MiB", bytes / MIB))
    ))?;
    let yes_no = |has: bool| if has { "yes" } else { "no" };
    let subgroups = match adapter.subgroups() {
        None => "no".to_owned(),
        Some((least, most)) if least == most => format!("of {least}"),
        Some((least, most)) => format!("of {least} to {most}"),
    };
    print_line(format_args!(
        "     has: subgroups {subgroups}, f16 {} (used if MTAD_GPU says `f16`), packed dot product by the driver or \
         emulated, timestamps {}",
        yes_no(adapter.has_f16()),
        yes_no(adapter.has_timestamps())
    ))?;
    match opened(adapter) {
        Ok(kernels) => {
            print_line(format_args!("     runs: {kernels} (MTAD_GPU=WORDS chooses others)"))?;
        }
        Err(error) => print_line(format_args!("     cannot be opened: {error}"))?,
    }
    if adapter.is_software() {
        print_line("     is software: runs only if it is named")?;
    }
    Ok(())
}

fn meters_json(all: &Discovery) -> Json {
    let found = all.meters.iter().map(|found| match found {
        Found::Meter(meter) => info_json(meter.info()),
        Found::Unavailable { name, why } => unavailable_json(name, why),
    });
    let absent = all.absent.iter().map(|(family, why)| unavailable_json(family.name(), why));
    found.chain(absent).collect()
}

fn print_meters(all: &Discovery) -> Result<()> {
    print_line("\nenergy meters")?;
    for found in &all.meters {
        match found {
            Found::Meter(meter) => {
                let info = meter.info();
                print_line(format_args!("  {}: {}", info.name, info.covers))?;
                print_line(format_args!("    {} from {}", info.kind.name(), info.source))?;
            }
            Found::Unavailable { name, why } => print_line(format_args!("  {name}: {why}"))?,
        }
    }
    for (family, why) in &all.absent {
        print_line(format_args!("  {}: {why}", family.name()))?;
    }
    print_line("  cmd:COMMAND, file:PATH: a meter of your own; docs/energy.md says how")
}
