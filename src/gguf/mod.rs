//! GGUF files: opened by memory map (or read into memory), checked, and handed out as borrowed views.
//!
//! A GGUF file is untrusted. [`Gguf::open`] walks its header once, with every count, length, type
//! and offset checked against the file's size before it is used, and remembers only *where* things
//! are: metadata arrays and tensors are views into the map, so parsing a file costs a few bytes
//! per entry whatever the entries hold.
//!
//! A model may lie in several files (`split.rs`); they are opened together and read as one.
//!
//! The crate `gguf-rs` reads the same header in the tests, where it cross-checks this reader; it
//! is not the loader because it copies maps to the heap, drops value types and duplicate keys,
//! and accepts offsets past the end of the file.

pub mod quantize;
mod reader;
mod split;
pub(crate) mod store;
mod value;
mod write;

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::quant::BlockType;

pub use value::{Array, Value, ValueType};
pub use write::{OwnedValue, Writer};

/// The most tokens of a vocabulary: twice the largest that are in use. What is built for each
/// takes many times its length in the file.
pub(crate) const MAX_TOKENS: usize = 1 << 19;

/// An open GGUF file, or several that hold one model.
#[derive(Debug)]
pub struct Gguf {
    /// The files, the first of which has the metadata.
    parts: Vec<Part>,
    version: u32,
    alignment: u64,
    data_offset: u64,
    metadata: Vec<reader::Entry>,
    tensors: Vec<TensorInfo>,
    /// Metadata entries by key.
    keys: Lookup,
    /// Tensors by name.
    names: Lookup,
}

/// One file.
#[derive(Debug)]
struct Part {
    name: String,
    bytes: Bytes,
}

/// Where a file's bytes live.
#[derive(Debug)]
enum Bytes {
    Map(Mapping),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map.bytes(),
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Checks that there is something to read at a path, before it is opened: opening a FIFO would wait
/// for a writer.
fn check_file(path: &Path, wanted: &str) -> Result<()> {
    let name = path.display().to_string();
    let meta = fs::metadata(path).map_err(|source| Error::io(&name, source))?;
    let found = match () {
        () if meta.is_dir() => "a directory",
        () if !meta.is_file() => "not a regular file",
        () if meta.len() == 0 => "empty",
        () => return Ok(()),
    };
    Err(Error::format(name, format!("is {found}; {wanted} is needed")))
}

/// A file's bytes by memory map: pages are read when they are looked at.
#[derive(Debug)]
pub(crate) struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps a file, read-only. `wanted` says what kind of file it should be, for messages.
    pub(crate) fn open(path: &Path, wanted: &str) -> Result<Self> {
        check_file(path, wanted)?;
        let io = |source| Error::io(path.display().to_string(), source);
        let file = fs::File::open(path).map_err(io)?;
        // SAFETY: the map is read-only. Another process that writes to or truncates the file while
        // it is in use can change weights or raise SIGBUS, as for every program that maps its
        // input ([`Gguf::read`] does not); nothing read through the map is relied on for memory
        // safety after its bounds were checked against the map's own length.
        unsafe { memmap2::Mmap::map(&file) }.map(Mapping).map_err(io)
    }

    /// All of them.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Says that the pages of `part` are not needed soon; what is no part of the map is ignored.
    pub(crate) fn release(&self, part: &[u8]) {
        #[cfg(unix)]
        {
            let Some(start) = (part.as_ptr() as usize).checked_sub(self.0.as_ptr() as usize) else {
                return;
            };
            if start + part.len() > self.0.len() {
                return;
            }
            // SAFETY: the map is a private, read-only map of a file and is never written
            // through, so dropped pages come back from the file with the same bytes.
            let _ = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, part.len())
            };
        }
        #[cfg(not(unix))]
        let _ = part;
    }
}

/// Numbers of things that are looked up by their names, which stay where they are: in the file.
#[derive(Debug, Default)]
struct Lookup {
    numbers: HashTable<u32>,
    /// Not the same in each process, so that no file can be made to be slow.
    state: RandomState,
}

impl Lookup {
    /// Of so many things, and the number of the first that has the name of an earlier one.
    fn of<'a>(count: usize, name_of: &dyn Fn(u32) -> &'a str) -> (Self, Option<u32>) {
        let state = RandomState::new();
        let hash = |i: &u32| state.hash_one(name_of(*i));
        let mut numbers = HashTable::with_capacity(count);
        let mut again = None;
        for i in 0..count as u32 {
            let name = name_of(i);
            match numbers.entry(state.hash_one(name), |other| name_of(*other) == name, hash) {
                Entry::Vacant(place) => drop(place.insert(i)),
                Entry::Occupied(_) => again = again.or(Some(i)),
            }
        }
        (Lookup { numbers, state }, again)
    }

    fn find<'a>(&self, name: &str, name_of: impl Fn(u32) -> &'a str) -> Option<u32> {
        self.numbers.find(self.state.hash_one(name), |i| name_of(*i) == name).copied()
    }
}

/// What the header says of one tensor, with the range of its bytes already checked.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// The file that has it, by number.
    part: usize,
    name: Range<usize>,
    dims: [u64; 4],
    rank: u8,
    block_type: BlockType,
    data: Range<usize>,
}

/// A tensor as a view into its file.
///
/// A matrix of `rows` x `cols` weights lies row by row; a row is a whole number of blocks of
/// [`Tensor::block_type`]. A vector has one row.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// The file that it comes from, for messages.
    pub file: &'a str,
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// Elements in a row (GGUF's first dimension).
    pub cols: usize,
    /// Rows (the product of the other dimensions).
    pub rows: usize,
    /// How its elements are stored.
    pub block_type: BlockType,
    /// The stored blocks, `rows * row_bytes()` of them.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Bytes in one row.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.block_type.block_len() * self.block_type.block_bytes()
    }

    /// The blocks of one row.
    ///
    /// # Panics
    /// If `row` is not below `rows`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let n = self.row_bytes();
        &self.bytes[row * n..(row + 1) * n]
    }
}

impl Gguf {
    /// Opens a file and checks its header. Of a model in several files the first is to be given
    /// (`NAME-00001-of-00003.gguf`); the others are looked for beside it.
    ///
    /// # Errors
    /// The file cannot be read, is not GGUF, or its header does not hold together; another part of
    /// the model is missing or does not belong to it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_as(path.as_ref(), &|path| {
            let map = Mapping::open(path, "a GGUF file")?;
            Self::parse(path.display().to_string(), Bytes::Map(map))
        })
    }

    /// The same, but reads the file into memory instead of mapping it. A mapped file that another
    /// process cuts short ends this one (SIGBUS); one that was read does not matter any more. It
    /// takes the size of the file in memory, beside what a backend makes of the weights.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_as(path.as_ref(), &|path| {
            check_file(path, "a GGUF file")?;
            let name = path.display().to_string();
            let bytes = fs::read(path).map_err(|e| Error::io(&name, e))?;
            Self::parse(name, Bytes::Owned(bytes))
        })
    }

    fn open_as(path: &Path, open_one: &dyn Fn(&Path) -> Result<Self>) -> Result<Self> {
        let first = open_one(path)?;
        match split::Place::of(&first)? {
            None => Ok(first),
            Some(place) => split::join(first, &place, path, open_one),
        }
    }

    /// Reads a file that is part of the program.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_static(name: impl Into<String>, bytes: &'static [u8]) -> Result<Self> {
        Self::parse(name.into(), Bytes::Static(bytes))?.whole()
    }

    /// Reads a file that is in memory.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_vec(name: impl Into<String>, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(name.into(), Bytes::Owned(bytes))?.whole()
    }

    /// Refuses what is only a part of a model: in memory there is nowhere to look for the others.
    fn whole(self) -> Result<Self> {
        match split::Place::of(&self)? {
            None => Ok(self),
            Some(place) => Err(Error::unsupported(
                self.name(),
                format!("is one of the {} parts of a model; open it by its path", place.count),
            )),
        }
    }

    fn parse(name: String, bytes: Bytes) -> Result<Self> {
        let header = reader::read_header(&name, bytes.as_slice())?;
        let key_of = |i: u32| header.metadata[i as usize].key(bytes.as_slice());
        // (The reader has found all keys and names different.)
        let (keys, _) = Lookup::of(header.metadata.len(), &key_of);
        let mut file = Gguf {
            parts: vec![Part { name, bytes }],
            version: header.version,
            alignment: header.alignment,
            data_offset: header.data_offset,
            metadata: header.metadata,
            tensors: header.tensors,
            keys,
            names: Lookup::default(),
        };
        file.index_names();
        Ok(file)
    }

    /// Makes tensors known by their names, as is to be done whenever there are others. Returns the
    /// number of the first that has the name of an earlier one.
    fn index_names(&mut self) -> Option<u32> {
        let name_of = |i: u32| self.tensor_name(&self.tensors[i as usize]);
        let (names, again) = Lookup::of(self.tensors.len(), &name_of);
        self.names = names;
        again
    }

    /// The first file's bytes, which hold the metadata.
    fn bytes(&self) -> &[u8] {
        self.parts[0].bytes.as_slice()
    }

    /// The path or name that the file was opened under.
    pub fn name(&self) -> &str {
        &self.parts[0].name
    }

    /// The names of the files that the model lies in: one, unless it is split.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &str> {
        self.parts.iter().map(|part| part.name.as_str())
    }

    /// GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of tensor data in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Where tensor data begins, in bytes from the file's start: the size of the header.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Size of the file in bytes, or of all files together.
    pub fn file_len(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.as_slice().len()).sum()
    }

    /// Metadata in the file's order.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, Value<'_>)> {
        let bytes = self.bytes();
        self.metadata.iter().map(move |e| (e.key(bytes), e.value(bytes)))
    }

    /// The value of `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let bytes = self.bytes();
        let entry = |i: u32| &self.metadata[i as usize];
        self.keys.find(key, |i| entry(i).key(bytes)).map(|i| entry(i).value(bytes))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        take: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.value_type();
        match take(value) {
            Some(taken) => Ok(Some(taken)),
            None => Err(Error::format(
                self.name(),
                format!("metadata `{key}` is {value} ({found}); {wanted} is needed"),
            )),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// The key holds something else, or invalid UTF-8.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a UTF-8 string", |v| v.as_str())
    }

    /// A whole number that is not negative, stored in any integer type.
    ///
    /// # Errors
    /// The key holds something else.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number >= 0", |v| v.as_u64())
    }

    /// A number, stored in any numeric type.
    ///
    /// # Errors
    /// The key holds something else.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a number", |v| v.as_f64().map(|x| x as f32))
    }

    /// A truth value.
    ///
    /// # Errors
    /// The key holds something else.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |v| v.as_bool())
    }

    /// An array.
    ///
    /// # Errors
    /// The key holds something else.
    pub fn get_array(&self, key: &str) -> Result<Option<Array<'_>>> {
        self.typed(key, "an array", |v| v.as_array())
    }

    /// The error for a key that must be there and is not.
    pub fn missing(&self, key: &str) -> Error {
        Error::format(self.name(), format!("metadata `{key}` is missing"))
    }

    /// Tensors in the file's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.tensors.iter().map(|info| self.view(info))
    }

    /// The dimensions of every tensor as the file states them, in the file's order.
    pub fn dims(&self) -> impl ExactSizeIterator<Item = &[u64]> {
        self.tensors.iter().map(|info| &info.dims[..info.rank as usize])
    }

    /// The tensor called `name`, if the file has it.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.index(name).map(|index| self.view(&self.tensors[index]))
    }

    /// The number of the tensor called `name`.
    fn index(&self, name: &str) -> Option<usize> {
        let name_of = |i: u32| self.tensor_name(&self.tensors[i as usize]);
        self.names.find(name, name_of).map(|i| i as usize)
    }

    fn tensor_name(&self, info: &TensorInfo) -> &str {
        let bytes = self.parts[info.part].bytes.as_slice();
        // The reader has checked that names are UTF-8.
        std::str::from_utf8(&bytes[info.name.clone()]).unwrap_or_default()
    }

    fn view(&self, info: &TensorInfo) -> Tensor<'_> {
        let Part { name, bytes } = &self.parts[info.part];
        Tensor {
            file: name,
            name: self.tensor_name(info),
            cols: info.dims[0] as usize,
            rows: info.dims[1..].iter().product::<u64>() as usize,
            block_type: info.block_type,
            bytes: &bytes.as_slice()[info.data.clone()],
        }
    }

    /// A hash (XXH3, 128 bits) of what makes a model this model: its architecture's metadata and
    /// its vocabulary, and names, types, dimensions and *all* bytes of its tensors. Names of the
    /// file and of the model, licences and the like are not part of it.
    ///
    /// It reads the file once, about as fast as memory can be read.
    pub fn digest(&self) -> u128 {
        let mut hash = Xxh3::new();
        let mut put = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        let bytes = self.bytes();
        let architecture = self.get_str("general.architecture").ok().flatten().unwrap_or_default();
        let matters = |key: &str| {
            let part = key.split('.').next().unwrap_or_default();
            key == "general.architecture" || part == architecture || part == "tokenizer"
        };
        for entry in self.metadata.iter().filter(|entry| matters(entry.key(bytes))) {
            put(entry.key(bytes).as_bytes());
            put(entry.bytes(bytes));
        }
        for (info, tensor) in self.tensors.iter().zip(self.tensors()) {
            put(tensor.name.as_bytes());
            put(tensor.block_type.to_string().as_bytes());
            info.dims.iter().for_each(|dim| put(&dim.to_le_bytes()));
            put(tensor.bytes);
            // An executor has its own form of most of it.
            self.release(&tensor);
        }
        hash.digest128()
    }

    /// Tells the system that a tensor's mapped pages are not needed soon, so that a weight that an
    /// executor has copied does not count twice in memory. Reading it again reads the file again.
    pub fn release(&self, tensor: &Tensor<'_>) {
        self.release_bytes(tensor.bytes);
    }

    /// The same for a part of a file's bytes.
    pub(crate) fn release_bytes(&self, bytes: &[u8]) {
        for part in &self.parts {
            if let Bytes::Map(map) = &part.bytes {
                map.release(bytes);
            }
        }
    }
}

/// A tensor, or some of its rows, that keeps its file open: what an executor holds to weights that it does not
/// copy.
#[derive(Debug, Clone)]
pub struct SharedTensor {
    file: Arc<Gguf>,
    index: usize,
    extent: Extent,
}

/// Which part of a tensor is meant.
#[derive(Debug, Clone)]
enum Extent {
    Whole,
    Rows(Range<usize>),
    /// Elements of a vector of floats.
    Elements(Range<usize>),
}

impl SharedTensor {
    /// The tensor called `name`, if `file` has it.
    pub fn find(file: &Arc<Gguf>, name: &str) -> Option<Self> {
        file.index(name).map(|index| SharedTensor {
            file: file.clone(),
            index,
            extent: Extent::Whole,
        })
    }

    /// Some rows of it, counted from its first: such as the keys of a matrix that makes queries, keys and values.
    ///
    /// # Errors
    /// [`Error::Format`] if it has fewer rows.
    pub fn slice(&self, rows: Range<usize>) -> Result<Self> {
        let view = self.view();
        if rows.start > rows.end || rows.end > view.rows {
            let what = format!("tensor `{}` has {} rows, not rows {rows:?}", view.name, view.rows);
            return Err(Error::format(view.file, what));
        }
        let first = if let Extent::Rows(rows) = &self.extent { rows.start } else { 0 };
        let extent = Extent::Rows(first + rows.start..first + rows.end);
        Ok(SharedTensor { file: self.file.clone(), index: self.index, extent })
    }

    /// Some numbers of a vector of floats, such as the biases of keys.
    ///
    /// # Errors
    /// [`Error::Format`] if it has fewer; [`Error::Unsupported`] if it is quantized.
    pub fn elements(&self, elements: Range<usize>) -> Result<Self> {
        let view = self.view();
        if view.block_type.block_len() != 1 {
            let what =
                format!("tensor `{}` has the type {}, not floats", view.name, view.block_type);
            return Err(Error::unsupported(view.file, what));
        }
        if view.rows != 1 || elements.start > elements.end || elements.end > view.cols {
            let what = format!("tensor `{}` has no numbers {elements:?}", view.name);
            return Err(Error::format(view.file, what));
        }
        let first = if let Extent::Elements(all) = &self.extent { all.start } else { 0 };
        let extent = Extent::Elements(first + elements.start..first + elements.end);
        Ok(SharedTensor { file: self.file.clone(), index: self.index, extent })
    }

    /// The tensor.
    pub fn view(&self) -> Tensor<'_> {
        let whole = self.file.view(&self.file.tensors[self.index]);
        match &self.extent {
            Extent::Whole => whole,
            Extent::Rows(rows) => {
                let n = whole.row_bytes();
                let bytes = &whole.bytes[rows.start * n..rows.end * n];
                Tensor { rows: rows.len(), bytes, ..whole }
            }
            Extent::Elements(elements) => {
                let n = whole.block_type.block_bytes();
                let bytes = &whole.bytes[elements.start * n..elements.end * n];
                Tensor { cols: elements.len(), bytes, ..whole }
            }
        }
    }

    /// Says that its mapped pages are not needed soon: see [`Gguf::release`].
    pub fn release(&self) {
        self.file.release(&self.view());
    }
}
