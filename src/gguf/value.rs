//! Metadata values, borrowed from the file.

use std::fmt;

/// The type of a metadata value, with the number that GGUF gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with GGUF's number `id`.
    pub fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        const ALL: [ValueType; 13] =
            [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        ALL.get(id as usize).copied()
    }

    /// Bytes of one value; none for strings and arrays, which carry their length.
    pub fn size(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        })
    }
}

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// UTF-8 by the format's rule; bytes here because files break it.
    String(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Little-endian bytes to a number; `bytes` must hold at least `N`.
fn head<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

impl<'a> Value<'a> {
    /// Reads a value whose bytes were checked by the header's walk.
    pub(super) fn read(kind: ValueType, bytes: &'a [u8]) -> Self {
        match kind {
            ValueType::U8 => Value::U8(bytes[0]),
            ValueType::I8 => Value::I8(bytes[0] as i8),
            ValueType::U16 => Value::U16(u16::from_le_bytes(head(bytes))),
            ValueType::I16 => Value::I16(i16::from_le_bytes(head(bytes))),
            ValueType::U32 => Value::U32(u32::from_le_bytes(head(bytes))),
            ValueType::I32 => Value::I32(i32::from_le_bytes(head(bytes))),
            ValueType::F32 => Value::F32(f32::from_le_bytes(head(bytes))),
            ValueType::Bool => Value::Bool(bytes[0] != 0),
            ValueType::String => {
                let len = u64::from_le_bytes(head(bytes)) as usize;
                Value::String(&bytes[8..8 + len])
            }
            ValueType::Array => {
                let id = u32::from_le_bytes(head(bytes));
                let len = u64::from_le_bytes(head(&bytes[4..])) as usize;
                // The walk refuses arrays of unknown types and of arrays.
                let kind = ValueType::from_id(id).unwrap_or(ValueType::U8);
                Value::Array(Array { kind, len, bytes: &bytes[12..] })
            }
            ValueType::U64 => Value::U64(u64::from_le_bytes(head(bytes))),
            ValueType::I64 => Value::I64(i64::from_le_bytes(head(bytes))),
            ValueType::F64 => Value::F64(f64::from_le_bytes(head(bytes))),
        }
    }

    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The whole number that it holds, whatever its width.
    pub fn as_i128(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(x) => x.into(),
            Value::I8(x) => x.into(),
            Value::U16(x) => x.into(),
            Value::I16(x) => x.into(),
            Value::U32(x) => x.into(),
            Value::I32(x) => x.into(),
            Value::U64(x) => x.into(),
            Value::I64(x) => x.into(),
            _ => return None,
        })
    }

    /// A whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        self.as_i128().and_then(|x| u64::try_from(x).ok())
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            _ => self.as_i128().map(|x| x as f64),
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(x) => Some(x),
            _ => None,
        }
    }

    /// A string, if it is valid UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Value::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}

/// Long strings and arrays are shortened: this is for people.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::F32(x) => write!(f, "{x}"),
            Value::F64(x) => write!(f, "{x}"),
            Value::Bool(x) => write!(f, "{x}"),
            Value::String(bytes) => {
                const SHOWN: usize = 72;
                let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * SHOWN)]);
                let mut shown: String = text.chars().take(SHOWN).collect();
                if shown.len() < bytes.len() {
                    shown.push('…');
                }
                write!(f, "{shown:?}")
            }
            Value::Array(array) => {
                write!(f, "[")?;
                for (i, value) in array.iter().take(4).enumerate() {
                    write!(f, "{}{value}", if i == 0 { "" } else { ", " })?;
                }
                let more = if array.len() > 4 { ", …" } else { "" };
                write!(f, "{more}] ({} x {})", array.len(), array.value_type())
            }
            _ => write!(f, "{}", self.as_i128().unwrap_or_default()),
        }
    }
}

/// A metadata array: a view that decodes its elements as they are asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    kind: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The type of every element.
    pub fn value_type(&self) -> ValueType {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let Array { kind, len, mut bytes } = *self;
        (0..len).map(move |_| {
            let value = Value::read(kind, bytes);
            let size = match value {
                Value::String(s) => 8 + s.len(),
                _ => kind.size().unwrap_or(0),
            };
            bytes = &bytes[size..];
            value
        })
    }
}
