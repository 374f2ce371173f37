//! Generating: with a callback, or one token after the other.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::memory;
use super::session::mtad_session;
use super::status::mtad_status::*;
use super::status::{Failure, Fate, Outcome, call, mtad_status, on, report};
use super::types::mtad_stop::*;
use super::types::*;
use crate::decode::{Origin, Phase, Settings, Strategy};
use crate::sampling::Warp;
use crate::session::generation::{Generation, Piece, Request, Session, StopReason};

/// A generation under way that is asked for its tokens. It holds its session until it is freed.
#[allow(non_camel_case_types)]
pub struct mtad_generation {
    running: Mutex<Option<Running>>,
    home: Arc<mtad_session>,
    fate: Fate,
}

struct Running {
    generation: Generation<'static>,
    told: Told,
}

/// The token that was handed out last, in a form that C can read.
#[derive(Default)]
struct Told {
    text: Vec<u8>,
}

impl Told {
    fn tell(&mut self, piece: &Piece) -> mtad_token {
        self.text.clear();
        self.text.extend_from_slice(piece.text.as_bytes());
        self.text.push(0);
        let flags = [
            (piece.token.is_some(), MTAD_TOKEN_HAS_ID),
            (piece.origin == Origin::Draft, MTAD_TOKEN_DRAFTED),
            (piece.log_prob.is_some(), MTAD_TOKEN_SCORED),
        ];
        mtad_token {
            struct_size: size_of::<mtad_token>(),
            text: self.text.as_ptr().cast::<c_char>(),
            text_length: piece.text.len(),
            log_prob: piece.log_prob.unwrap_or(f64::NAN),
            id: piece.token.unwrap_or(0),
            flags: flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(),
        }
    }
}

impl Drop for mtad_generation {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let session = running.and_then(|running| running.generation.into_session());
        // What a fault has left behind is not used again.
        match self.fate.tell().filter(|failure| failure.status == MTAD_ERROR_PANIC) {
            Some(failure) => drop(on(&self.home.fate, || Err(failure))),
            None => session.into_iter().for_each(|session| self.home.put(session)),
        }
    }
}

/// Fills in the defaults: those of `mtad run`, with seed 0. `size` is sizeof(mtad_request).
///
/// # Safety
/// `request` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_request_init(request: *mut mtad_request, size: usize) -> mtad_status {
    let Request { settings, max_tokens, .. } = Request::default();
    let defaults = mtad_request {
        struct_size: size,
        strategy: std::ptr::null(),
        max_tokens: max_tokens.unwrap_or(MTAD_NO_LIMIT),
        seed: settings.seed,
        top_k: settings.warp.top_k,
        temperature: settings.warp.temperature,
        top_p: settings.warp.top_p,
        min_p: settings.warp.min_p,
        repeat_penalty: settings.warp.repeat_penalty,
        gamma: settings.gamma,
        beam_width: settings.beam_width,
        tau: settings.tau,
        fallback: settings.fallback,
        rollback: settings.rollback,
        epsilon: settings.epsilon,
        delta: settings.delta,
        branching: std::ptr::null(),
        branching_count: 0,
        stop: std::ptr::null(),
        stop_count: 0,
        with_replacement: 0,
        score: 0,
    };
    // SAFETY: as the caller says.
    let work = || unsafe { memory::init(request, size, defaults) }.map(|()| MTAD_OK);
    call(work).unwrap_or_else(|failure| failure.status)
}

/// What C wants generated; a NULL request stands for the defaults.
///
/// # Safety
/// `request` is as mtad.h says.
unsafe fn request_of(
    request: *const mtad_request,
    session: &Session,
    home: &mtad_session,
) -> Outcome<Request> {
    let default = Strategy::default_for(session.pair().draft().is_some());
    let mut wanted = Request { cancel: home.cancel.clone(), ..Request::default() };
    wanted.settings.strategy = default;
    if !request.is_null() {
        // SAFETY: as the caller says.
        unsafe { fill(&mut wanted, &memory::take(request)?)? };
    }
    wanted.validate()?;
    Ok(wanted)
}

/// # Safety
/// What the request points to is there.
unsafe fn fill(wanted: &mut Request, from: &mtad_request) -> Outcome {
    // SAFETY: as the caller says.
    let (strategy, branching, stops) = unsafe {
        (
            memory::optional(from.strategy, "strategy")?,
            memory::slice(from.branching, from.branching_count, "branching")?,
            memory::slice(from.stop, from.stop_count, "stop")?,
        )
    };
    let defaults = Settings::default();
    wanted.settings = Settings {
        strategy: strategy.map_or(Ok(wanted.settings.strategy), str::parse)?,
        gamma: from.gamma,
        beam_width: from.beam_width,
        tau: from.tau,
        with_replacement: from.with_replacement != 0,
        branching: match branching {
            [] => defaults.branching.clone(),
            some => some.to_vec(),
        },
        fallback: from.fallback,
        rollback: from.rollback,
        epsilon: from.epsilon,
        delta: from.delta,
        warp: Warp {
            temperature: from.temperature,
            top_k: from.top_k,
            top_p: from.top_p,
            min_p: from.min_p,
            repeat_penalty: from.repeat_penalty,
            ..Warp::default()
        },
        seed: from.seed,
        score: from.score != 0,
        ..defaults
    };
    wanted.max_tokens = (from.max_tokens != MTAD_NO_LIMIT).then_some(from.max_tokens);
    for &stop in stops {
        // SAFETY: as the caller says.
        let stop = unsafe { memory::optional(stop, "a stop text")? };
        wanted.stop.push(stop.ok_or_else(|| memory::null("a stop text"))?.to_owned());
    }
    Ok(())
}

fn statistics(generation: &Generation<'_>, stop: mtad_stop) -> mtad_statistics {
    let counts = generation.statistics();
    mtad_statistics {
        struct_size: 0,
        prompt_tokens: generation.prompt_tokens() as u64,
        tokens: generation.tokens().len() as u64,
        rounds: counts.rounds(),
        drafted: counts.drafted(),
        accepted: counts.accepted(),
        acceptance_rate: counts.acceptance_rate().unwrap_or(f64::NAN),
        block_efficiency: counts.block_efficiency(),
        min_joint_ratio: counts.min_ratio().unwrap_or(f64::NAN),
        perplexity: generation.perplexity().unwrap_or(f64::NAN),
        draft_seconds: generation.seconds(Phase::Draft),
        verify_seconds: generation.seconds(Phase::Verify),
        sample_seconds: generation.seconds(Phase::Sample),
        stop: stop as i32,
        reserved: 0,
    }
}

fn stop_of(generation: &Generation<'_>) -> mtad_stop {
    match generation.stop_reason() {
        None => MTAD_STOP_NONE,
        Some(StopReason::MaxTokens) => MTAD_STOP_MAX_TOKENS,
        Some(StopReason::Eos) => MTAD_STOP_EOS,
        Some(StopReason::Stop) => MTAD_STOP_TEXT,
        Some(StopReason::Interrupt) => MTAD_STOP_CANCELLED,
        Some(StopReason::Context) => MTAD_STOP_CONTEXT,
    }
}

/// Goes on with the session's text and tells each token to `callback` (which may be NULL), on this
/// thread, until there is a reason to stop; `statistics` (which may be NULL) has the reason. Tokens
/// that were not told are not lost: the next generation begins with them. `request` may be NULL.
/// The callback must return, by `return`, and must not use the session but for
/// mtad_session_cancel.
///
/// # Safety
/// Handles and structs are as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_session_generate(
    session: *mut mtad_session,
    request: *const mtad_request,
    callback: mtad_token_callback,
    user_data: *mut c_void,
    statistics_out: *mut mtad_statistics,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    let work = |session: &mut Session| {
        if !statistics_out.is_null() {
            // SAFETY: as the caller says. A wrong size is refused before anything is done.
            unsafe { memory::give(statistics_out, mtad_statistics::NOTHING)? };
        }
        // SAFETY: as the caller says.
        let request = unsafe { request_of(request, session, handle)? };
        handle.cancel.store(false, Ordering::Relaxed);
        let mut generation = session.resume(&request)?;
        let (mut told, mut stopped, mut failed) = (Told::default(), false, None);
        while !stopped && let Some(piece) = generation.next() {
            match (piece, callback) {
                (Ok(piece), Some(callback)) => {
                    let token = told.tell(&piece);
                    // SAFETY: the callback is the caller's, and takes these.
                    stopped = unsafe { callback(&token, user_data) != 0 };
                }
                (Ok(_), None) => {}
                (Err(error), _) => failed = Some(error),
            }
        }
        let stop = if stopped { MTAD_STOP_CALLBACK } else { stop_of(&generation) };
        if !statistics_out.is_null() {
            // SAFETY: as the caller says.
            unsafe { memory::give(statistics_out, statistics(&generation, stop))? };
        }
        failed.map_or(Ok(MTAD_OK), |error| Err(error.into()))
    };
    on(&handle.fate, || handle.with(work))
}

/// Goes on with the session's text, for mtad_generation_next to ask for. `*generation` is NULL
/// unless it returns MTAD_OK; errors are the session's. The session is busy until the generation
/// is freed. `request` may be NULL.
///
/// # Safety
/// Handles and structs are as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_generation_start(
    session: *mut mtad_session,
    request: *const mtad_request,
    generation: *mut *mut mtad_generation,
) -> mtad_status {
    // SAFETY: as the caller says.
    let placed = unsafe { memory::place(generation) };
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(session) }) else { return MTAD_ERROR_NULL };
    on(&handle.fate, || {
        placed?;
        // SAFETY: as the caller says.
        let wanted = handle.with(|session| unsafe { request_of(request, session, handle) })?;
        handle.cancel.store(false, Ordering::Relaxed);
        let started = match handle.take()?.into_generation(&wanted) {
            Ok(started) => started,
            Err((session, error)) => {
                handle.put(session);
                return Err(error.into());
            }
        };
        // SAFETY: it is the Arc that `memory::handle` made a pointer of, and it is not freed.
        let home = unsafe {
            Arc::increment_strong_count(session.cast_const());
            Arc::from_raw(session.cast_const())
        };
        let running = Mutex::new(Some(Running { generation: started, told: Told::default() }));
        let made = Arc::new(mtad_generation { running, home, fate: Fate::default() });
        // SAFETY: as the caller says; it is not null.
        unsafe { memory::handle(generation, made) };
        Ok(MTAD_OK)
    })
}

impl mtad_generation {
    fn with<R>(&self, work: impl FnOnce(&mut Running) -> Outcome<R>) -> Outcome<R> {
        let busy = || Failure::new(MTAD_ERROR_BUSY, "another thread uses the generation");
        let mut running = self.running.try_lock().map_err(|_| busy())?;
        work(running.as_mut().ok_or_else(busy)?)
    }
}

/// The next token; MTAD_DONE if there is none. Its text is there until the next call on this
/// generation. The caller sets token->struct_size.
///
/// # Safety
/// `generation` is a generation or NULL, `token` as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_generation_next(
    generation: *mut mtad_generation,
    token: *mut mtad_token,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(generation) }) else { return MTAD_ERROR_NULL };
    let work = |running: &mut Running| {
        // SAFETY: as the caller says. A wrong size is refused before a token is lost.
        unsafe { memory::give(token, mtad_token::NOTHING)? };
        let Running { generation, told } = running;
        match generation.next().transpose()? {
            // SAFETY: as the caller says.
            Some(piece) => unsafe { memory::give(token, told.tell(&piece)).map(|()| MTAD_OK) },
            None => Ok(MTAD_DONE),
        }
    };
    on(&handle.fate, || handle.with(work))
}

/// Counts and times so far. The caller sets statistics->struct_size.
///
/// # Safety
/// `generation` is a generation or NULL, `statistics` as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_generation_statistics(
    generation: *const mtad_generation,
    statistics: *mut mtad_statistics,
) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(generation) }) else { return MTAD_ERROR_NULL };
    let work = |running: &mut Running| {
        let found = self::statistics(&running.generation, stop_of(&running.generation));
        // SAFETY: as the caller says.
        unsafe { memory::give(statistics, found).map(|()| MTAD_OK) }
    };
    on(&handle.fate, || handle.with(work))
}

/// Stops the generation after its round. Any thread may call it at any time before the generation
/// is freed.
///
/// # Safety
/// `generation` is a generation or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_generation_cancel(generation: *const mtad_generation) -> mtad_status {
    // SAFETY: as the caller says.
    let Some(handle) = (unsafe { memory::get(generation) }) else { return MTAD_ERROR_NULL };
    handle.home.cancel.store(true, Ordering::Relaxed);
    MTAD_OK
}

/// The last error of a call on this generation, MTAD_OK if there was none. The caller sets
/// error->struct_size.
///
/// # Safety
/// `generation` is a generation or NULL, `error` as mtad.h says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_generation_last_error(
    generation: *const mtad_generation,
    error: *mut mtad_error,
) -> mtad_status {
    // SAFETY: as the caller says.
    match unsafe { memory::get(generation) } {
        // SAFETY: as the caller says.
        Some(handle) => unsafe { report(handle.fate.tell().as_ref(), error) },
        None => MTAD_ERROR_NULL,
    }
}

/// Frees a generation and sets `*generation` to NULL; its session can be used again, and goes on
/// after the last token that was handed out.
///
/// # Safety
/// `generation` is NULL, or `*generation` is NULL or a generation that no thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mtad_generation_free(generation: *mut *mut mtad_generation) {
    // SAFETY: as the caller says.
    unsafe { memory::free(generation) }
}

impl mtad_token {
    const NOTHING: mtad_token = {
        const EMPTY: &CStr = c"";
        mtad_token {
            struct_size: 0,
            text: EMPTY.as_ptr(),
            text_length: 0,
            log_prob: f64::NAN,
            id: 0,
            flags: 0,
        }
    };
}

impl mtad_statistics {
    const NOTHING: mtad_statistics = mtad_statistics {
        struct_size: 0,
        prompt_tokens: 0,
        tokens: 0,
        rounds: 0,
        drafted: 0,
        accepted: 0,
        acceptance_rate: f64::NAN,
        block_efficiency: f64::NAN,
        min_joint_ratio: f64::NAN,
        perplexity: f64::NAN,
        draft_seconds: 0.0,
        verify_seconds: 0.0,
        sample_seconds: 0.0,
        stop: MTAD_STOP_NONE as i32,
        reserved: 0,
    };
}
