//! Pairs of models: versions, devices, opening, tokens and text.

use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;

use super::memory;
use super::status::mtad_status::*;
use super::status::{Failure, Fate, Outcome, call, call_reporting, mtad_status, on, report};
use super::types::*;
use crate::engine::{Device, Isa};
use crate::error::Error;
use crate::gguf::Gguf;
use crate::session::pair::{LoadOptions, Pair, builtin_file};
use crate::tokenizer::EncodeOptions;

/// A target model and perhaps a draft. Threads may share it.
#[allow(non_camel_case_types)]
pub struct mtad_pair {
    pub(super) pair: Pair,
    pub(super) fate: Fate,
    pub(super) log: Log,
}

/// Where messages go.
#[derive(Clone, Copy)]
pub(super) struct Log {
    callback: mtad_log_callback,
    user_data: *mut c_void,
}

// SAFETY: the caller was told that the callback is called on any thread, with this pointer.
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

impl Log {
    pub(super) fn say(&self, level: i32, message: String) {
        if let (Some(callback), Ok(message)) = (self.callback, CString::new(message)) {
            // SAFETY: the callback is the caller's, and takes these.
            unsafe { callback(level, message.as_ptr(), self.user_data) }
        }
    }
}

/// The version of the interface that the library has, as MTAD_ABI_VERSION. A program should refuse
/// a library whose upper 16 bits differ from those it was compiled with, or whose lower ones are
/// less.
#[unsafe(no_mangle)]
pub extern "C" fn mtad_abi_version() -> u32 {
    MTAD_ABI_VERSION
}

/// The version of the library, such as `0.1.0`. It is there as long as the library is.
#[unsafe(no_mangle)]
pub extern "C" fn mtad_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// What a status means, in English. It is there as long as the library is.
#[unsafe(no_mangle)]
pub extern "C" fn mtad_status_text(status: i32) -> *const c_char {
    let text = match status {
        0 => c"done",
        1 => c"there is nothing more",
        -1 => c"an argument is outside its range",
        -2 => c"a pointer is NULL",
        -3 => c"a text is not UTF-8",
        -4 => c"a struct_size is wrong",
        -5 => c"a buffer is too small",
        -6 => c"the system refused to read or write",
        -7 => c"a file is damaged",
        -8 => c"not supported",
        -9 => c"draft and target have different vocabularies",
        -10 => c"the context is full",
        -11 => c"the device was lost",
        -12 => c"stopped on request",
        -13 => c"the session is in use",
        -14 => c"there is no such figure",
        -15 => c"a fault of the library",
        -16 => c"there is not enough memory",
        _ => c"no status of this library",
    };
    text.as_ptr()
}

/// The devices that models can run on, as JSON: {"devices": [{"name", "description", ...}]}.
/// `length` is set to the bytes of the text without its NUL; `buffer` may be NULL with `size` 0 to
/// ask for them.
///
/// # Safety
/// `buffer` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_devices(
    buffer: *mut c_char,
    size: usize,
    length: *mut usize,
    error: *mut mtad_error,
) -> mtad_status {
    let work = || {
        let devices = Device::all_as_json()?;
        // SAFETY: as the caller says.
        unsafe { memory::copy_text(&devices.to_string(), buffer, size, length, "buffer")? };
        Ok(MTAD_OK)
    };
    // SAFETY: as the caller says.
    unsafe { call_reporting(error, work) }
}

/// Fills in the defaults: the built-in pair on the CPU. `size` is sizeof(mtad_pair_options).
///
/// # Safety
/// `options` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_pair_options_init(
    options: *mut mtad_pair_options,
    size: usize,
) -> mtad_status {
    let defaults = mtad_pair_options {
        struct_size: size,
        target: std::ptr::null(),
        draft: std::ptr::null(),
        target_data: std::ptr::null(),
        target_size: 0,
        draft_data: std::ptr::null(),
        draft_size: 0,
        device: std::ptr::null(),
        threads: 0,
        flags: 0,
        progress: None,
        log: None,
        user_data: std::ptr::null_mut(),
    };
    // SAFETY: as the caller says.
    let work = || unsafe { memory::init(options, size, defaults) }.map(|()| MTAD_OK);
    call(work).unwrap_or_else(|failure| failure.status)
}

/// Opens a pair. `*pair` is NULL unless it returns MTAD_OK. `options` may be NULL for the
/// defaults; `error` may be NULL, or says what went wrong.
///
/// # Safety
/// `options` is as mtad.h says; `pair` and `error` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_pair_open(
    options: *const mtad_pair_options,
    pair: *mut *mut mtad_pair,
    error: *mut mtad_error,
) -> mtad_status {
    // SAFETY: as the caller says.
    let work = || unsafe {
        memory::place(pair)?;
        let options = match options.is_null() {
            true => None,
            false => Some(memory::take(options)?),
        };
        memory::handle(pair, Arc::new(open(options.as_ref())?));
        Ok(MTAD_OK)
    };
    // SAFETY: as the caller says.
    unsafe { call_reporting(error, work) }
}

/// # Safety
/// What options point to is there.
unsafe fn open(options: Option<&mtad_pair_options>) -> Outcome<mtad_pair> {
    let Some(options) = options else {
        let load = LoadOptions { isa: Isa::from_env()?, ..LoadOptions::default() };
        let pair = Pair::builtin(true, &load, &mut |_, _| true)?;
        let log = Log { callback: None, user_data: std::ptr::null_mut() };
        return Ok(mtad_pair { pair, fate: Fate::default(), log });
    };
    if options.flags & !(MTAD_NO_DRAFT | MTAD_NO_MMAP) != 0 {
        return Err(unknown_flags(options.flags));
    }
    let mut load = LoadOptions { isa: Isa::from_env()?, ..LoadOptions::default() };
    // SAFETY: as the caller says.
    if let Some(device) = unsafe { memory::optional(options.device, "device")? } {
        load.device = device.to_owned();
    }
    if options.threads > 1024 {
        let what = format!("threads must be from 0 to 1024, not {}", options.threads);
        return Err(Error::invalid(what).into());
    }
    load.threads = options.threads as usize;
    load.mmap = options.flags & MTAD_NO_MMAP == 0;
    // SAFETY: as the caller says.
    let (target, draft) = unsafe {
        (
            model(&load, options.target, options.target_data, options.target_size, "target")?,
            model(&load, options.draft, options.draft_data, options.draft_size, "draft")?,
        )
    };
    let mut progress = |done, total| match options.progress {
        // SAFETY: the callback is the caller's, and takes these.
        Some(callback) => unsafe { callback(done, total, options.user_data) == 0 },
        None => true,
    };
    let with_draft = options.flags & MTAD_NO_DRAFT == 0;
    let pair = match (target, draft) {
        (Some(target), draft) => {
            Pair::from_files(target, draft.filter(|_| with_draft), &load, &mut progress)?
        }
        (None, None) => Pair::builtin(with_draft, &load, &mut progress)?,
        (None, Some(_)) => return Err(Error::invalid("there is a draft but no target").into()),
    };
    let log = Log { callback: options.log, user_data: options.user_data };
    log.say(
        MTAD_LOG_INFO,
        format!(
            "{} runs on {}, loaded in {:.2} s",
            pair.target().file().name(),
            pair.target().describe(),
            pair.load_seconds()
        ),
    );
    pair.on_note(Arc::new(move |note| log.say(MTAD_LOG_WARNING, note.to_owned())));
    Ok(mtad_pair { pair, fate: Fate::default(), log })
}

pub(super) fn unknown_flags(flags: u32) -> Failure {
    Error::invalid(format!("flags {flags:#x} has bits that mean nothing here")).into()
}

/// A model by its path, or in memory.
///
/// # Safety
/// What the pointers point to is there.
unsafe fn model(
    load: &LoadOptions,
    path: *const c_char,
    data: *const c_void,
    size: usize,
    what: &str,
) -> Outcome<Option<Gguf>> {
    // SAFETY: as the caller says.
    let path = unsafe { memory::optional(path, what)? };
    match (path, data.is_null() && size == 0) {
        (Some(_), false) => {
            Err(Error::invalid(format!("{what} and {what}_data exclude each other")).into())
        }
        (Some(path), true) => Ok(Some(match path.strip_prefix("builtin:") {
            Some(name) => builtin_file(name)?,
            None => load.open(path)?,
        })),
        (None, false) => {
            let what = format!("{what}_data");
            // SAFETY: as the caller says.
            let bytes = unsafe { memory::slice(data.cast::<u8>(), size, &what)? };
            Ok(Some(Gguf::from_vec(what, bytes.to_vec())?))
        }
        (None, true) => Ok(None),
    }
}

/// What the pair is. The caller sets info->struct_size.
///
/// # Safety
/// `pair` is a pair or NULL, `info` as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_pair_get_info(
    pair: *const mtad_pair,
    info: *mut mtad_pair_info,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(pair) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        let (pair, tokenizer) = (&handle.pair, handle.pair.tokenizer());
        let id = |token: Option<u32>| token.map_or(-1, |token| token as i32);
        let found = mtad_pair_info {
            struct_size: 0,
            vocabulary: tokenizer.len(),
            logits: pair.target().shape().vocab_size,
            context: pair.target().shape().context,
            load_seconds: pair.load_seconds(),
            has_draft: pair.draft().is_some().into(),
            bos: id(tokenizer.bos()),
            eos: id(tokenizer.eos()),
            reserved: 0,
        };
        // SAFETY: as the caller says.
        unsafe { memory::give(info, found)? };
        Ok(MTAD_OK)
    })
}

/// The tokens of a text. `count` is set to how many there are; `tokens` may be NULL with `room` 0
/// to ask for it. `flags`: MTAD_ADD_BOS, MTAD_SPECIAL.
///
/// # Safety
/// `text` has `length` bytes, `tokens` room for `room`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_tokenize(
    pair: *const mtad_pair,
    text: *const c_char,
    length: usize,
    flags: u32,
    tokens: *mut u32,
    room: usize,
    count: *mut usize,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(pair) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        // SAFETY: as the caller says.
        let text = unsafe { memory::text(text, length, "text")? };
        if flags & !(MTAD_ADD_BOS | MTAD_SPECIAL) != 0 {
            return Err(unknown_flags(flags));
        }
        let tokenizer = handle.pair.tokenizer();
        let options = EncodeOptions {
            bos: flags & MTAD_ADD_BOS != 0 && tokenizer.add_bos(),
            special: flags & MTAD_SPECIAL != 0,
        };
        let found = tokenizer.encode(text, options);
        // SAFETY: as the caller says.
        unsafe { memory::copy(&found, tokens, room, count, "tokens")? };
        Ok(MTAD_OK)
    })
}

/// The text of tokens, without control tokens; MTAD_SPECIAL shows those by their names. `length`
/// is set to its bytes without the NUL; `buffer` may be NULL with `size` 0 to ask for it. Bytes
/// that are no character become U+FFFD, ids outside the vocabulary are no text. `flags`:
/// MTAD_SPECIAL, MTAD_CONTINUATION.
///
/// # Safety
/// `tokens` has `count` tokens, `buffer` `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_detokenize(
    pair: *const mtad_pair,
    tokens: *const u32,
    count: usize,
    flags: u32,
    buffer: *mut c_char,
    size: usize,
    length: *mut usize,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(pair) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        // SAFETY: as the caller says.
        let tokens = unsafe { memory::slice(tokens, count, "tokens")? };
        if flags & !(MTAD_SPECIAL | MTAD_CONTINUATION) != 0 {
            return Err(unknown_flags(flags));
        }
        let tokenizer = handle.pair.tokenizer();
        let decoder = match flags & MTAD_CONTINUATION {
            0 => tokenizer.decoder(),
            _ => tokenizer.continuation(),
        };
        let mut decoder = decoder.show_special(flags & MTAD_SPECIAL != 0);
        let mut text: String = tokens.iter().map(|&token| decoder.push(token)).collect();
        text.push_str(&decoder.finish());
        // SAFETY: as the caller says.
        unsafe { memory::copy_text(&text, buffer, size, length, "buffer")? };
        Ok(MTAD_OK)
    })
}

/// The last error of a call on this pair, MTAD_OK if there was none. The caller sets
/// error->struct_size.
///
/// # Safety
/// `pair` is a pair or NULL, `error` as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_pair_last_error(
    pair: *const mtad_pair,
    error: *mut mtad_error,
) -> mtad_status {
    // SAFETY: as the caller says.
    match unsafe { memory::get(pair) } {
        // SAFETY: as the caller says.
        Some(handle) => unsafe { report(handle.fate.tell().as_ref(), error) },
        None => MTAD_ERROR_NULL,
    }
}

/// Frees a pair and sets `*pair` to NULL. Its sessions stay usable: what they need is freed with
/// the last of them.
///
/// # Safety
/// `pair` is NULL, or `*pair` is NULL or a pair that no thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_pair_free(pair: *mut *mut mtad_pair) {
    // SAFETY: as the caller says.
    unsafe { memory::free(pair) }
}
