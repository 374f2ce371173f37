//! Cost tables of the controller as files: read and written, and kept for each pair and device.
//!
//! A kept table makes `auto` decide alike from run to run: the same seed gives the same text, and
//! measuring is paid once. Tables are kept in the folder of [`crate::cached`]; removing a file
//! measures anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::console::tell;
use crate::cached;
use crate::decode::CostTable;
use crate::error::{Error, Result};
use crate::files;
use crate::session::pair::Pair;

/// Larger files than this are no cost tables, and no outputs of runs.
const MOST_BYTES: u64 = 64 << 20;

/// A cost table, alone or in the output of a run.
pub(super) fn read(file: &Path) -> Result<CostTable> {
    let name = file.display().to_string();
    let text = files::read(file, MOST_BYTES)?;
    let wrong = |what: String| Error::format(&name, what);
    let json: Value = serde_json::from_slice(&text).map_err(|e| wrong(format!("not JSON: {e}")))?;
    let table = json.get("cost_table").unwrap_or(&json);
    let entries = |key: &str| {
        let pairs = table.get(key).and_then(Value::as_array);
        let pair = |pair: &Value| {
            let [rows, seconds] = pair.as_array()?.as_slice() else { return None };
            Some((usize::try_from(rows.as_u64()?).ok()?, seconds.as_f64()?))
        };
        pairs.and_then(|pairs| pairs.iter().map(pair).collect::<Option<Vec<_>>>()).ok_or_else(
            || wrong(format!("no cost table: `{key}` is not a list of [rows, seconds]")),
        )
    };
    CostTable::new(entries("target")?, entries("draft")?).map_err(|error| wrong(error.to_string()))
}

/// A cost table as [`read`] reads it.
pub(super) fn to_json(costs: &CostTable) -> Value {
    json!({"target": costs.target_entries(), "draft": costs.draft_entries()})
}

/// The place of a pair's table on its device.
pub(super) struct Kept(Option<PathBuf>);

impl Kept {
    /// The place for this pair.
    pub fn of(pair: &Pair) -> Self {
        let mut key = cached::Key::new("costs").text(env!("CARGO_PKG_VERSION"));
        for model in [Some(pair.target()), pair.draft()].into_iter().flatten() {
            let file = model.file();
            key = key.text(file.name()).number(file.file_len() as u64).text(&model.describe());
        }
        let name = format!("costs-{}.json", key.finish());
        Kept(cached::folder().map(|folder| folder.join(name)))
    }

    /// The table that was kept, if there is one that can be read.
    pub fn load(&self) -> Option<Arc<CostTable>> {
        let path = self.0.as_deref().filter(|path| path.exists())?;
        match read(path) {
            Ok(costs) => Some(Arc::new(costs)),
            Err(error) => {
                tell!("mtad: {error}; measuring anew");
                None
            }
        }
    }

    /// Keeps a table. That it cannot be kept is said and does no other harm.
    pub fn store(&self, costs: &CostTable) {
        let Some(path) = &self.0 else { return };
        let json = json!({ "cost_table": to_json(costs) }).to_string();
        if let Err(error) = cached::write(path, json.as_bytes()) {
            tell!("mtad: the cost table is not kept: {}: {error}", path.display());
        }
    }
}
