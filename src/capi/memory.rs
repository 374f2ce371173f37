//! What comes in as pointers, and what goes out into the caller's buffers.

use std::ffi::{CStr, c_char};
use std::path::PathBuf;
use std::sync::Arc;

use super::status::mtad_status::*;
use super::status::{Failure, Outcome};

/// A struct that begins with its size.
///
/// # Safety
/// The type is `repr(C)`, its first field is a `usize`, and its other fields may have any bytes.
pub(super) unsafe trait Versioned: Copy {
    /// Its name in C.
    const NAME: &'static str;
}

/// No struct of any version is larger.
const LARGEST: usize = 1 << 14;

pub(super) fn null(what: &str) -> Failure {
    Failure::new(MTAD_ERROR_NULL, format!("{what} is NULL"))
}

fn wrong_size<T: Versioned>(found: usize) -> Failure {
    Failure::new(
        MTAD_ERROR_STRUCT_SIZE,
        format!(
            "struct_size of {} is {found}; this library knows {} (mtad_*_init sets it)",
            T::NAME,
            size_of::<T>()
        ),
    )
}

/// A copy of a struct of the caller's. A larger one, of a later version, will do if this version
/// would not miss what it says: if the rest is zeros.
///
/// # Safety
/// `from` is null or points to as many readable bytes as it says in its first field.
pub(super) unsafe fn take<T: Versioned>(from: *const T) -> Outcome<T> {
    if from.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: it is not null, so it has at least its size; it need not be aligned.
    let found = unsafe { from.cast::<usize>().read_unaligned() };
    if !(size_of::<T>()..=LARGEST).contains(&found) {
        return Err(wrong_size::<T>(found));
    }
    // SAFETY: the caller says that it has `found` bytes.
    let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), found) };
    if bytes[size_of::<T>()..].iter().any(|&byte| byte != 0) {
        return Err(wrong_size::<T>(found));
    }
    // SAFETY: there are enough bytes, and any will do for this type.
    Ok(unsafe { from.read_unaligned() })
}

/// Writes a struct to the caller's, which keeps its `struct_size`.
///
/// # Safety
/// `to` is null or points to as many writable bytes as it says in its first field.
pub(super) unsafe fn give<T: Versioned>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: it is not null, so it has at least its size; it need not be aligned.
    let found = unsafe { to.cast::<usize>().read_unaligned() };
    if !(size_of::<T>()..=LARGEST).contains(&found) {
        return Err(wrong_size::<T>(found));
    }
    // SAFETY: there are enough bytes.
    unsafe {
        to.write_unaligned(value);
        to.cast::<usize>().write_unaligned(found);
    }
    Ok(())
}

/// Writes defaults to a struct of `size` bytes of the caller's.
///
/// # Safety
/// `to` is null or points to `size` writable bytes.
pub(super) unsafe fn init<T: Versioned>(to: *mut T, size: usize, value: T) -> Outcome {
    if to.is_null() {
        return Err(null(T::NAME));
    }
    if !(size_of::<T>()..=LARGEST).contains(&size) {
        return Err(wrong_size::<T>(size));
    }
    // SAFETY: there are `size` bytes.
    unsafe {
        to.cast::<u8>().write_bytes(0, size);
        to.write_unaligned(value);
        to.cast::<usize>().write_unaligned(size);
    }
    Ok(())
}

/// What a handle points to.
///
/// # Safety
/// `handle` is null or was made by [`handle`] and not freed.
pub(super) unsafe fn get<'a, T>(handle: *const T) -> Option<&'a T> {
    // SAFETY: as the caller says.
    unsafe { handle.as_ref() }
}

/// Hands a handle to the caller.
///
/// # Safety
/// `to` is null or writable.
pub(super) unsafe fn handle<T>(to: *mut *mut T, value: Arc<T>) {
    // SAFETY: as the caller says; it need not be aligned.
    unsafe { to.write_unaligned(Arc::into_raw(value).cast_mut()) }
}

/// Prepares the place of a handle: NULL until there is one.
///
/// # Safety
/// `to` is null or writable.
pub(super) unsafe fn place<T>(to: *mut *mut T) -> Outcome {
    if to.is_null() {
        return Err(null("the place for the handle"));
    }
    // SAFETY: as the caller says.
    unsafe { to.write_unaligned(std::ptr::null_mut()) };
    Ok(())
}

/// Takes a handle back and leaves NULL.
///
/// # Safety
/// `from` is null or holds null or a handle of this type that was not freed.
pub(super) unsafe fn free<T>(from: *mut *mut T) {
    if from.is_null() {
        return;
    }
    // SAFETY: as the caller says.
    unsafe {
        let handle = from.read_unaligned();
        from.write_unaligned(std::ptr::null_mut());
        if !handle.is_null() {
            // Whatever happens in there stays there.
            let _ = super::status::call(|| {
                drop(Arc::from_raw(handle.cast_const()));
                Ok(MTAD_OK)
            });
        }
    }
}

/// The caller's elements.
///
/// # Safety
/// `data` is null or points to `len` readable elements.
pub(super) unsafe fn slice<'a, T>(data: *const T, len: usize, what: &str) -> Outcome<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(null(what));
    }
    let absurd = len.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize);
    if absurd || !data.is_aligned() {
        let what = format!("{what}: {len} elements at {data:p} cannot be");
        return Err(Failure::new(MTAD_ERROR_INVALID, what));
    }
    // SAFETY: the caller says that they are readable; they are aligned and not too many.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// A text with its length, or up to its NUL if the length is [`usize::MAX`].
///
/// # Safety
/// `data` is null or points to `len` readable bytes, or to bytes that end with a NUL.
pub(super) unsafe fn text<'a>(data: *const c_char, len: usize, what: &str) -> Outcome<&'a str> {
    if data.is_null() && len != 0 {
        return Err(null(what));
    }
    let bytes = match len {
        // SAFETY: it ends with a NUL.
        usize::MAX => unsafe { CStr::from_ptr(data) }.to_bytes(),
        // SAFETY: it has so many bytes.
        len => unsafe { slice(data.cast::<u8>(), len, what)? },
    };
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        Failure::new(MTAD_ERROR_UTF8, format!("{what} is not UTF-8 (at byte {at})"))
    })
}

/// A text that may be left out.
///
/// # Safety
/// `data` is null or points to bytes that end with a NUL.
pub(super) unsafe fn optional<'a>(data: *const c_char, what: &str) -> Outcome<Option<&'a str>> {
    if data.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller says.
    unsafe { text(data, usize::MAX, what) }.map(Some)
}

/// A path, in UTF-8.
///
/// # Safety
/// As [`optional`].
pub(super) unsafe fn path(data: *const c_char, what: &str) -> Outcome<PathBuf> {
    // SAFETY: as the caller says.
    unsafe { optional(data, what)? }.map(PathBuf::from).ok_or_else(|| null(what))
}

/// Copies elements to the caller's buffer and says how many there are. A NULL buffer of size 0
/// asks for the number alone.
///
/// # Safety
/// `to` is null or points to `room` writable elements; `count` is null or writable.
pub(super) unsafe fn copy<T: Copy>(
    from: &[T],
    to: *mut T,
    room: usize,
    count: *mut usize,
    what: &str,
) -> Outcome {
    if !count.is_null() {
        // SAFETY: as the caller says.
        unsafe { count.write_unaligned(from.len()) };
    }
    if to.is_null() {
        return if room == 0 && !count.is_null() { Ok(()) } else { Err(null(what)) };
    }
    if room < from.len() {
        let needed = from.len();
        let message = format!("{what} has room for {room}; {needed} are needed");
        return Err(Failure::new(MTAD_ERROR_BUFFER, message));
    }
    // SAFETY: there is room, and a buffer of the caller's is no memory of ours. Bytes need no
    // alignment.
    unsafe {
        let bytes = std::mem::size_of_val(from);
        std::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to.cast::<u8>(), bytes);
    }
    Ok(())
}

/// Copies a text and a NUL to the caller's buffer and says how many bytes it has without the NUL.
///
/// # Safety
/// As [`copy`].
pub(super) unsafe fn copy_text(
    from: &str,
    to: *mut c_char,
    room: usize,
    length: *mut usize,
    what: &str,
) -> Outcome {
    let mut bytes = from.as_bytes().to_vec();
    bytes.push(0);
    // SAFETY: as the caller says.
    let done = unsafe { copy(&bytes, to.cast::<u8>(), room, length, what) };
    if !length.is_null() {
        // SAFETY: as the caller says.
        unsafe { length.write_unaligned(from.len()) };
    }
    done
}
