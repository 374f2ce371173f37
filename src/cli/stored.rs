//! What `quantize` and `convert` share: progress while a model file is written, and what is
//! reported of it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use indicatif::HumanBytes;
use serde_json::json;

use super::console::{tell, visible_name};
use super::interrupts::{self, Finishing};
use super::{print_line, progress_bar};
use crate::error::{Error, Result};
use crate::files;
use crate::gguf::quantize::{Progress, Stored};
use crate::quant::Recipe;

/// Does `work` on some threads with a progress bar; an interrupt stops it.
pub(super) fn with_progress<T: Send>(
    threads: Option<u16>,
    work: impl FnOnce(Progress<'_>) -> Result<T> + Send,
) -> Result<T> {
    let threads = threads.map_or_else(num_cpus::get_physical, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::invalid(format!("{threads} threads: {e}")))?;
    let bar = progress_bar("{bar:40} {bytes}/{total_bytes} {eta} {msg}");
    // Once there is a part of a file, an interrupt waits for it to be removed.
    let mut writing = None;
    let mut progress = |tensor: &Stored, done, total| {
        writing.get_or_insert_with(Finishing::first);
        bar.set_length(total);
        bar.set_position(done);
        bar.set_message(visible_name(&tensor.name).into_owned());
        !interrupts::asked()
    };
    let result = pool.install(|| work(&mut progress));
    bar.finish_and_clear();
    result
}

/// A file that was written.
pub(super) struct Report<'a> {
    pub input: &'a Path,
    pub output: &'a Path,
    pub recipe: Recipe,
    pub stored: &'a [Stored],
    pub input_bytes: u64,
    pub seconds: f64,
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

impl Report<'_> {
    /// What the tensors take, where the output is no file that tells.
    fn output_bytes(&self) -> u64 {
        match std::fs::metadata(self.output) {
            Ok(meta) if meta.is_file() => meta.len(),
            _ => self.stored.iter().map(|tensor| tensor.bytes).sum(),
        }
    }

    /// Prints a line of the report: to standard error if the model itself went to standard output.
    pub fn say(&self, line: impl std::fmt::Display) -> Result<()> {
        match files::is_standard_output(self.output) {
            true => writeln!(std::io::stderr().lock(), "{line}")
                .map_err(|e| Error::io("standard error", e)),
            false => print_line(line),
        }
    }

    fn fallbacks(&self) -> impl Iterator<Item = &Stored> {
        self.stored.iter().filter(|tensor| tensor.now != tensor.wanted)
    }

    /// Says on standard error which tensors have another type than was asked for.
    pub fn print_fallbacks(&self) {
        for tensor in self.fallbacks() {
            tell!(
                "mtad: {}: its rows are no whole blocks of {}; stored as {}",
                tensor.name,
                tensor.wanted,
                tensor.now
            );
        }
    }

    fn sums(&self) -> (Sum, BTreeMap<&'static str, Sum>) {
        let (mut all, mut by_type) = (Sum::default(), BTreeMap::<_, Sum>::new());
        for tensor in self.stored {
            all.add(tensor);
            by_type.entry(tensor.now.name()).or_default().add(tensor);
        }
        (all, by_type)
    }

    /// As one object.
    pub fn json(&self) -> serde_json::Value {
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
        let fallbacks = self.fallbacks().map(|tensor| {
            json!({
                "tensor": tensor.name,
                "wanted": tensor.wanted.name(),
                "used": tensor.now.name(),
            })
        });
        json!({
            "input": self.input.display().to_string(),
            "output": self.output.display().to_string(),
            "type": self.recipe.name(),
            "file_type": self.recipe.file_type(),
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes(),
            "bits_per_weight": all.bits(),
            "nmse": all.nmse(),
            "types": types.collect::<Vec<_>>(),
            "fallbacks": fallbacks.collect::<Vec<_>>(),
            "seconds": self.seconds,
        })
    }

    /// As a table.
    pub fn print(&self) -> Result<()> {
        let (all, by_type) = self.sums();
        self.say(format_args!(
            "{}: {} -> {}, {:.2} bits per weight, in {:.1} s",
            self.output.display(),
            HumanBytes(self.input_bytes),
            HumanBytes(self.output_bytes()),
            all.bits(),
            self.seconds
        ))?;
        self.say("  type    tensors          size   error")?;
        for (name, sum) in by_type {
            let size = HumanBytes(sum.bytes).to_string();
            // Like the noise of a signal: root of mean squared error by mean square.
            let error = match sum.nmse() {
                Some(nmse) => format!("{:.3}%", 100.0 * nmse.sqrt()),
                None => "copied".to_owned(),
            };
            self.say(format_args!("  {name:7} {:7} {size:>13} {error:>7}", sum.tensors))?;
        }
        Ok(())
    }
}
