//! Status codes, the last error of a handle, and the guard at the border.

use std::any::Any;
use std::cell::Cell;
use std::ffi::c_char;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, Once, PoisonError};

use super::memory;
use super::types::mtad_error;
use crate::error::Error;

/// What a function returns: MTAD_OK, MTAD_DONE, or an error below 0.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum mtad_status {
    /// It is done.
    MTAD_OK = 0,
    /// There is nothing more: the generation has ended.
    MTAD_DONE = 1,
    /// An argument is outside its range, or arguments contradict each other.
    MTAD_ERROR_INVALID = -1,
    /// A pointer that must be there is NULL.
    MTAD_ERROR_NULL = -2,
    /// A text is not UTF-8.
    MTAD_ERROR_UTF8 = -3,
    /// A struct_size is not that of any version of the struct.
    MTAD_ERROR_STRUCT_SIZE = -4,
    /// A buffer is too small; what is needed was said.
    MTAD_ERROR_BUFFER = -5,
    /// The operating system refused to read or write.
    MTAD_ERROR_IO = -6,
    /// A file is not what it claims to be: cut short, damaged, inconsistent.
    MTAD_ERROR_FORMAT = -7,
    /// A sound file asks for something that this version does not do, or is of another model.
    MTAD_ERROR_UNSUPPORTED = -8,
    /// Draft and target do not speak the same tokens.
    MTAD_ERROR_VOCABULARY = -9,
    /// Prompt and text have no room in the context.
    MTAD_ERROR_CONTEXT = -10,
    /// The device went away. The tokens so far are still valid.
    MTAD_ERROR_DEVICE = -11,
    /// A callback asked to stop.
    MTAD_ERROR_CANCELLED = -12,
    /// Another thread, or a generation that was not freed, uses the session.
    MTAD_ERROR_BUSY = -13,
    /// There is no such figure: no meter can be read, nothing was measured.
    MTAD_ERROR_UNAVAILABLE = -14,
    /// A fault of the library. The handle does nothing any more but say so; free it.
    MTAD_ERROR_PANIC = -15,
    /// There is not as much memory as is needed.
    MTAD_ERROR_MEMORY = -16,
}

use mtad_status::*;

/// Why a call failed: code and message.
#[derive(Debug, Clone)]
pub struct Failure {
    pub(super) status: mtad_status,
    pub(super) message: String,
}

pub(super) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub(super) fn new(status: mtad_status, message: impl Into<String>) -> Self {
        Failure { status, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Io { .. } => MTAD_ERROR_IO,
            Error::Format { .. } | Error::NotFinite { .. } => MTAD_ERROR_FORMAT,
            Error::Unsupported { .. } => MTAD_ERROR_UNSUPPORTED,
            Error::Invalid(_) | Error::Quantized { .. } => MTAD_ERROR_INVALID,
            Error::Vocabulary(_) => MTAD_ERROR_VOCABULARY,
            // Nothing of C renders templates so far.
            Error::Template(_) | Error::Grammar(_) => MTAD_ERROR_INVALID,
            Error::ContextFull { .. } => MTAD_ERROR_CONTEXT,
            Error::Device { .. } | Error::DeviceLost { .. } => MTAD_ERROR_DEVICE,
            Error::Memory { .. } => MTAD_ERROR_MEMORY,
            Error::Cancelled => MTAD_ERROR_CANCELLED,
        };
        Failure::new(status, error.to_string())
    }
}

/// The last error of a handle, and whether a fault has spoilt it.
#[derive(Debug, Default)]
pub struct Fate(Mutex<Option<Failure>>);

impl Fate {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Failure>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spoilt(&self) -> Option<Failure> {
        self.lock().clone().filter(|failure| failure.status == MTAD_ERROR_PANIC)
    }

    fn set(&self, failure: Failure) {
        let mut last = self.lock();
        // The first fault says what happened.
        if last.as_ref().is_none_or(|last| last.status != MTAD_ERROR_PANIC) {
            *last = Some(failure);
        }
    }

    pub(super) fn tell(&self) -> Option<Failure> {
        self.lock().clone()
    }
}

thread_local! {
    /// Calls from C that this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Panics inside calls are returned, not printed. Those of anybody else go where they went before.
fn silence_panics_of_calls() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if DEPTH.try_with(Cell::get).unwrap_or(0) == 0 {
                before(info);
            }
        }));
    });
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let what = panic.downcast_ref::<&str>().copied();
    let what = what.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!(
        "the library failed ({}); please report it, and free this handle",
        what.unwrap_or("for no known reason")
    )
}

/// Does the work of a call that has no handle yet.
pub(super) fn call(work: impl FnOnce() -> Outcome<mtad_status>) -> Outcome<mtad_status> {
    silence_panics_of_calls();
    DEPTH.set(DEPTH.get() + 1);
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    done.unwrap_or_else(|panic| Err(Failure::new(MTAD_ERROR_PANIC, message_of(&*panic))))
}

/// Does the work of a call on a handle, unless a fault has spoilt it, and keeps its error there.
pub(super) fn on(fate: &Fate, work: impl FnOnce() -> Outcome<mtad_status>) -> mtad_status {
    if let Some(failure) = fate.spoilt() {
        return failure.status;
    }
    call(work).unwrap_or_else(|failure| {
        let status = failure.status;
        fate.set(failure);
        status
    })
}

/// Writes a failure to the caller's struct.
///
/// # Safety
/// `error` is null or points to an [`mtad_error`] with its size.
pub(super) unsafe fn report(failure: Option<&Failure>, error: *mut mtad_error) -> mtad_status {
    if error.is_null() {
        return MTAD_ERROR_NULL;
    }
    let mut out = mtad_error { code: MTAD_OK as i32, ..mtad_error::default() };
    if let Some(failure) = failure {
        out.code = failure.status as i32;
        let mut len = failure.message.len().min(out.message.len() - 1);
        while !failure.message.is_char_boundary(len) {
            len -= 1;
        }
        for (to, &byte) in out.message.iter_mut().zip(&failure.message.as_bytes()[..len]) {
            // A NUL in a file's name would end the message.
            *to = if byte == 0 { b' ' as c_char } else { byte as c_char };
        }
    }
    // SAFETY: as the caller says.
    match unsafe { memory::give(error, out) } {
        Ok(()) => MTAD_OK,
        Err(failure) => failure.status,
    }
}

/// Does the work of a call without a handle and reports its error to the caller's struct, if
/// there is one.
///
/// # Safety
/// As [`report`].
pub(super) unsafe fn call_reporting(
    error: *mut mtad_error,
    work: impl FnOnce() -> Outcome<mtad_status>,
) -> mtad_status {
    let done = call(work);
    if !error.is_null() {
        // SAFETY: as the caller says.
        let told = unsafe { report(done.as_ref().err(), error) };
        if told != MTAD_OK && done.is_ok() {
            return told;
        }
    }
    done.unwrap_or_else(|failure| failure.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_spoils_the_handle_and_stays_inside() {
        let fate = Fate::default();
        assert_eq!(on(&fate, || Ok(MTAD_DONE)), MTAD_DONE);
        let invalid = || Err(Error::invalid("no").into());
        assert_eq!(on(&fate, invalid), MTAD_ERROR_INVALID);
        assert_eq!(fate.tell().unwrap().message, "no");
        assert_eq!(on(&fate, || Ok(MTAD_OK)), MTAD_OK);
        assert_eq!(on(&fate, || panic!("the {} is on fire", "roof")), MTAD_ERROR_PANIC);
        assert_eq!(on(&fate, || Ok(MTAD_OK)), MTAD_ERROR_PANIC);
        assert_eq!(on(&fate, invalid), MTAD_ERROR_PANIC);
        assert!(fate.tell().unwrap().message.contains("the roof is on fire"));
        assert_eq!(DEPTH.get(), 0);
    }

    #[test]
    fn long_messages_end_at_a_character() {
        let failure = Failure::new(MTAD_ERROR_IO, "ü".repeat(4000) + "\0");
        let mut error = mtad_error::default();
        // SAFETY: `error` has its size.
        assert_eq!(unsafe { report(Some(&failure), &mut error) }, MTAD_OK);
        let text: Vec<u8> =
            error.message.iter().take_while(|c| **c != 0).map(|&c| c as u8).collect();
        assert!(text.len() >= 1000 && String::from_utf8(text).unwrap().chars().all(|c| c == 'ü'));
        assert_eq!(error.code, MTAD_ERROR_IO as i32);
    }
}
