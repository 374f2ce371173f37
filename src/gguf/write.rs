//! Writing GGUF files (version 3, little-endian).

use std::io::{self, Write};

use super::value::ValueType;
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
}

impl OwnedValue {
    fn kind(&self) -> ValueType {
        match self {
            OwnedValue::U32(_) => ValueType::U32,
            OwnedValue::U64(_) => ValueType::U64,
            OwnedValue::F32(_) => ValueType::F32,
            OwnedValue::Bool(_) => ValueType::Bool,
            OwnedValue::String(_) => ValueType::String,
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

/// A file being put together: metadata and tensors, written in the order in which they were added.
#[derive(Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, OwnedValue)>,
    tensors: Vec<(String, Vec<u64>, BlockType, Vec<u8>)>,
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry, or replaces the one with this key.
    pub fn set(&mut self, key: &str, value: impl Into<OwnedValue>) -> &mut Self {
        let value = value.into();
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    /// Adds a tensor. `dims` is in GGUF's order (row length first); `bytes` are whole blocks.
    pub fn tensor(
        &mut self,
        name: &str,
        dims: &[u64],
        block_type: BlockType,
        bytes: Vec<u8>,
    ) -> &mut Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), block_type, bytes));
        self
    }

    /// Drops the tensors whose names `keep` does not want.
    pub fn retain_tensors(&mut self, keep: impl Fn(&str) -> bool) -> &mut Self {
        self.tensors.retain(|(name, ..)| keep(name));
        self
    }

    /// Writes the file.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
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
        for (name, dims, block_type, bytes) in &self.tensors {
            put_string(&mut header, name);
            header.extend((dims.len() as u32).to_le_bytes());
            for dim in dims {
                header.extend(dim.to_le_bytes());
            }
            header.extend(block_type.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += (bytes.len() as u64).next_multiple_of(ALIGNMENT);
        }
        out.write_all(&header)?;
        pad(out, header.len())?;
        for (.., bytes) in &self.tensors {
            out.write_all(bytes)?;
            pad(out, bytes.len())?;
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

fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    let missing = (written as u64).next_multiple_of(ALIGNMENT) - written as u64;
    out.write_all(&[0; ALIGNMENT as usize][..missing as usize])
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &OwnedValue) {
    fn array(out: &mut Vec<u8>, kind: ValueType, len: usize) {
        out.extend((kind as u32).to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    }
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
    }
}
