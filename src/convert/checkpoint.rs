//! A checkpoint's weights: safetensors files, one or several, mapped and checked.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::json::Object;
use crate::error::{Error, Result};
use crate::gguf::Mapping;
use crate::quant::BlockType;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The longest header that the format allows.
const MAX_HEADER: usize = 100_000_000;

/// All tensors of a folder.
pub(super) struct Checkpoint {
    /// The file, or the index of several.
    name: String,
    files: Vec<Shard>,
    /// Where each tensor lies.
    tensors: BTreeMap<String, Place>,
}

struct Shard {
    path: PathBuf,
    name: String,
    map: Mapping,
}

/// (file, type, shape, bytes from the file's start)
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: std::ops::Range<usize>,
}

/// A tensor as a view into its file.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// The file, for messages.
    pub file: &'a str,
    /// Its name there.
    pub name: &'a str,
    /// Its elements' type.
    pub dtype: Dtype,
    /// Its dimensions, the rows' length last.
    pub shape: &'a [usize],
    /// Its elements, row by row.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens the folder's safetensors files and checks that they hold together.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut checkpoint =
            Checkpoint { name: String::new(), files: Vec::new(), tensors: BTreeMap::new() };
        let single = folder.join(SINGLE);
        if single.exists() {
            checkpoint.name = single.display().to_string();
            checkpoint.add(&single)?;
            return Ok(checkpoint);
        }
        let Some(index) = Object::read(&folder.join(INDEX))? else {
            return Err(no_weights(folder));
        };
        checkpoint.name = index.file().to_owned();
        let map = index.object("weight_map")?;
        let map = map.ok_or_else(|| index.wrong("weight_map", "an object of file names"))?;
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in map.iter() {
            let name = file.as_str().filter(|name| is_plain(name));
            let name = name.ok_or_else(|| map.wrong(tensor, "the name of a file beside it"))?;
            by_shard.entry(name).or_default().push(tensor);
        }
        if by_shard.is_empty() {
            return Err(index.wrong("weight_map", "the file of at least one tensor"));
        }
        for (shard, tensors) in by_shard {
            let path = folder.join(shard);
            if !path.exists() {
                let what = format!(
                    "names the file `{shard}` for `{}`{}, which is not there; it has to lie beside \
                     this one (was the download cut off?)",
                    tensors[0],
                    match tensors.len() {
                        1 => String::new(),
                        n => format!(" and {} others", n - 1),
                    }
                );
                return Err(Error::format(index.file(), what));
            }
            checkpoint.add(&path)?;
            let at = checkpoint.files.len() - 1;
            for tensor in tensors {
                if checkpoint.tensors.get(tensor).is_none_or(|place| place.file != at) {
                    let what = format!("has no tensor `{tensor}`, which {INDEX} says it has");
                    return Err(Error::format(path.display().to_string(), what));
                }
            }
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let name = path.display().to_string();
        let map = Mapping::open(path, "a safetensors file")?;
        let bytes = map.bytes();
        let (data, metadata) = read_header(bytes).map_err(|what| Error::format(&name, what))?;
        for (tensor, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let place = Place {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: data + start..data + end,
            };
            if let Some(other) = self.tensors.insert(tensor.clone(), place) {
                let other = &self.files[other.file].name;
                let what = format!("has the tensor `{tensor}`, and so has {other}");
                return Err(Error::format(name, what));
            }
        }
        self.files.push(Shard { path: path.to_owned(), name, map });
        Ok(())
    }

    /// The file, or the index of several, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<View<'_>> {
        let (name, place) = self.tensors.get_key_value(name)?;
        let shard = &self.files[place.file];
        Some(View {
            file: &shard.name,
            name,
            dtype: place.dtype,
            shape: &place.shape,
            bytes: &shard.map.bytes()[place.bytes.clone()],
        })
    }

    /// The type that most of the weights have, among those that are read.
    pub fn main_type(&self) -> BlockType {
        let mut bytes = HashMap::new();
        for place in self.tensors.values() {
            if let Some(block_type) = block_type(place.dtype) {
                *bytes.entry(block_type).or_insert(0) += place.bytes.len();
            }
        }
        let most = bytes.into_iter().max_by_key(|(block_type, bytes)| (*bytes, block_type.id()));
        most.map_or(BlockType::F32, |(block_type, _)| block_type)
    }

    /// Its files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Bytes of its files.
    pub fn len(&self) -> u64 {
        self.files.iter().map(|file| file.map.bytes().len() as u64).sum()
    }

    /// Says that some bytes of a tensor are not needed soon.
    pub fn release(&self, part: &[u8]) {
        self.files.iter().for_each(|file| file.map.release(part));
    }
}

/// The GGUF type with the same elements.
pub(super) fn block_type(dtype: Dtype) -> Option<BlockType> {
    match dtype {
        Dtype::F32 => Some(BlockType::F32),
        Dtype::F16 => Some(BlockType::F16),
        Dtype::BF16 => Some(BlockType::BF16),
        _ => None,
    }
}

/// Whether a name is one of a file in the same folder.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

fn no_weights(folder: &Path) -> Error {
    let name = folder.display().to_string();
    let pickles =
        ["pytorch_model.bin", "pytorch_model.bin.index.json"].map(|file| folder.join(file));
    match pickles.iter().any(|file| file.exists()) {
        true => Error::unsupported(
            name,
            format!(
                "has its weights in Python's own format (pytorch_model.bin), which is not read; \
                 save them as safetensors ({SINGLE})"
            ),
        ),
        false => Error::format(name, format!("has neither {SINGLE} nor {INDEX}")),
    }
}

/// The header of a safetensors file, and where the tensors' bytes begin. The crate's own reader of
/// whole files adds sizes without a check, so the file's end is compared here.
fn read_header(bytes: &[u8]) -> std::result::Result<(usize, Metadata), String> {
    let len = bytes.len();
    let (head, rest) = bytes
        .split_first_chunk()
        .ok_or_else(|| format!("has {len} bytes; no safetensors file is so short"))?;
    let header_len = u64::from_le_bytes(*head);
    let header = usize::try_from(header_len)
        .ok()
        .filter(|&n| n <= MAX_HEADER)
        .and_then(|n| rest.get(..n))
        .ok_or_else(|| {
            format!(
                "is no safetensors file or is cut short: its header should take {header_len} \
                 bytes, and the file has {len}"
            )
        })?;
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| format!("its header is no sound safetensors header: {error}"))?;
    let start = head.len() + header.len();
    match start.checked_add(metadata.data_len()) {
        Some(end) if end == len => Ok((start, metadata)),
        end => Err(format!(
            "its tensors end at byte {}, and the file has {len}; it is cut short or damaged",
            end.map_or("2^64 or more".to_owned(), |end| end.to_string())
        )),
    }
}
