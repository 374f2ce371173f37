//! Files that can be made again: where they are kept, and how they are written.

use std::io::Result;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

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

/// Writes a file, and the folder that it is in: beside its place and moved there, so that another run
/// never sees half of it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let part = path.with_extension(format!("{}-{number}.part", std::process::id()));
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path)).inspect_err(|_| {
        let _ = std::fs::remove_file(&part);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
