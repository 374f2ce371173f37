//! Models in several files: `NAME-00001-of-00003.gguf` and so on, as llama.cpp's `gguf-split` writes
//! them. The first has the metadata, each some of the tensors.

use std::path::{Path, PathBuf};

use super::Gguf;
use crate::error::{Error, Result};

/// More parts than this mean a damaged count.
const MAX_PARTS: u64 = 9999;

/// Which part of a model a file is.
pub(super) struct Place {
    /// From 0 on.
    pub number: u64,
    pub count: u64,
}

impl Place {
    /// What a file says; `None` if it is a whole model.
    pub fn of(file: &Gguf) -> Result<Option<Place>> {
        let count = file.get_u64("split.count")?.unwrap_or(1);
        let number = file.get_u64("split.no")?.unwrap_or(0);
        if count > MAX_PARTS || number >= count.max(1) {
            let what = format!(
                "claims to be part {number} (counted from 0) of {count} (`split.no`, \
                 `split.count`), which no part can be; it is damaged"
            );
            return Err(Error::format(file.name(), what));
        }
        Ok((count > 1).then_some(Place { number, count }))
    }
}

/// The paths of all parts, from the path of one.
fn paths(path: &Path, place: &Place) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?;
    let ending = |number: u64| format!("-{:05}-of-{:05}.gguf", number + 1, place.count);
    let stem = name.strip_suffix(&ending(place.number))?;
    let part = |number| path.with_file_name(format!("{stem}{}", ending(number)));
    Some((0..place.count).map(part).collect())
}

/// Opens the other parts of a model, whose first is open, and joins them to it.
pub(super) fn join(
    mut first: Gguf,
    place: &Place,
    path: &Path,
    open_one: &dyn Fn(&Path) -> Result<Gguf>,
) -> Result<Gguf> {
    let (number, count) = (place.number + 1, place.count);
    let Some(paths) = paths(path, place) else {
        return Err(Error::format(
            first.name(),
            format!(
                "is part {number} of {count} of a model and its name does not end in \
                 `-{number:05}-of-{count:05}.gguf`, so the other parts cannot be found; give all \
                 of them the names that they came with"
            ),
        ));
    };
    if place.number != 0 {
        let what = format!(
            "is part {number} of {count} of a model; give the first, {}",
            paths[0].display()
        );
        return Err(Error::format(first.name(), what));
    }
    for (number, path) in (0..).zip(&paths).skip(1) {
        let part = match open_one(path) {
            Err(Error::Io { path: missing, source }) => {
                let what = format!(
                    "its part {missing} cannot be read ({source}); all {count} have to lie in one \
                     folder"
                );
                return Err(Error::format(first.name(), what));
            }
            opened => opened?,
        };
        let is_next = Place::of(&part)?.is_some_and(|p| (p.number, p.count) == (number, count));
        // All parts state how many tensors there are together.
        let tensors = |file: &Gguf| file.get_u64("split.tensors.count");
        let is_same = match (tensors(&first)?, tensors(&part)?) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        };
        if !is_next || !is_same {
            let what = format!(
                "is not part {} of {count} of the model in {}; the part of that model has to be \
                 in its place",
                number + 1,
                first.name()
            );
            return Err(Error::format(part.name(), what));
        }
        let at = first.parts.len();
        first.parts.extend(part.parts);
        first.tensors.extend(part.tensors.into_iter().map(|mut info| {
            info.part = at;
            info
        }));
    }
    let found = first.tensors.len() as u64;
    if let Some(claimed) = first.get_u64("split.tensors.count")?
        && claimed != found
    {
        let what = format!(
            "its {count} parts have {found} tensors together, and {claimed} are stated \
             (`split.tensors.count`); a part is damaged or of another model"
        );
        return Err(Error::format(first.name(), what));
    }
    if let Some(again) = first.index_names() {
        let tensor = first.view(&first.tensors[again as usize]);
        let what = format!(
            "tensor `{}` is in another part of the model, too; one of the two is of another model",
            tensor.name
        );
        return Err(Error::format(tensor.file, what));
    }
    Ok(first)
}
