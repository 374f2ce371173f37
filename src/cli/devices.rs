//! `mtad devices`: where models can run, and what can measure energy.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value as Json, json};

use super::metering::{info_json, sources, unavailable_json};
use super::print_line;
use crate::backend::Backend;
use crate::backend::cpu::{Cpu, Isa};
use crate::energy::{Discovery, Found};
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
    let cpu = Cpu::new(0)?;
    let sets: Vec<&str> =
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect();
    let meters = args.meters.then(|| sources(args.meter_root.as_ref()).find());
    if args.json {
        let mut out = json!({"devices": [{
            "name": "cpu",
            "description": cpu.describe(),
            "instruction_set": cpu.isa().name(),
            "instruction_sets": sets,
            "threads": cpu.threads(),
        }]});
        if let Some(meters) = &meters {
            out["meters"] = meters_json(meters);
        }
        return print_line(out);
    }
    print_line(format_args!("cpu  {}", cpu.describe()))?;
    print_line(format_args!(
        "     instruction sets: {} (runs {}; MTAD_CPU=NAME chooses another)",
        sets.join(", "),
        cpu.isa()
    ))?;
    print_line(format_args!("     threads: {} (--threads N chooses)", cpu.threads()))?;
    meters.as_ref().map_or(Ok(()), print_meters)
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
