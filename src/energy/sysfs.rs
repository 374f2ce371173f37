//! Meters that are files: a tree that looks like `/`, counters that wrap, gauges.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::{Info, Meter, Reading, Unavailable};

/// Decides whether reading a path fails.
type Fault = dyn Fn(&Path) -> Option<io::ErrorKind> + Send + Sync;

/// A directory that stands for `/`.
#[derive(Clone)]
pub struct Tree {
    root: PathBuf,
    fault: Option<Arc<Fault>>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree").field("root", &self.root).finish_non_exhaustive()
    }
}

/// A file in sysfs holds one page at most, and is read at once.
const PAGE: usize = 4096;

impl Tree {
    /// The tree below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Tree { root: root.into(), fault: None }
    }

    /// The same tree, in which reading fails where `fault` says so: tests that run as root are
    /// denied nothing by the system.
    #[must_use]
    pub fn with_fault(
        mut self,
        fault: impl Fn(&Path) -> Option<io::ErrorKind> + Send + Sync + 'static,
    ) -> Self {
        self.fault = Some(Arc::new(fault));
        self
    }

    /// Where a path of the tree is: `path` is relative to the root.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The names in a directory, sorted so that digits count as numbers.
    pub(super) fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let mut names: Vec<String> = std::fs::read_dir(self.path(directory))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort_by_key(|name| (name.len(), name.clone()));
        Ok(names)
    }

    /// Whether there is a file of this name.
    pub(super) fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A file's text, without the space around it.
    pub(super) fn text(&self, path: &str) -> Result<String, Unavailable> {
        let full = self.path(path);
        let read = || {
            if let Some(kind) = self.fault.as_ref().and_then(|fault| fault(&full)) {
                return Err(kind.into());
            }
            let mut page = [0; PAGE];
            let len = std::fs::File::open(&full)?.read(&mut page)?;
            let text = std::str::from_utf8(&page[..len]);
            text.map(|text| text.trim().to_owned()).map_err(io::Error::other)
        };
        read().map_err(|error: io::Error| Unavailable::new(explained(&full, &error)))
    }

    /// A file's number, times `scale`.
    pub(super) fn number(&self, path: &str, scale: f64) -> Result<f64, Unavailable> {
        let text = self.text(path)?;
        let number = text.parse::<f64>().ok().filter(|x| x.is_finite());
        number.map(|x| x * scale).ok_or_else(|| {
            let found: String = text.chars().take(40).collect();
            Unavailable::new(format!("{} holds {found:?}, not a number", self.path(path).display()))
        })
    }
}

fn explained(path: &Path, error: &io::Error) -> String {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!("permission denied reading {path}"),
        io::ErrorKind::NotFound => format!("{path} is not there"),
        _ => format!("{path}: {error}"),
    }
}

/// More than any machine that decodes text draws: what looks like more is a counter that was set
/// back, by a suspend for instance.
const IMPLAUSIBLE_WATTS: f64 = 10_000.0;

/// Makes a counter that wraps around into one that does not.
#[derive(Debug, Clone, Default)]
pub struct Unwrapped {
    range: Option<f64>,
    last: Option<(f64, Instant)>,
    joules: f64,
}

impl Unwrapped {
    /// A counter that begins again at 0 after `range` joules, or never.
    pub fn new(range: Option<f64>) -> Self {
        Unwrapped { range, last: None, joules: 0.0 }
    }

    /// Takes what the counter shows, in joules, and returns the joules since its first value.
    ///
    /// # Errors
    /// The counter fell, and not by wrapping around. It goes on from there.
    pub fn advance(&mut self, shown: f64, at: Instant) -> Result<f64, Unavailable> {
        let Some((before, since)) = self.last.replace((shown, at)) else {
            return Ok(self.joules);
        };
        let mut step = shown - before;
        if step < 0.0 {
            step += self.range.unwrap_or(0.0);
            let seconds = at.saturating_duration_since(since).as_secs_f64();
            // The allowance is for readings in quick succession.
            if step < 0.0 || step > 100.0 + IMPLAUSIBLE_WATTS * seconds {
                return Err(Unavailable::new(format!(
                    "the counter fell from {before:.3} J to {shown:.3} J, which is no wrap-around: \
                     it was set back (was the machine suspended?)"
                )));
            }
        }
        self.joules += step;
        Ok(self.joules)
    }
}

/// A file that counts joules.
#[derive(Debug)]
pub struct Counter {
    /// What it is.
    pub info: Info,
    /// Where it is.
    pub tree: Tree,
    /// The file, relative to the tree's root.
    pub path: String,
    /// Joules per unit of the file.
    pub scale: f64,
    /// Its history.
    pub unwrapped: Unwrapped,
    /// What to say to someone whom the system denies it.
    pub advice: &'static str,
}

impl Meter for Counter {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let before = Instant::now();
        let shown = self.tree.number(&self.path, self.scale).map_err(|mut why| {
            if why.reason.starts_with("permission denied") {
                why.reason.push_str(self.advice);
            }
            why
        })?;
        let mut reading = Reading::since(before, shown);
        reading.value = self.unwrapped.advance(shown, reading.at)?;
        Ok(reading)
    }
}

/// Files whose product is a power: one of watts, or volts and amperes.
#[derive(Debug)]
pub struct Gauge {
    /// What it is.
    pub info: Info,
    /// Where it is.
    pub tree: Tree,
    /// The files, relative to the tree's root.
    pub factors: Vec<String>,
    /// Watts per unit of the product.
    pub scale: f64,
}

impl Meter for Gauge {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let before = Instant::now();
        let mut watts = self.scale;
        for path in &self.factors {
            watts *= self.tree.number(path, 1.0)?;
        }
        // Which way a current flows through a shunt depends on how it was wired.
        Ok(Reading::since(before, watts.abs()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_counter_that_wraps_goes_on_and_one_that_is_set_back_says_so() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut counter = Unwrapped::new(Some(65_536.0));
        assert_eq!(counter.advance(65_000.0, at(0)).unwrap(), 0.0);
        assert_eq!(counter.advance(65_500.0, at(10)).unwrap(), 500.0);
        assert_eq!(counter.advance(464.0, at(20)).unwrap(), 1000.0);
        assert_eq!(counter.advance(465.0, at(30)).unwrap(), 1001.0);
        // 65,035 J in 0.1 s: no wrap, but a reset.
        let why = counter.advance(0.0, at(30) + Duration::from_millis(100)).unwrap_err();
        assert!(why.reason.contains("set back"), "{why}");
        let mut plain = Unwrapped::new(None);
        plain.advance(5.0, at(0)).unwrap();
        assert!(plain.advance(4.0, at(1)).is_err());
    }
}
