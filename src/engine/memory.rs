//! Memory is known before it is taken: what weights, caches and activations need follows from their shapes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// How much memory may be taken, and how much is. Clones share it.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Bytes; none where nothing is known of the system.
    limit: Option<u64>,
    taken: Arc<AtomicU64>,
}

/// A part of a [`Budget`], given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    budget: Budget,
    bytes: u64,
}

impl Reservation {
    /// What it is a part of.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Budget {
    /// So many bytes.
    pub fn of(bytes: u64) -> Self {
        Budget { limit: Some(bytes), taken: Arc::default() }
    }

    /// What the system has free at this moment, within the limits that it sets to this process; anything where it
    /// does not tell.
    pub fn available() -> Self {
        Budget { limit: available(), taken: Arc::default() }
    }

    /// Bytes that are left; `None` for any number.
    pub fn left(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.taken.load(Ordering::Relaxed)))
    }

    /// Takes what some parts need together: each with what it is for, and its bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] with the sum if less is left.
    pub(super) fn take(&self, parts: &[(&str, u64)]) -> Result<Reservation> {
        let bytes = parts.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
        let before = self.taken.fetch_add(bytes, Ordering::Relaxed);
        let reservation = Reservation { budget: self.clone(), bytes };
        match self.limit {
            Some(limit) if before.saturating_add(bytes) > limit => {
                drop(reservation);
                let sum: Vec<_> = parts
                    .iter()
                    .filter(|(_, bytes)| *bytes > 0)
                    .map(|(what, bytes)| format!("{what} {}", Size(*bytes)))
                    .collect();
                let (sum, left) = (sum.join(" + "), Size(limit.saturating_sub(before)));
                Err(Error::no_memory(format!("{sum} (there are {left})"), bytes))
            }
            _ => Ok(reservation),
        }
    }
}

/// A number of bytes, for people.
pub struct Size(pub u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            bytes if bytes >= 10 << 30 => write!(f, "{} GiB", bytes >> 30),
            bytes if bytes >= 1 << 30 => write!(f, "{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
            bytes if bytes >= 1 << 20 => write!(f, "{} MiB", bytes >> 20),
            bytes => write!(f, "{} KiB", bytes.div_ceil(1 << 10)),
        }
    }
}

/// What the system has free, for this process.
#[cfg(target_os = "linux")]
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let least = ControlGroups::VERSIONS.iter().filter_map(ControlGroups::left).min();
    Some((kilobytes << 10).min(least.unwrap_or(u64::MAX)))
}

/// Where a version of Linux's control groups says how much memory they allow.
#[cfg(target_os = "linux")]
struct ControlGroups {
    /// What the line of `/proc/self/cgroup` has between its colons.
    controller: &'static str,
    root: &'static str,
    most: &'static str,
    now: &'static str,
    /// Of `memory.stat`: pages of files that are given up when memory is wanted.
    idle: &'static str,
}

#[cfg(target_os = "linux")]
impl ControlGroups {
    const VERSIONS: [ControlGroups; 2] = [
        ControlGroups {
            controller: "",
            root: "/sys/fs/cgroup",
            most: "memory.max",
            now: "memory.current",
            idle: "inactive_file ",
        },
        ControlGroups {
            controller: "memory",
            root: "/sys/fs/cgroup/memory",
            most: "memory.limit_in_bytes",
            now: "memory.usage_in_bytes",
            idle: "total_inactive_file ",
        },
    ];

    /// What the groups of this process leave it: the least of all above it.
    fn left(&self) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let is_it = controllers.split(',').any(|name| name == self.controller);
            is_it.then(|| path.trim_start_matches('/'))
        })?;
        let root = std::path::Path::new(self.root);
        let folder = root.join(path);
        folder.ancestors().take_while(|f| f.starts_with(root)).filter_map(|f| self.left_in(f)).min()
    }

    fn left_in(&self, folder: &std::path::Path) -> Option<u64> {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let number = |name: &str| -> Option<u64> { read(name)?.trim().parse().ok() };
        let (most, now) = (number(self.most)?, number(self.now)?);
        let stat = read("memory.stat").unwrap_or_default();
        let idle = stat.lines().find_map(|line| line.strip_prefix(self.idle)?.parse().ok());
        Some(most.saturating_sub(now.saturating_sub(idle.unwrap_or(0))))
    }
}

/// What the system has free.
#[cfg(any(windows, target_os = "macos"))]
fn available() -> Option<u64> {
    let memory = sysinfo::RefreshKind::nothing()
        .with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    let bytes = sysinfo::System::new_with_specifics(memory).available_memory();
    (bytes > 0).then_some(bytes)
}

/// Other systems are not asked.
#[cfg(not(any(target_os = "linux", windows, target_os = "macos")))]
fn available() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_given_back_and_never_more_than_there_is() {
        let budget = Budget::of(10 << 20);
        let weights = budget.take(&[("weights", 6 << 20)]).unwrap();
        let error = budget.take(&[("cache", 3 << 20), ("activations", 2 << 20)]).unwrap_err();
        let said = error.to_string();
        for words in ["cache 3 MiB + activations 2 MiB", "5242880 bytes", "there are 4 MiB"] {
            assert!(said.contains(words), "{said}");
        }
        assert_eq!(budget.left(), Some(4 << 20));
        drop(weights);
        assert!(budget.take(&[("cache", u64::MAX), ("more", 1)]).is_err());
        assert_eq!(budget.left(), Some(10 << 20));
        budget.take(&[("all", 10 << 20)]).unwrap();
    }

    #[test]
    fn the_system_tells_what_is_free() {
        if cfg!(target_os = "linux") {
            let bytes = Budget::available().left().unwrap();
            assert!((1 << 20..1 << 50).contains(&bytes), "{bytes}");
        }
    }
}
