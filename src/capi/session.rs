//! Sessions: prompts, tokens, files, logits, energy.

use std::ffi::c_char;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Instant;

use super::memory;
use super::pair::{Log, mtad_pair, unknown_flags};
use super::status::mtad_status::*;
use super::status::{Failure, Fate, Outcome, call, mtad_status, on, report};
use super::types::*;
use crate::decode::Phase;
use crate::energy::{Found, Recorder, Sources};
use crate::engine::CacheType;
use crate::engine::SessionOptions;
use crate::error::Error;
use crate::session::generation::Session;

/// A text in the making, with its caches. One thread at a time may use it.
#[allow(non_camel_case_types)]
pub struct mtad_session {
    /// Empty while a generation has it.
    place: Mutex<Option<Box<Session>>>,
    meters: Mutex<Option<(Recorder, Instant)>>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) fate: Fate,
    log: Log,
}

fn busy() -> Failure {
    let why = "another thread, or a generation that was not freed, uses the session";
    Failure::new(MTAD_ERROR_BUSY, why)
}

/// What a mutex holds, unless another thread does.
fn lock<T>(mutex: &Mutex<T>) -> Outcome<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::WouldBlock) => Err(busy()),
        Err(TryLockError::Poisoned(_)) => {
            Err(Failure::new(MTAD_ERROR_PANIC, "an earlier call failed; free this handle"))
        }
    }
}

impl mtad_session {
    pub(super) fn new(mut session: Session, log: Log) -> Arc<Self> {
        let cancel = Arc::<AtomicBool>::default();
        session.cancel_prompts(cancel.clone());
        Arc::new(mtad_session {
            place: Mutex::new(Some(Box::new(session))),
            meters: Mutex::default(),
            cancel,
            fate: Fate::default(),
            log,
        })
    }

    /// Lends the session for a call.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut Session) -> Outcome<R>) -> Outcome<R> {
        work(lock(&self.place)?.as_mut().ok_or_else(busy)?)
    }

    /// Takes the session out, for a generation.
    pub(super) fn take(&self) -> Outcome<Box<Session>> {
        lock(&self.place)?.take().ok_or_else(busy)
    }

    /// Puts it back.
    pub(super) fn put(&self, session: Box<Session>) {
        if let Ok(mut place) = self.place.lock() {
            *place = Some(session);
        }
    }
}

/// What C says of a session.
///
/// # Safety
/// `options` is as mtad.h says.
unsafe fn session_options(options: *const mtad_session_options) -> Outcome<SessionOptions> {
    if options.is_null() {
        return Ok(SessionOptions::default());
    }
    // SAFETY: as the caller says.
    let (options, name) = unsafe {
        let options = memory::take(options)?;
        (options, memory::optional(options.cache_type, "cache_type")?)
    };
    let cache_type = match name {
        None => CacheType::default(),
        Some(name) => {
            let found = CacheType::ALL.iter().find(|(_, known)| *known == name);
            let unknown = || Error::invalid(format!("there is no cache type `{name}`: f16, f32"));
            found.ok_or_else(unknown)?.0
        }
    };
    Ok(SessionOptions { context: (options.context > 0).then_some(options.context), cache_type })
}

/// Fills in the defaults. `size` is sizeof(mtad_session_options).
///
/// # Safety
/// `options` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_options_init(
    options: *mut mtad_session_options,
    size: usize,
) -> mtad_status {
    let defaults =
        mtad_session_options { struct_size: size, context: 0, cache_type: std::ptr::null() };
    // SAFETY: as the caller says.
    let work = || unsafe { memory::init(options, size, defaults) }.map(|()| MTAD_OK);
    call(work).unwrap_or_else(|failure| failure.status)
}

/// A new session, with no text. `*session` is NULL unless it returns MTAD_OK; errors are the
/// pair's. `options` may be NULL.
///
/// # Safety
/// Handles and structs are as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_create(
    pair: *const mtad_pair,
    options: *const mtad_session_options,
    session: *mut *mut mtad_session,
) -> mtad_status {
    // SAFETY: as the caller says.
    unsafe { make(pair, options, session, |pair, options| Ok(pair.pair.session(options)?)) }
}

/// A session from a file that mtad_session_save wrote with the same models. It goes on with the
/// same text. Otherwise as mtad_session_create.
///
/// # Safety
/// Handles and structs are as mtad.h says; `path` ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_load(
    pair: *const mtad_pair,
    options: *const mtad_session_options,
    path: *const c_char,
    session: *mut *mut mtad_session,
) -> mtad_status {
    // SAFETY: as the caller says.
    unsafe {
        make(pair, options, session, |pair, options| {
            Ok(pair.pair.load_session(memory::path(path, "path")?, options)?)
        })
    }
}

/// # Safety
/// Handles and structs are as mtad.h says.
unsafe fn make(
    pair: *const mtad_pair,
    options: *const mtad_session_options,
    session: *mut *mut mtad_session,
    work: impl FnOnce(&mtad_pair, &SessionOptions) -> Outcome<Session>,
) -> mtad_status {
    // SAFETY: as the caller says.
    let placed = unsafe { memory::place(session) };
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(pair) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        placed?;
        // SAFETY: as the caller says.
        let options = unsafe { session_options(options)? };
        let made = mtad_session::new(work(handle, &options)?, handle.log);
        // SAFETY: as the caller says; it is not null.
        unsafe { memory::handle(session, made) };
        Ok(MTAD_OK)
    })
}

/// Does work on a session that nobody else uses.
///
/// # Safety
/// `session` is a session or NULL.
unsafe fn using(
    session: *const mtad_session,
    work: impl FnOnce(&mut Session) -> Outcome,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || handle.with(work).map(|()| MTAD_OK))
}

/// The same for work that [`mtad_session_cancel`] stops.
///
/// # Safety
/// `session` is a session or NULL.
unsafe fn prompting(
    session: *const mtad_session,
    work: impl FnOnce(&mut Session) -> Outcome,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        handle.with(|session| {
            handle.cancel.store(false, Ordering::Relaxed);
            work(session)
        })?;
        Ok(MTAD_OK)
    })
}

/// A session of its own with the same text, caches and random numbers.
///
/// # Safety
/// `session` is a session or NULL, `clone` writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_clone(
    session: *const mtad_session,
    clone: *mut *mut mtad_session,
) -> mtad_status {
    // SAFETY: as the caller says.
    let placed = unsafe { memory::place(clone) };
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        placed?;
        let twin = handle.with(|session| Ok(session.try_clone()?))?;
        // SAFETY: as the caller says; it is not null.
        unsafe { memory::handle(clone, mtad_session::new(twin, handle.log)) };
        Ok(MTAD_OK)
    })
}

/// Forgets the text.
///
/// # Safety
/// `session` is a session or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_reset(session: *mut mtad_session) -> mtad_status {
    // SAFETY: as the caller says.
    unsafe { using(session, |session| Ok(session.reset()?)) }
}

/// Writes the session to a file: the text as far as it was handed out, the caches, where the
/// random numbers are. The file appears under its name when it is complete.
///
/// # Safety
/// `session` is a session or NULL; `path` ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_save(
    session: *mut mtad_session,
    path: *const c_char,
) -> mtad_status {
    // SAFETY: as the caller says.
    unsafe { using(session, |session| Ok(session.save(memory::path(path, "path")?)?)) }
}

/// Begins a text: evaluates a prompt, except what it shares with the last text. Tokens that begin
/// a text are added as the model expects them. `flags`: MTAD_SPECIAL. MTAD_ERROR_CANCELLED if
/// mtad_session_cancel stopped it: the prompt is the session's text then, and a generation
/// evaluates what is missing.
///
/// # Safety
/// `session` is a session or NULL; `text` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_prompt(
    session: *mut mtad_session,
    text: *const c_char,
    length: usize,
    flags: u32,
) -> mtad_status {
    let work = |session: &mut Session| {
        // SAFETY: as the caller says.
        let text = unsafe { memory::text(text, length, "text")? };
        if flags & !MTAD_SPECIAL != 0 {
            return Err(unknown_flags(flags));
        }
        session.prompt(text, flags & MTAD_SPECIAL != 0)?;
        Ok(())
    };
    // SAFETY: as the caller says.
    unsafe { prompting(session, work) }
}

/// The same with tokens, which are taken as they are.
///
/// # Safety
/// `session` is a session or NULL; `tokens` has `count` tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_prompt_tokens(
    session: *mut mtad_session,
    tokens: *const u32,
    count: usize,
) -> mtad_status {
    let work = |session: &mut Session| {
        // SAFETY: as the caller says.
        let tokens = unsafe { memory::slice(tokens, count, "tokens")? };
        let vocab = session.pair().target().shape().vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            let what = format!("token {token} is outside the vocabulary of {vocab}");
            return Err(Error::invalid(what).into());
        }
        session.prompt_tokens(tokens)?;
        Ok(())
    };
    // SAFETY: as the caller says.
    unsafe { prompting(session, work) }
}

/// Prompt and generated tokens, as far as they were handed out. `count` is set to how many there
/// are; `tokens` may be NULL with `room` 0 to ask for it.
///
/// # Safety
/// `session` is a session or NULL; `tokens` has room for `room`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_tokens(
    session: *mut mtad_session,
    tokens: *mut u32,
    room: usize,
    count: *mut usize,
) -> mtad_status {
    // SAFETY: as the caller says.
    unsafe {
        using(session, |session| memory::copy(session.tokens(), tokens, room, count, "tokens"))
    }
}

/// The target's logits for the token that follows the text, one for each token of the vocabulary.
/// `count` is set to how many there are; `logits` may be NULL with `room` 0 to ask for it (which
/// evaluates nothing).
///
/// # Safety
/// `session` is a session or NULL; `logits` has room for `room`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_logits(
    session: *mut mtad_session,
    logits: *mut f32,
    room: usize,
    count: *mut usize,
) -> mtad_status {
    let work = |session: &mut Session| {
        let many = session.pair().target().shape().vocab_size;
        let found =
            if logits.is_null() || room < many { vec![0.0; many] } else { session.logits()? };
        // SAFETY: as the caller says.
        unsafe { memory::copy(&found, logits, room, count, "logits") }
    };
    // SAFETY: as the caller says.
    unsafe { using(session, work) }
}

/// Stops the prompt that is being evaluated, within a second or so, or the generation that is under
/// way, after its round; if there is neither, it does nothing. The one function of a session
/// that any thread may call at any time before the session is freed.
///
/// # Safety
/// `session` is a session or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_cancel(session: *const mtad_session) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    handle.cancel.store(true, Ordering::Relaxed);
    MTAD_OK
}

/// Begins to measure energy, `rate` times a second, with the meter or the family of meters that
/// `mtad devices --meters` shows under that name, `file:PATH` or `cmd:COMMAND`; NULL is all that
/// there are. A measurement that was under way is thrown away.
///
/// # Safety
/// `session` is a session or NULL; `meter` ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_energy_begin(
    session: *mut mtad_session,
    meter: *const c_char,
    rate: f64,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    let work = |session: &mut Session| {
        // SAFETY: as the caller says.
        let meter = unsafe { memory::optional(meter, "meter")? };
        let names: Vec<String> = meter.into_iter().map(str::to_owned).collect();
        let found = Sources::default().choose(&names)?;
        let (mut meters, mut why) = (Vec::new(), Vec::new());
        for found in found.meters {
            match found {
                Found::Meter(meter) => meters.push(meter),
                Found::Unavailable { name, why: reason } => why.push(format!("{name}: {reason}")),
            }
        }
        why.extend(found.absent.iter().map(|(family, why)| format!("{}: {why}", family.name())));
        if meters.is_empty() {
            return Err(Failure::new(MTAD_ERROR_UNAVAILABLE, why.join("; ")));
        }
        let recorder = Recorder::start(meters, rate)?;
        let marker = recorder.marker();
        session.listen(Box::new(move |phase, at| marker.mark(phase.map(Phase::name), at)));
        let begun = recorder.begin();
        *lock(&handle.meters)? = Some((recorder, begun));
        Ok(())
    };
    // SAFETY: as the caller says.
    unsafe { using(session, work) }
}

/// Ends the measurement. MTAD_ERROR_UNAVAILABLE if there is no figure, and mtad_session_last_error
/// says why: it never is 0 joules. The caller sets energy->struct_size.
///
/// # Safety
/// `session` is a session or NULL; `energy` is as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_energy_end(
    session: *mut mtad_session,
    energy: *mut mtad_energy,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        if energy.is_null() {
            return Err(memory::null("mtad_energy"));
        }
        let nothing = || Failure::new(MTAD_ERROR_UNAVAILABLE, "no measurement was begun");
        let (recorder, begun) = lock(&handle.meters)?.take().ok_or_else(nothing)?;
        let window = recorder.end(begun);
        let used = recorder.stop().total(&[window]);
        let used = used.map_err(|why| Failure::new(MTAD_ERROR_UNAVAILABLE, why.reason))?;
        let joules = |phase: &str| {
            used.phases.iter().filter(|p| p.phase == phase).map(|p| p.joules).sum::<f64>()
        };
        let found = mtad_energy {
            struct_size: 0,
            seconds: used.seconds,
            joules: used.joules,
            uncertainty: used.uncertainty,
            prefill_joules: joules("prefill"),
            draft_joules: joules("draft"),
            verify_joules: joules("verify"),
            sample_joules: joules("sample"),
            other_joules: joules("other"),
        };
        // SAFETY: as the caller says.
        unsafe { memory::give(energy, found)? };
        Ok(MTAD_OK)
    })
}

/// The last error of a call on this session, MTAD_OK if there was none. The caller sets
/// error->struct_size.
///
/// # Safety
/// `session` is a session or NULL, `error` as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_last_error(
    session: *const mtad_session,
    error: *mut mtad_error,
) -> mtad_status {
    // SAFETY: as the caller says.
    match unsafe { memory::get(session) } {
        // SAFETY: as the caller says.
        Some(handle) => unsafe { report(handle.fate.tell().as_ref(), error) },
        None => MTAD_ERROR_NULL,
    }
}

/// Frees a session and sets `*session` to NULL. A generation of it stays usable.
///
/// # Safety
/// `session` is NULL, or `*session` is NULL or a session that no thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_free(session: *mut *mut mtad_session) {
    // SAFETY: as the caller says.
    unsafe { memory::free(session) }
}
