//! A checkpoint's JSON files, with messages that name file and key.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Larger files than this are no descriptions of a model (published ones stay below 40 MB).
const MAX_BYTES: u64 = 256 << 20;

/// Larger values than this in any dimension mean a damaged file; models are refused by the same
/// limit when they are run.
const MAX_DIM: u64 = 1 << 24;

const POSITIVE: &str = "a positive number that single precision can hold";

/// The text of a file; `None` if it is not there.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let name = path.display().to_string();
    let io = |source| Error::io(name.clone(), source);
    // Asked first: opening a FIFO would wait for a writer.
    let meta = match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        meta => meta.map_err(io)?,
    };
    if !meta.is_file() {
        return Err(Error::format(name, "is not a regular file"));
    }
    if meta.len() > MAX_BYTES {
        let what = format!("has {} bytes; at most {MAX_BYTES} are read", meta.len());
        return Err(Error::format(name, what));
    }
    fs::read(path).map(Some).map_err(io)
}

/// A JSON object and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Object {
    file: String,
    /// What stands before a key in messages: `rope_scaling.`.
    prefix: String,
    map: Map<String, Value>,
}

impl Object {
    /// Reads a file; `None` if it is not there.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let file = path.display().to_string();
        let Some(bytes) = read(path)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Some(Object { file, prefix: String::new(), map })),
            Ok(_) => Err(Error::format(file, "is JSON, but no object ({...})")),
            Err(error) => Err(Error::format(file, format!("is no sound JSON: {error}"))),
        }
    }

    /// The file that it comes from.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The value of `key`; `null` is none.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be it as `null`.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    /// The error for a value that will not do.
    pub fn wrong(&self, key: &str, wanted: &str) -> Error {
        let value = self.map.get(key).map_or("missing".to_owned(), shown);
        Error::format(&self.file, format!("`{}{key}` is {value}; {wanted} is needed", self.prefix))
    }

    /// The error for a value that is understood and not supported.
    pub fn unsupported(&self, key: &str, what: &str) -> Error {
        let value = self.map.get(key).map_or("missing".to_owned(), shown);
        Error::unsupported(&self.file, format!("`{}{key}` is {value}; {what}", self.prefix))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        take: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => take(value).map(Some).ok_or_else(|| self.wrong(key, wanted)),
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array.
    pub fn array(&self, key: &str) -> Result<Option<&[Value]>> {
        self.typed(key, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    /// An object, taken out: for large ones.
    pub fn take_object(&mut self, key: &str) -> Result<Option<Object>> {
        if let Some(Value::Object(map)) = self.map.get_mut(key) {
            let map = std::mem::take(map);
            let prefix = format!("{}{key}.", self.prefix);
            return Ok(Some(Object { file: self.file.clone(), prefix, map }));
        }
        self.object(key)
    }

    /// An object.
    pub fn object(&self, key: &str) -> Result<Option<Object>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Object {
            file: self.file.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map: map.clone(),
        }))
    }

    /// A number that is a size: at least 1.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        let wanted = format!("a whole number from 1 to {MAX_DIM}");
        let whole = |value: &Value| value.as_u64().filter(|n| (1..=MAX_DIM).contains(n));
        self.typed(key, &wanted, whole)
    }

    /// A size that must be there.
    pub fn need_size(&self, key: &str) -> Result<u64> {
        let wanted = format!("a whole number from 1 to {MAX_DIM}");
        self.size(key)?.ok_or_else(|| self.wrong(key, &wanted))
    }

    /// A positive number, also in the single precision that GGUF keeps of it.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        let positive = |x: &f64| (*x as f32).is_finite() && *x as f32 > 0.0;
        self.typed(key, POSITIVE, |value| value.as_f64().filter(positive))
    }

    /// A positive number that must be there.
    pub fn need_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.wrong(key, POSITIVE))
    }
}

/// A value as a message shows it: cut where it is long.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(300) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
