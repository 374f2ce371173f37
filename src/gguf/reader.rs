//! The bounded walk over a GGUF header.
//!
//! Layout (little-endian): magic `GGUF`, version u32, tensor count u64, metadata count u64; the
//! metadata (key string, type u32, value); the tensor infos (name string, rank u32, dimensions
//! u64 each, type u32, offset u64); padding to the alignment; tensor data. A string is a u64
//! length and its bytes; an array is its element type u32, a u64 count, and the elements.

use std::collections::HashSet;
use std::ops::Range;

use super::TensorInfo;
use super::value::{Value, ValueType};
use crate::error::{Error, Result};
use crate::quant::BlockType;

/// More metadata entries or tensors than this mean a damaged count: the largest published models
/// have a few thousand tensors and below a hundred entries. It also bounds what parsing keeps.
const MAX_ENTRIES: u64 = 1 << 16;

/// Names and keys longer than this mean a damaged length (the format's own limit).
const MAX_NAME: u64 = 65_535;

pub(super) struct Header {
    pub version: u32,
    pub alignment: u64,
    pub data_offset: u64,
    pub metadata: Vec<Entry>,
    pub tensors: Vec<TensorInfo>,
}

/// Where a metadata entry lies in the file.
#[derive(Debug)]
pub(super) struct Entry {
    key: Range<usize>,
    kind: ValueType,
    value: Range<usize>,
}

impl Entry {
    pub fn key<'a>(&self, file: &'a [u8]) -> &'a str {
        // Checked by the walk.
        std::str::from_utf8(&file[self.key.clone()]).unwrap_or_default()
    }

    /// The value as the file stores it.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        &file[self.value.clone()]
    }

    pub fn value<'a>(&self, file: &'a [u8]) -> Value<'a> {
        Value::read(self.kind, &file[self.value.clone()])
    }
}

/// A position in the file that cannot leave it.
struct Cursor<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::format(self.file, format!("{what} (at byte {})", self.at))
    }

    fn skip(&mut self, len: u64, what: &str) -> Result<Range<usize>> {
        let left = self.bytes.len() - self.at;
        if len > left as u64 {
            return Err(self.error(format_args!(
                "the file ends inside {what}: {len} bytes wanted, {left} left; it is cut short or damaged"
            )));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(start..self.at)
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let range = self.skip(N as u64, what)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[range]);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(what)?))
    }

    /// A key or a tensor's name: short, valid UTF-8.
    fn name(&mut self, what: &str) -> Result<(Range<usize>, &'a str)> {
        let len = self.u64(what)?;
        if len > MAX_NAME {
            return Err(self
                .error(format_args!("{what} claims {len} bytes; at most {MAX_NAME} are allowed")));
        }
        let range = self.skip(len, what)?;
        match std::str::from_utf8(&self.bytes[range.clone()]) {
            Ok(text) => Ok((range, text)),
            Err(_) => Err(self.error(format_args!("{what} is not UTF-8"))),
        }
    }

    fn value_type(&mut self, what: &str) -> Result<ValueType> {
        let id = self.u32(what)?;
        ValueType::from_id(id)
            .ok_or_else(|| self.error(format_args!("{what}: unknown value type {id}")))
    }

    fn value(&mut self, kind: ValueType, what: &str) -> Result<()> {
        if let Some(size) = kind.size() {
            self.skip(size as u64, what)?;
        } else if kind == ValueType::String {
            let len = self.u64(what)?;
            self.skip(len, what)?;
        } else {
            let element = self.value_type(what)?;
            let count = self.u64(what)?;
            // Every element has at least one byte (a string eight): no count passes the file.
            match element.size() {
                Some(size) => {
                    let bytes = count.checked_mul(size as u64).ok_or_else(|| {
                        self.error(format_args!("{what} claims {count} elements"))
                    })?;
                    self.skip(bytes, what)?;
                }
                None if element == ValueType::String => {
                    for _ in 0..count {
                        let len = self.u64(what)?;
                        self.skip(len, what)?;
                    }
                }
                None => {
                    return Err(self.error(format_args!(
                        "{what} is an array of arrays, which no known file uses"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Checks the header of `bytes` and says where everything is.
pub(super) fn read_header(file: &str, bytes: &[u8]) -> Result<Header> {
    let mut c = Cursor { file, bytes, at: 0 };
    let magic = c.take::<4>("the magic number")?;
    if &magic != b"GGUF" {
        let shown: String =
            magic.iter().map(|&b| if b.is_ascii_graphic() { b as char } else { '.' }).collect();
        return Err(Error::format(
            file,
            format!("is not a GGUF file: it starts with {shown:?} instead of \"GGUF\""),
        ));
    }
    let version = c.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => {
            return Err(Error::unsupported(
                file,
                "is GGUF version 1; versions 2 and 3 are read: convert it again with a current tool",
            ));
        }
        v if matches!(v.swap_bytes(), 1..=3) => {
            return Err(Error::unsupported(
                file,
                "is a big-endian GGUF file; only little-endian files are read",
            ));
        }
        v => {
            return Err(Error::unsupported(
                file,
                format!("is GGUF version {v}; versions 2 and 3 are read"),
            ));
        }
    }
    let tensor_count = c.u64("the tensor count")?;
    let metadata_count = c.u64("the metadata count")?;
    for (count, what) in [(tensor_count, "tensors"), (metadata_count, "metadata entries")] {
        if count > MAX_ENTRIES {
            return Err(c.error(format_args!(
                "the header claims {count} {what}; at most {MAX_ENTRIES} are allowed"
            )));
        }
    }

    // Capacities grow with what is really there, not with what is claimed.
    let mut metadata = Vec::new();
    let mut alignment = 32;
    let mut seen = HashSet::new();
    for i in 0..metadata_count {
        let (key, text) = c.name(&format!("the key of metadata entry {i}"))?;
        if !seen.insert(text) {
            return Err(c.error(format_args!("metadata `{text}` appears twice")));
        }
        let what = format!("metadata `{text}`");
        let kind = c.value_type(&what)?;
        let start = c.at;
        c.value(kind, &what)?;
        let entry = Entry { key, kind, value: start..c.at };
        if text == "general.alignment" {
            alignment = entry
                .value(bytes)
                .as_u64()
                .filter(|a| a.is_power_of_two() && (8..=1 << 20).contains(a))
                .ok_or_else(|| {
                    c.error("`general.alignment` is not a power of two between 8 and 1048576")
                })?;
        }
        metadata.push(entry);
    }

    let mut tensors = Vec::new();
    seen.clear();
    for i in 0..tensor_count {
        let (name, text) = c.name(&format!("the name of tensor {i}"))?;
        if !seen.insert(text) {
            return Err(c.error(format_args!("tensor `{text}` appears twice")));
        }
        tensors.push((tensor_info(&mut c, name, text)?, text));
    }

    let data_offset = (c.at as u64).next_multiple_of(alignment);
    let available = (bytes.len() as u64).saturating_sub(data_offset);
    let mut checked = Vec::with_capacity(tensors.len());
    for ((mut info, offset, size), name) in tensors {
        if offset % alignment != 0 {
            return Err(Error::format(
                file,
                format!(
                    "tensor `{name}`: offset {offset} is not a multiple of the alignment {alignment}"
                ),
            ));
        }
        let end = offset.checked_add(size).filter(|&end| end <= available).ok_or_else(|| {
            Error::format(file, format!(
                "tensor `{name}`: its {size} bytes at offset {offset} pass the end of the file ({available} bytes of tensor data); it is cut short or damaged"
            ))
        })?;
        info.data = (data_offset + offset) as usize..(data_offset + end) as usize;
        checked.push(info);
    }
    check_overlaps(file, bytes, data_offset as usize, &checked)?;
    Ok(Header { version, alignment, data_offset, metadata, tensors: checked })
}

/// Refuses tensors that share bytes. No writer makes such files, and what is held for each tensor
/// would no longer be bounded by the file's size.
fn check_overlaps(
    file: &str,
    bytes: &[u8],
    data_offset: usize,
    tensors: &[TensorInfo],
) -> Result<()> {
    let mut in_order: Vec<&TensorInfo> = tensors.iter().collect();
    in_order.sort_unstable_by_key(|info| info.data.start);
    for pair in in_order.windows(2) {
        let [a, b] = [pair[0], pair[1]];
        if a.data.end > b.data.start {
            let [first, second] =
                [a, b].map(|info| String::from_utf8_lossy(&bytes[info.name.clone()]));
            let [from, to] = [a.data.start, a.data.end].map(|at| at - data_offset);
            return Err(Error::format(
                file,
                format!(
                    "tensors `{first}` and `{second}` overlap: the first takes the bytes {from} to \
                     {to} of the tensor data, the second begins at {}; it is damaged",
                    b.data.start - data_offset
                ),
            ));
        }
    }
    Ok(())
}

/// One tensor info: what it says, its offset, and its size in bytes.
fn tensor_info(
    c: &mut Cursor<'_>,
    name: Range<usize>,
    text: &str,
) -> Result<(TensorInfo, u64, u64)> {
    let what = format!("tensor `{text}`");
    let rank = c.u32(&what)?;
    if !(1..=4).contains(&rank) {
        return Err(c.error(format_args!("{what} has {rank} dimensions; 1 to 4 are allowed")));
    }
    let mut dims = [1; 4];
    for dim in &mut dims[..rank as usize] {
        *dim = c.u64(&what)?;
    }
    let id = c.u32(&what)?;
    let offset = c.u64(&what)?;
    let block_type = BlockType::from_id(id)
        .ok_or_else(|| c.error(format_args!("{what} has the unknown type {id}")))?;
    let shape = &dims[..rank as usize];
    let elements = shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .filter(|&n| n > 0)
        .ok_or_else(|| c.error(format_args!("{what} has the impossible shape {shape:?}")))?;
    let len = block_type.block_len() as u64;
    if dims[0] % len != 0 {
        return Err(c.error(format_args!(
            "{what}: rows of {} elements are not whole blocks of {block_type} ({len} elements)",
            dims[0]
        )));
    }
    let size = (elements / len)
        .checked_mul(block_type.block_bytes() as u64)
        .ok_or_else(|| c.error(format_args!("{what} has the impossible shape {shape:?}")))?;
    Ok((TensorInfo { part: 0, name, dims, rank: rank as u8, block_type, data: 0..0 }, offset, size))
}
