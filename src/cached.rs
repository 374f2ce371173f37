//! Files that can be made again: where they are kept, under what key, and how they are written.

use std::io::{self, Result, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::error::Error;
use crate::files::OutputFile;

/// The folder for such files: the one that the environment variable `MTAD_CACHE_DIR` names, or else
/// `mtad` below the system's. None where the system does not say.
pub fn folder() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(own) = named("MTAD_CACHE_DIR") {
        return Some(own);
    }
    let caches = match std::env::consts::OS {
        "windows" => named("LOCALAPPDATA"),
        "macos" => named("HOME").map(|home| home.join("Library/Caches")),
        _ => named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache"))),
    };
    caches.map(|folder| folder.join("mtad"))
}

/// Writes a file, and the folder that it is in. Another run never sees half of it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let written = OutputFile::create_regular(path).and_then(|mut out| {
        out.write_all(bytes).map_err(|e| out.error(e))?;
        out.finish()
    });
    written.map_err(|error| match error {
        Error::Io { source, .. } => source,
        other => io::Error::other(other.to_string()),
    })
}

/// A key of things on disk: the same in every version, build and run of the program, as the standard
/// library's hashes are not. XXH3 with 64 bits of fields, each of them behind its length.
pub struct Key(Xxh3);

impl Key {
    /// The key of nothing yet; `of` tells kinds of things apart.
    pub fn new(of: &str) -> Self {
        Key(Xxh3::new()).text(of)
    }

    /// With bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// With a text.
    pub fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes())
    }

    /// With a number.
    pub fn number(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    /// 16 digits.
    pub fn finish(self) -> String {
        format!("{:016x}", self.0.digest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::faults;

    #[test]
    fn keys_are_those_of_every_other_build() {
        // Made by another program with the reference library of XXH3.
        assert_eq!(Key::new("costs").finish(), "b73ad918825815ba");
        assert_eq!(Key::new("costs").text("model.gguf").number(7).finish(), "96b405c49b740560");
        assert_eq!(Key::new("costs").text("a").text("bc").finish(), "a47375c891ddc1f9");
        assert_ne!(Key::new("costs").text("ab").text("c").finish(), "a47375c891ddc1f9");
    }

    #[test]
    fn what_was_kept_survives_every_failure() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        std::fs::write(&path, "old").unwrap();
        let work = || write(&path, b"new");
        faults::at_every_request(work, |_| assert_eq!(std::fs::read(&path).unwrap(), b"old"));
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn files_are_written_whole_and_folders_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/at/once.bin");
        for bytes in [&b"first"[..], b"second"] {
            write(&path, bytes).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
        // A file where a folder would have to be.
        assert!(write(&path.join("below"), b"").is_err());
    }
}
