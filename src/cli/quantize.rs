//! `mtad quantize`: stores a model's weights in other types.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use indicatif::HumanBytes;
use serde_json::json;

use super::run::watch_for_interrupts;
use super::{open_model, print_line, progress_bar};
use crate::error::{Error, Result};
use crate::gguf::quantize::{Options, Stored, quantize as write};
use crate::quant::Recipe;

/// Store a model's weights in other types
///
/// Types, from the largest files to the smallest: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0
/// Q4_K_M Q4_K_S Q4_1 IQ4_NL Q4_0 IQ4_XS Q3_K_L Q3_K_M Q3_K_S Q2_K. Mixed recipes (those that end
/// in _S, _M and _L, and Q2_K) store some tensors in more bits, as llama.cpp does, and so does the
/// output of all but Q8_0. Rows that are no whole blocks of a type are stored in another, which is
/// said. F16 and F32 read a quantized model back.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// The GGUF file to read (builtin:target and builtin:draft are the built-in pair)
    #[arg(value_name = "IN.gguf")]
    input: PathBuf,

    /// The GGUF file to write; it appears when it is whole
    #[arg(value_name = "OUT.gguf")]
    output: PathBuf,

    /// What to store weights in, in any case; Q3_K, Q4_K and Q5_K stand for their _M
    #[arg(value_name = "TYPE")]
    recipe: Recipe,

    /// Read and round again what is quantized already
    #[arg(long)]
    requantize: bool,

    /// CPU threads [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn quantize(args: &QuantizeArgs) -> Result<()> {
    let file = open_model(&args.input)?;
    let threads = args.threads.map_or_else(num_cpus::get_physical, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::invalid(format!("{threads} threads: {e}")))?;
    let cancel = Arc::new(AtomicBool::new(false));
    watch_for_interrupts(cancel.clone());
    let bar = progress_bar("{bar:40} {bytes}/{total_bytes} {eta} {msg}");
    let options = Options { recipe: args.recipe, requantize: args.requantize };
    let start = Instant::now();
    let mut progress = |tensor: &Stored, done, total| {
        bar.set_length(total);
        bar.set_position(done);
        bar.set_message(tensor.name.clone());
        !cancel.load(Ordering::Relaxed)
    };
    let stored = pool.install(|| write(&file, &args.output, &options, &mut progress))?;
    bar.finish_and_clear();
    for tensor in stored.iter().filter(|tensor| tensor.now != tensor.wanted) {
        eprintln!(
            "mtad: {}: its rows are no whole blocks of {}; stored as {}",
            tensor.name, tensor.wanted, tensor.now
        );
    }
    let out_len = std::fs::metadata(&args.output).map_or(0, |meta| meta.len());
    let report = Report { stored, file_len: file.file_len() as u64, out_len };
    let seconds = start.elapsed().as_secs_f64();
    match args.json {
        true => print_line(report.json(args, seconds)),
        false => report.print(args, seconds),
    }
}

struct Report {
    stored: Vec<Stored>,
    file_len: u64,
    out_len: u64,
}

/// Tensors of one type.
#[derive(Default)]
struct Sum {
    tensors: usize,
    elements: u64,
    bytes: u64,
    squared_error: f64,
    squares: f64,
}

impl Sum {
    fn add(&mut self, tensor: &Stored) {
        self.tensors += 1;
        self.elements += tensor.elements;
        self.bytes += tensor.bytes;
        self.squared_error += tensor.squared_error;
        self.squares += tensor.squares;
    }

    fn bits(&self) -> f64 {
        8.0 * self.bytes as f64 / self.elements.max(1) as f64
    }

    /// Squared error by squares of what was rounded.
    fn nmse(&self) -> Option<f64> {
        (self.squares > 0.0).then(|| self.squared_error / self.squares)
    }
}

impl Report {
    fn sums(&self) -> (Sum, BTreeMap<&'static str, Sum>) {
        let (mut all, mut by_type) = (Sum::default(), BTreeMap::<_, Sum>::new());
        for tensor in &self.stored {
            all.add(tensor);
            by_type.entry(tensor.now.name()).or_default().add(tensor);
        }
        (all, by_type)
    }

    fn json(&self, args: &QuantizeArgs, seconds: f64) -> serde_json::Value {
        let (all, by_type) = self.sums();
        let types = by_type.iter().map(|(name, sum)| {
            json!({
                "type": name,
                "tensors": sum.tensors,
                "elements": sum.elements,
                "bytes": sum.bytes,
                "nmse": sum.nmse(),
            })
        });
        let changed = self.stored.iter().filter(|tensor| tensor.now != tensor.wanted);
        let fallbacks = changed.map(|tensor| {
            json!({
                "tensor": tensor.name,
                "wanted": tensor.wanted.name(),
                "used": tensor.now.name(),
            })
        });
        json!({
            "input": args.input.display().to_string(),
            "output": args.output.display().to_string(),
            "type": args.recipe.name(),
            "file_type": args.recipe.file_type(),
            "input_bytes": self.file_len,
            "output_bytes": self.out_len,
            "bits_per_weight": all.bits(),
            "nmse": all.nmse(),
            "types": types.collect::<Vec<_>>(),
            "fallbacks": fallbacks.collect::<Vec<_>>(),
            "seconds": seconds,
        })
    }

    fn print(&self, args: &QuantizeArgs, seconds: f64) -> Result<()> {
        let (all, by_type) = self.sums();
        print_line(format_args!(
            "{}: {} -> {}, {:.2} bits per weight, in {seconds:.1} s",
            args.output.display(),
            HumanBytes(self.file_len),
            HumanBytes(self.out_len),
            all.bits()
        ))?;
        print_line("  type    tensors          size   error")?;
        for (name, sum) in by_type {
            let size = HumanBytes(sum.bytes).to_string();
            // Like the noise of a signal: root of mean squared error by mean square.
            let error = match sum.nmse() {
                Some(nmse) => format!("{:.3}%", 100.0 * nmse.sqrt()),
                None => "copied".to_owned(),
            };
            print_line(format_args!("  {name:7} {:7} {size:>13} {error:>7}", sum.tensors))?;
        }
        Ok(())
    }
}
