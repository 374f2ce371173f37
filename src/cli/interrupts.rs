//! Ctrl-C and SIGTERM (and SIGHUP, when a terminal is closed).
//!
//! The first one asks: what is under way sees [`flag`] and stops, and what was done so far is
//! reported and saved. That takes as long as it takes while a [`Finishing`] is alive; otherwise there
//! is nothing to lose, and what does not look at the flag in time (a driver at work, a long read) is
//! ended. The second one ends the program in any case. The exit code is then [`CODE`].

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use super::console::tell;
use crate::error::{Error, Result};

/// The exit code of a program that was ended: 128 and the number of SIGINT, as shells have it.
pub(super) const CODE: u8 = 130;

/// How long what has nothing to save may take to stop by itself.
const PATIENCE: Duration = Duration::from_millis(300);

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static FINISHING: AtomicUsize = AtomicUsize::new(0);
/// Files that go with the program.
static SCRATCH: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Begins to listen for signals.
pub(super) fn watch() {
    let asked = ASKED.clone();
    let heard = move || {
        if asked.swap(true, Ordering::Relaxed) {
            end();
        }
        if FINISHING.load(Ordering::Relaxed) == 0 {
            std::thread::sleep(PATIENCE);
            if FINISHING.load(Ordering::Relaxed) == 0 {
                end();
            }
        }
    };
    if let Err(error) = ctrlc::set_handler(heard) {
        tell!("mtad: Ctrl-C will end the program at once: {error}");
    }
}

fn end() -> ! {
    for path in SCRATCH.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        // It may be gone already.
        let _ = std::fs::remove_file(path);
    }
    std::process::exit(i32::from(CODE))
}

/// Set by the first signal.
pub(super) fn flag() -> Arc<AtomicBool> {
    ASKED.clone()
}

/// Whether a signal asked to stop.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Forgets that a signal asked to stop: what it was meant for has stopped.
pub(super) fn forget() {
    ASKED.store(false, Ordering::Relaxed);
}

/// [`Error::Cancelled`] if a signal asked to stop.
pub(super) fn check() -> Result<()> {
    if asked() { Err(Error::Cancelled) } else { Ok(()) }
}

/// Has a file removed if the program is ended.
pub(super) fn remove_at_end(path: &Path) {
    SCRATCH.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
}

/// Work that looks at [`flag`] and has something to finish when it is set.
pub(super) struct Finishing;

impl Finishing {
    /// The work begins; it ends when this is dropped.
    pub(super) fn first() -> Self {
        FINISHING.fetch_add(1, Ordering::Relaxed);
        Finishing
    }
}

impl Drop for Finishing {
    fn drop(&mut self) {
        FINISHING.fetch_sub(1, Ordering::Relaxed);
    }
}
