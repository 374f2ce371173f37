//! `mtad inspect`: what a GGUF file holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value as Json, json};

use super::console::visible_name;
use super::{open_model, print_line};
use crate::error::Result;
use crate::gguf::{Gguf, Value};

/// Show a GGUF file's metadata and tensors
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A GGUF file, or builtin:target, or builtin:draft
    model: PathBuf,

    /// Print one line of JSON; arrays of more than 64 elements are shortened
    #[arg(long)]
    json: bool,
}

/// Names beyond this width push their line to the right instead of all lines: a file may have many
/// entries and one very long name.
const MOST_WIDTH: usize = 64;

/// The width of a column of names.
fn width(names: impl Iterator<Item = impl AsRef<str>>) -> usize {
    names.map(|name| name.as_ref().chars().count()).max().unwrap_or(0).min(MOST_WIDTH)
}

/// Array elements that JSON shows.
const SHOWN: usize = 64;

pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let file = open_model(&args.model)?;
    if args.json { print_line(to_json(&file)) } else { print(&file) }
}

fn print(file: &Gguf) -> Result<()> {
    let parts = match file.files().len() {
        1 => String::new(),
        parts => format!(" in {parts} files"),
    };
    print_line(format_args!(
        "{}: GGUF version {}{parts}, {}, header {}",
        file.name(),
        file.version(),
        size(file.file_len() as u64),
        size(file.data_offset()),
    ))?;
    print_line(format_args!("\n{} metadata entries", file.metadata().len()))?;
    let wide = width(file.metadata().map(|(key, _)| visible_name(key)));
    for (key, value) in file.metadata() {
        let key = visible_name(key);
        print_line(format_args!("  {key:wide$}  {:6}  {value}", value.value_type()))?;
    }
    print_line(format_args!("\n{} tensors", file.tensors().len()))?;
    let wide = width(file.tensors().map(|t| visible_name(t.name)));
    let mut by_type = BTreeMap::new();
    let (mut weights, mut bytes) = (0u64, 0u64);
    for (tensor, dims) in file.tensors().zip(file.dims()) {
        let shape = dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        let (name, kind) = (visible_name(tensor.name), tensor.block_type);
        let len = tensor.bytes.len() as u64;
        print_line(format_args!("  {name:wide$}  {kind:7}  {shape:>18}  {:>10}", size(len)))?;
        let count: u64 = dims.iter().product();
        let entry = by_type.entry(kind.name()).or_insert((0u64, 0u64));
        (entry.0, entry.1) = (entry.0 + 1, entry.1 + len);
        (weights, bytes) = (weights + count, bytes + len);
    }
    let bits = 8.0 * bytes as f64 / weights.max(1) as f64;
    print_line(format_args!("\n{weights} weights in {}: {bits:.2} bits each", size(bytes)))?;
    for (kind, (count, bytes)) in by_type {
        print_line(format_args!("  {kind:7}  {count:5} tensors  {:>10}", size(bytes)))?;
    }
    Ok(())
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

fn to_json(file: &Gguf) -> Json {
    let metadata: serde_json::Map<String, Json> =
        file.metadata().map(|(key, value)| (key.to_owned(), value_json(&value))).collect();
    let tensors: Vec<Json> = file
        .tensors()
        .zip(file.dims())
        .map(|(t, dims)| {
            json!({
                "name": t.name, "type": t.block_type.name(), "shape": dims, "bytes": t.bytes.len(),
            })
        })
        .collect();
    json!({
        "file": file.name(),
        "files": file.files().len(),
        "version": file.version(),
        "bytes": file.file_len(),
        "alignment": file.alignment(),
        "data_offset": file.data_offset(),
        "metadata": metadata,
        "tensors": tensors,
    })
}

fn value_json(value: &Value<'_>) -> Json {
    match *value {
        Value::Bool(x) => json!(x),
        Value::F32(x) => json!(x),
        Value::F64(x) => json!(x),
        Value::U64(x) => json!(x),
        Value::String(bytes) => json!(String::from_utf8_lossy(bytes)),
        Value::Array(array) if array.len() > SHOWN => json!({
            "type": array.value_type().to_string(),
            "length": array.len(),
            "first": array.iter().take(SHOWN).map(|v| value_json(&v)).collect::<Vec<_>>(),
        }),
        Value::Array(array) => array.iter().map(|v| value_json(&v)).collect(),
        _ => json!(value.as_i128().and_then(|x| i64::try_from(x).ok())),
    }
}
