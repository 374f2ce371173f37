//! Compiled shaders on disk: a later run need not compile them again.
//!
//! Many drivers keep such files themselves; others leave it to programs. There is one file for each device,
//! driver and text of the shaders, in the folder of [`crate::cached`]. Whatever goes wrong with it, shaders are
//! compiled as if there were none. Drivers run what such a file holds, so nobody else may have written it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use super::adapter::Adapter;
use super::kernels;
use crate::cached;

/// Files that have grown beyond so many bytes, by shaders of versions that are gone, are begun anew.
const MOST_BYTES: usize = 64 << 20;

/// Bytes of the checksum that a file begins with.
const CHECKSUM: usize = 8;

/// The compiled shaders of a device.
#[derive(Debug, Default)]
pub(super) struct Pipelines {
    path: PathBuf,
    /// None where the interface has no such thing, or there is no place for a file.
    cache: Option<wgpu::PipelineCache>,
    /// Whether shaders were compiled since the file was read.
    added: AtomicBool,
}

impl Pipelines {
    /// What a device asks for, so that they can be kept.
    pub const FEATURE: wgpu::Features = wgpu::Features::PIPELINE_CACHE;

    /// Those of a device that was opened with [`Pipelines::FEATURE`] if the adapter has it.
    pub fn open(device: &wgpu::Device, adapter: &Adapter) -> Self {
        if !device.features().contains(Self::FEATURE) {
            return Pipelines::default();
        }
        let Some(folder) = cached::folder() else {
            return Pipelines::default();
        };
        // Drivers do not know what others wrote, and may trust what they wrote themselves.
        let text = format!("{:016x}", xxh3_64(kernels::all_text().as_bytes()));
        let made_by =
            [adapter.name(), &adapter.driver(), env!("CARGO_PKG_VERSION"), &text].join("\n");
        let path = folder.join(format!("shaders-{:016x}.bin", xxh3_64(made_by.as_bytes())));
        let data = read(&path);
        let descriptor = wgpu::PipelineCacheDescriptor {
            label: None,
            data: data.as_deref(),
            // (Where the driver does not like the data, the cache is empty.)
            fallback: true,
        };
        // SAFETY: the data must be what `get_data` gave. They are from a file that only this user's `save`
        // writes, of this device, driver and text by its name, and unchanged by its checksum; wgpu checks its
        // own header and the driver's besides.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Pipelines { path, cache: Some(cache), added: AtomicBool::new(false) }
    }

    /// What shaders are to be compiled with. Remembers that one was.
    pub fn cache(&self) -> Option<&wgpu::PipelineCache> {
        self.added.store(true, Ordering::Relaxed);
        self.cache.as_ref()
    }

    /// Writes the file, if there is something new.
    pub fn save(&self) {
        if !self.added.swap(false, Ordering::Relaxed) {
            return;
        }
        if let Some(data) = self.cache.as_ref().and_then(wgpu::PipelineCache::get_data) {
            // (It is only lost time if it cannot be written.)
            let _ = write(&self.path, &data);
        }
    }
}

/// What a file holds, if it is whole and nobody else can have written it.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut file = File::open(path).ok()?;
    if !is_own(&file) {
        return None;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let (checksum, data) = bytes.split_first_chunk::<CHECKSUM>()?;
    let is_whole = u64::from_le_bytes(*checksum) == xxh3_64(data) && data.len() <= MOST_BYTES;
    is_whole.then(|| bytes.split_off(CHECKSUM))
}

/// Whether a file belongs to the user, and nobody else may write to it.
#[cfg(unix)]
fn is_own(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let user = rustix::process::geteuid().as_raw();
    file.metadata().is_ok_and(|found| found.uid() == user && found.mode() & 0o022 == 0)
}

/// (Elsewhere folders of a user are that user's alone.)
#[cfg(not(unix))]
fn is_own(_: &File) -> bool {
    true
}

/// Writes what [`read`] reads.
fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
    cached::write(path, &[&xxh3_64(data).to_le_bytes()[..], data].concat())?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_whole_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/at/once.bin");
        assert_eq!(read(&path), None);
        write(&path, b"shaders").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"shaders"[..]));
        let whole = std::fs::read(&path).unwrap();
        for broken in [&whole[..3], &whole[..whole.len() - 1], &[&whole[..], &[0]].concat()] {
            std::fs::write(&path, broken).unwrap();
            assert_eq!(read(&path), None);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_may_write_is_none() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("once.bin");
        write(&path, b"shaders").unwrap();
        for (mode, is_read) in [(0o620, false), (0o602, false), (0o644, true), (0o600, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path).is_some(), is_read, "{mode:o}");
        }
    }
}
