//! `mtad bench`: how fast a model runs here, and how near that is to what the machine can do.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;
use tempfile::NamedTempFile;

use super::console::tell;
use super::metering::{MeterArgs, Metering, Work};
use super::{DeviceArgs, interrupts, load_model, open_model_as, print_line, progress_bar};
use crate::bench::{Observer, Plan, Report, Synthetic, measure};
use crate::energy::Window;
use crate::error::{Error, Result};

/// Time passes over a model, and compare them with what the machine can do at most
///
/// A pass over n rows takes at least max(weight bytes / read bandwidth, n x MACs / rate of byte
/// products). Both limits are measured in the same rounds. Passes run over a cache of 128 rows,
/// with logits for every row. On a GPU the limit is the bandwidth of a shader that only reads.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A GGUF file [default: the built-in target]
    #[arg(long, short, value_name = "GGUF", conflicts_with = "synthetic")]
    model: Option<PathBuf>,

    /// A model of random weights: 68m, 160m, 1.1b, 3b, 7b or 13b, and a weight type
    #[arg(long, value_name = "SHAPE:TYPE")]
    synthetic: Option<Synthetic>,

    /// Keep the synthetic model as a GGUF file
    #[arg(long, value_name = "FILE", requires = "synthetic")]
    keep: Option<PathBuf>,

    /// Rows of the passes to time
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1,2,4,8,16,32,64")]
    passes: Vec<usize>,

    /// Lengths of the prompts to time; 0 for none
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "128,512")]
    prompt: Vec<usize>,

    /// Tokens to generate one at a time; 0 for none
    #[arg(long, value_name = "N", default_value_t = 64)]
    generate: usize,

    /// How often each pass is timed
    #[arg(long, value_name = "N", default_value_t = 9)]
    rounds: usize,

    /// On a GPU, show what each kernel of a pass takes, too
    #[arg(long)]
    kernels: bool,

    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    meters: MeterArgs,
}

/// Moves the progress bar, and takes down when tokens are generated.
struct Watch {
    bar: ProgressBar,
    metering: Metering,
    begun: Option<Instant>,
    window: Option<Window>,
}

impl Observer for Watch {
    fn step(&mut self, done: usize, steps: usize) -> bool {
        self.bar.set_length(steps as u64);
        self.bar.set_position(done as u64);
        !interrupts::asked()
    }

    fn generating(&mut self, begins: bool) {
        if begins {
            self.begun = Some(self.metering.begin());
        } else {
            self.window = self.begun.map(|begun| self.metering.end(begun));
        }
    }
}

pub(super) fn bench(args: &BenchArgs) -> Result<()> {
    let options = args.device.load_options()?;
    let device = options.device()?;
    // A synthetic model lives in a file that is gone with the process, unless it is kept.
    let mut scratch = None;
    let file = match (&args.synthetic, &args.keep) {
        (Some(synthetic), Some(path)) => {
            tell!("writing random weights to {}", path.display());
            synthetic.write(path)?;
            options.open(path)?
        }
        (Some(synthetic), None) => {
            let file = scratch.insert(write_scratch(synthetic)?);
            interrupts::remove_at_end(file.path());
            options.open(file.path())?
        }
        (None, _) => {
            let path = args.model.as_deref().unwrap_or("builtin:target".as_ref());
            open_model_as(path, &options)?
        }
    };
    let name = file.get_str("general.name").ok().flatten().unwrap_or(file.name()).to_owned();
    let model = load_model(Arc::new(file), &device, &options)?;
    // The map keeps the file; where systems allow it, it is gone even if the process is killed.
    #[cfg(unix)]
    drop(scratch);
    if args.meters.is_wanted() && args.generate == 0 {
        return Err(Error::invalid("--energy measures generating; --generate must not be 0"));
    }
    let plan = Plan {
        passes: args.passes.clone(),
        prompts: args.prompt.iter().copied().filter(|&n| n > 0).collect(),
        generate: args.generate,
        rounds: args.rounds,
        kernels: args.kernels,
    };
    let bar = progress_bar("timing {bar:40} {pos}/{len} {eta}");
    let metering = args.meters.start(None)?;
    let mut watch = Watch { bar, metering, begun: None, window: None };
    let report = measure(&model, &plan, &mut watch)?;
    watch.bar.finish_and_clear();
    // The energy of generating one token at a time: what a target alone takes.
    let work = Work {
        windows: watch.window.into_iter().collect(),
        tokens: args.generate,
        generating: report.generate.unwrap_or(0.0) * args.generate as f64,
        ..Work::default()
    };
    let measured = watch.metering.finish();
    if args.json {
        let mut json = to_json(&report);
        if let Some(measured) = &measured {
            json["energy"] = measured.json(&work);
        }
        print_line(json)?;
    } else {
        print(&name, &report)?;
    }
    match measured {
        Some(measured) => {
            measured.print(&work);
            measured.judge([&work])
        }
        None => Ok(()),
    }
}

/// Writes a model to the temporary folder, under a name that nobody can have put a link at, to be
/// removed when it is no longer needed.
fn write_scratch(synthetic: &Synthetic) -> Result<NamedTempFile> {
    let folder = std::env::temp_dir();
    let file = tempfile::Builder::new().prefix("mtad-bench-").suffix(".gguf").tempfile_in(&folder);
    let mut file = file.map_err(|e| Error::io(folder.display().to_string(), e))?;
    let name = file.path().display().to_string();
    tell!("writing random weights to {name}");
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    let written = synthetic.write_to(&mut out).and_then(|()| out.flush());
    drop(out);
    written.map(|()| file).map_err(|e| Error::io(name, e))
}

const GIGA: f64 = 1e9;

fn to_json(r: &Report) -> serde_json::Value {
    let one = r.one_row();
    let passes: Vec<_> = r
        .passes
        .iter()
        .map(|(rows, s)| {
            json!({
                "rows": rows,
                "ms_median": 1e3 * s.median,
                "ms_min": 1e3 * s.min,
                "ms_max": 1e3 * s.max,
                "ratio": one.map(|one| s.median / one),
                "roofline_ms": 1e3 * r.roofline(*rows),
            })
        })
        .collect();
    let prompt: Vec<_> =
        r.prompts.iter().map(|(n, s)| json!({"tokens": n, "tokens_per_second": s})).collect();
    let generate = r.generate.map(|seconds| {
        let rate = r.weight_bytes as f64 / seconds;
        json!({
            "tokens_per_second": 1.0 / seconds,
            "gb_s": rate / GIGA,
            "bandwidth_share": rate / r.bandwidth.median,
        })
    });
    json!({
        "device": r.device,
        "kernels": r.kernels,
        "bandwidth_gb_s": r.bandwidth.median / GIGA,
        "int8_gmac_s": r.byte_products.map(|s| s.median / GIGA),
        "weights_bytes_per_pass": r.weight_bytes,
        "macs_per_row": r.macs,
        "passes": passes,
        "prompt": prompt,
        "generate": generate,
        "kernel_times": r.kernel_times.iter().map(|(rows, times)| json!({
            "rows": rows,
            "kernels": times.iter().map(|(name, seconds, calls)| {
                json!({"kernel": name, "ms": 1e3 * seconds, "calls": calls})
            }).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
    })
}

fn print(name: &str, r: &Report) -> Result<()> {
    let spread = |s: &crate::bench::Spread| {
        format!("{:.1} ({:.1} to {:.1})", s.median / GIGA, s.min / GIGA, s.max / GIGA)
    };
    print_line(format_args!("model      {name}"))?;
    print_line(format_args!("device     {}", r.device))?;
    print_line(format_args!("bandwidth  {} GB/s", spread(&r.bandwidth)))?;
    if let Some(rate) = &r.byte_products {
        print_line(format_args!("int8       {} GMAC/s in registers", spread(rate)))?;
    }
    let (mb, mmac) = (r.weight_bytes as f64 / 1e6, r.macs as f64 / 1e6);
    print_line(format_args!("a pass     reads {mb:.1} MB of weights; a row is {mmac:.1} MMAC"))?;
    print_line("\n  rows   ms median      min      max  t(n)/t(1)  roofline  of it   GMAC/s")?;
    for (rows, s) in &r.passes {
        let ratio = r.one_row().map_or("-".to_owned(), |one| format!("{:.2}", s.median / one));
        let limit = r.roofline(*rows);
        print_line(format_args!(
            "{rows:>6} {:>11.3} {:>8.3} {:>8.3} {ratio:>10} {:>9.3} {:>5.0}% {:>8.1}",
            1e3 * s.median,
            1e3 * s.min,
            1e3 * s.max,
            1e3 * limit,
            100.0 * limit / s.median,
            (rows * r.macs) as f64 / s.median / GIGA,
        ))?;
    }
    print_line("")?;
    if let Some(seconds) = r.generate {
        let rate = r.weight_bytes as f64 / seconds;
        print_line(format_args!(
            "generate   {:.1} tokens/s, {:.1} GB/s of weights: {:.0}% of the bandwidth",
            1.0 / seconds,
            rate / GIGA,
            100.0 * rate / r.bandwidth.median
        ))?;
    }
    for (tokens, rate) in &r.prompts {
        print_line(format_args!("prompt     {rate:.1} tokens/s at {tokens} tokens"))?;
    }
    for (rows, times) in &r.kernel_times {
        let total: f64 = times.iter().map(|(_, seconds, _)| seconds).sum();
        print_line(format_args!("\nkernels of a pass of {rows} rows: {:.3} ms", 1e3 * total))?;
        for (name, seconds, calls) in times {
            let share = 100.0 * seconds / total;
            print_line(format_args!(
                "{:>11.3} ms {share:>3.0}% {calls:>5} x  {name}",
                1e3 * seconds
            ))?;
        }
    }
    Ok(())
}
