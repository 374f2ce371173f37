//! A checkpoint's JSON files, with messages that name file and key.

use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files;

/// Larger files than this are no descriptions of a model (published ones stay below 40 MB).
const MAX_BYTES: u64 = 256 << 20;

/// Larger values than this in any dimension mean a damaged file; models are refused by the same
/// limit when they are run.
const MAX_DIM: u64 = 1 << 24;

/// What parsed values may take in memory for each byte of their file, and beyond that. Vocabularies
/// take about 20.
const MEMORY_PER_BYTE: u64 = 32;
const MEMORY: u64 = 64 << 20;

/// Bytes that a value takes, and that an object takes beside: maps hold room for 11 entries.
const OF_VALUE: u64 = 32;
const OF_OBJECT: u64 = 640;

const POSITIVE: &str = "a positive number that single precision can hold";

/// The text of a file; `None` if it is not there.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match files::read(path, MAX_BYTES) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        bytes => bytes.map(Some),
    }
}

/// About how many bytes the values of a JSON text take when they are parsed.
fn memory_of(text: &[u8]) -> u64 {
    let (mut memory, mut is_string, mut is_escaped) = (0, false, false);
    for byte in text {
        match (is_string, byte) {
            (true, _) if is_escaped => is_escaped = false,
            (true, b'\\') => is_escaped = true,
            (_, b'"') => is_string = !is_string,
            // As many values as there are commas and openings.
            (false, b',' | b'[') => memory += OF_VALUE,
            (false, b'{') => memory += OF_VALUE + OF_OBJECT,
            _ => {}
        }
    }
    memory
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
        let memory = memory_of(&bytes);
        if memory > MEMORY_PER_BYTE * bytes.len() as u64 + MEMORY {
            let what = format!(
                "has so many small values that its {} bytes would take {memory} in memory; it is no \
                 description of a model",
                bytes.len()
            );
            return Err(Error::format(file, what));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_made_to_fill_memory_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let read = |text: String| {
            std::fs::write(&path, text).unwrap();
            Object::read(&path)
        };
        // Objects of one entry: 7 bytes each in the file, about 640 in memory.
        let objects = |n: usize| format!("{{\"z\":[{}1]}}", "{\"\":0},".repeat(n));
        assert!(read(objects(100_000)).is_ok());
        let error = read(objects(200_000)).unwrap_err().to_string();
        assert!(error.contains("so many small values"), "{error}");
        // The same in a string is nothing.
        let text = objects(200_000).replace('"', "\\\"");
        assert!(read(format!("{{\"z\":\"{text}\"}}")).is_ok());
        // A vocabulary of published size, written as tersely as can be.
        let vocab: Vec<String> = (0..262_144).map(|i| format!("\"{i:x}\":{i}")).collect();
        let merges: Vec<String> = (0..500_000).map(|i| format!("[\"{i:x}\",\"b\"]")).collect();
        let text = format!("{{\"v\":{{{}}},\"m\":[{}]}}", vocab.join(","), merges.join(","));
        assert!(read(text).is_ok());
    }
}
