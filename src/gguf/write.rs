//! Writing GGUF files (version 3, little-endian).

use std::collections::HashMap;
use std::io::{self, Write};

use super::value::{Value, ValueType};
use crate::quant::BlockType;

/// The alignment of tensor data that [`Writer`] uses: the format's default.
const ALIGNMENT: u64 = 32;

/// A metadata value to write.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum OwnedValue {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    /// A value of any type as it stands in a file: see the conversion from [`Value`].
    Encoded(ValueType, Vec<u8>),
}

impl OwnedValue {
    fn kind(&self) -> ValueType {
        match self {
            OwnedValue::U32(_) => ValueType::U32,
            OwnedValue::U64(_) => ValueType::U64,
            OwnedValue::F32(_) => ValueType::F32,
            OwnedValue::Bool(_) => ValueType::Bool,
            OwnedValue::String(_) => ValueType::String,
            OwnedValue::Encoded(kind, _) => *kind,
            _ => ValueType::Array,
        }
    }
}

impl From<&str> for OwnedValue {
    fn from(text: &str) -> Self {
        OwnedValue::String(text.to_owned())
    }
}

impl From<u32> for OwnedValue {
    fn from(x: u32) -> Self {
        OwnedValue::U32(x)
    }
}

impl From<f32> for OwnedValue {
    fn from(x: f32) -> Self {
        OwnedValue::F32(x)
    }
}

impl From<bool> for OwnedValue {
    fn from(x: bool) -> Self {
        OwnedValue::Bool(x)
    }
}

impl From<String> for OwnedValue {
    fn from(text: String) -> Self {
        OwnedValue::String(text)
    }
}

/// A copy, bit for bit.
impl From<Value<'_>> for OwnedValue {
    fn from(value: Value<'_>) -> Self {
        let mut bytes = Vec::new();
        encode(&mut bytes, &value);
        OwnedValue::Encoded(value.value_type(), bytes)
    }
}

/// A file being put together: metadata and tensors, written in the order in which they were added.
#[derive(Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, OwnedValue)>,
    /// Where in it each key is.
    places: HashMap<String, usize>,
    tensors: Vec<Planned>,
}

/// A tensor to be written.
#[derive(Debug)]
struct Planned {
    name: String,
    dims: Vec<u64>,
    block_type: BlockType,
    /// `None`: the bytes come when the file is written.
    bytes: Option<Vec<u8>>,
}

impl Planned {
    fn len(&self) -> u64 {
        let elements: u64 = self.dims.iter().product();
        elements / self.block_type.block_len() as u64 * self.block_type.block_bytes() as u64
    }
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry, or replaces the one with this key.
    pub fn set(&mut self, key: &str, value: impl Into<OwnedValue>) -> &mut Self {
        let value = value.into();
        match self.places.get(key) {
            Some(&place) => self.metadata[place].1 = value,
            None => {
                self.places.insert(key.to_owned(), self.metadata.len());
                self.metadata.push((key.to_owned(), value));
            }
        }
        self
    }

    /// Adds a tensor. `dims` is in GGUF's order (row length first).
    ///
    /// # Panics
    /// If `bytes` are not the whole blocks that `dims` and `block_type` make.
    pub fn tensor(
        &mut self,
        name: &str,
        dims: &[u64],
        block_type: BlockType,
        bytes: Vec<u8>,
    ) -> &mut Self {
        self.plan(name, dims, block_type);
        let planned = self.tensors.last_mut().expect("it was just added");
        assert_eq!(planned.len(), bytes.len() as u64, "bytes of `{name}`");
        planned.bytes = Some(bytes);
        self
    }

    /// Adds a tensor whose bytes [`Writer::write_with`] will ask for, so that large files need not
    /// fit into memory.
    pub fn plan(&mut self, name: &str, dims: &[u64], block_type: BlockType) -> &mut Self {
        let (name, dims) = (name.to_owned(), dims.to_vec());
        self.tensors.push(Planned { name, dims, block_type, bytes: None });
        self
    }

    /// Drops the tensors whose names `keep` does not want.
    pub fn retain_tensors(&mut self, keep: impl Fn(&str) -> bool) -> &mut Self {
        self.tensors.retain(|tensor| keep(&tensor.name));
        self
    }

    /// Writes a file all of whose tensors have their bytes.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.write_with(out, |name, _, _| Err(io::Error::other(format!("`{name}` has no bytes"))))
    }

    /// Writes the file; `source` writes the bytes of planned tensors, given name, type and count.
    ///
    /// # Errors
    /// What `out` or `source` return; a `source` that wrote another number of bytes.
    pub fn write_with<W: Write>(
        &self,
        out: &mut W,
        mut source: impl FnMut(&str, (BlockType, u64), &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut header = Vec::new();
        header.extend(b"GGUF");
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut header, key);
            header.extend((value.kind() as u32).to_le_bytes());
            put_value(&mut header, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut header, &tensor.name);
            header.extend((tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                header.extend(dim.to_le_bytes());
            }
            header.extend(tensor.block_type.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += tensor.len().next_multiple_of(ALIGNMENT);
        }
        out.write_all(&header)?;
        pad(out, header.len() as u64)?;
        for tensor in &self.tensors {
            let len = tensor.len();
            let mut counted = Counted { out, written: 0 };
            match &tensor.bytes {
                Some(bytes) => counted.write_all(bytes)?,
                None => source(&tensor.name, (tensor.block_type, len), &mut counted)?,
            }
            if counted.written != len {
                let (name, written) = (&tensor.name, counted.written);
                return Err(io::Error::other(format!("`{name}`: {written} bytes, not {len}")));
            }
            pad(out, len)?;
        }
        Ok(())
    }

    /// The file as bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out).expect("writing to memory does not fail");
        out
    }
}

/// Counts what goes through it.
struct Counted<'a, W> {
    out: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn pad(out: &mut impl Write, written: u64) -> io::Result<()> {
    let missing = written.next_multiple_of(ALIGNMENT) - written;
    out.write_all(&[0; ALIGNMENT as usize][..missing as usize])
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array(out: &mut Vec<u8>, kind: ValueType, len: usize) {
    out.extend((kind as u32).to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}

/// What a file holds of a value.
fn encode(out: &mut Vec<u8>, value: &Value<'_>) {
    match value {
        Value::U8(x) => out.push(*x),
        Value::I8(x) => out.extend(x.to_le_bytes()),
        Value::U16(x) => out.extend(x.to_le_bytes()),
        Value::I16(x) => out.extend(x.to_le_bytes()),
        Value::U32(x) => out.extend(x.to_le_bytes()),
        Value::I32(x) => out.extend(x.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::Bool(x) => out.push(u8::from(*x)),
        Value::String(text) => {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(*text);
        }
        Value::Array(items) => {
            array(out, items.value_type(), items.len());
            items.iter().for_each(|item| encode(out, &item));
        }
        Value::U64(x) => out.extend(x.to_le_bytes()),
        Value::I64(x) => out.extend(x.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
    }
}

fn put_value(out: &mut Vec<u8>, value: &OwnedValue) {
    match value {
        OwnedValue::U32(x) => out.extend(x.to_le_bytes()),
        OwnedValue::U64(x) => out.extend(x.to_le_bytes()),
        OwnedValue::F32(x) => out.extend(x.to_le_bytes()),
        OwnedValue::Bool(x) => out.push(u8::from(*x)),
        OwnedValue::String(x) => put_string(out, x),
        OwnedValue::Strings(xs) => {
            array(out, ValueType::String, xs.len());
            xs.iter().for_each(|x| put_string(out, x));
        }
        OwnedValue::F32s(xs) => {
            array(out, ValueType::F32, xs.len());
            xs.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        OwnedValue::I32s(xs) => {
            array(out, ValueType::I32, xs.len());
            xs.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        OwnedValue::Encoded(_, bytes) => out.extend(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Gguf;

    #[test]
    fn a_key_that_is_set_again_keeps_its_place() {
        let mut writer = Writer::new();
        writer.set("a", 1u32).set("b", 2u32).set("c", 3u32).set("b", "two").set("a", true);
        let file = Gguf::from_vec("test.gguf", writer.to_vec()).unwrap();
        let keys: Vec<_> = file.metadata().map(|(key, _)| key.to_owned()).collect();
        assert_eq!(keys, ["a", "b", "c"]);
        assert_eq!(file.get_bool("a").unwrap(), Some(true));
        assert_eq!(file.get_str("b").unwrap(), Some("two"));
        assert_eq!(file.get_u64("c").unwrap(), Some(3));
        assert!(file.get("").is_none() && file.get("d").is_none());
    }

    #[test]
    fn every_tensor_is_found_by_its_name() {
        let mut writer = Writer::new();
        // Not in the order of their names.
        let names: Vec<String> = (0..1000u32).map(|i| format!("t{}", i * 7919 % 1000)).collect();
        for (i, name) in (0u32..).zip(&names) {
            writer.tensor(name, &[1], BlockType::F32, (i as f32).to_le_bytes().to_vec());
        }
        let file = Gguf::from_vec("test.gguf", writer.to_vec()).unwrap();
        for (i, name) in (0u32..).zip(&names) {
            let tensor = file.tensor(name).unwrap();
            assert_eq!((tensor.name, tensor.bytes), (name.as_str(), &(i as f32).to_le_bytes()[..]));
        }
        assert!(file.tensor("t1000").is_none() && file.tensor("").is_none());
        assert!(file.tensors().map(|tensor| tensor.name).eq(names.iter().map(String::as_str)));
    }
}
