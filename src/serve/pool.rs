//! The sequences that answer: threads with a session each, and the queue before them.
//!
//! What a job asks for is one generation. Its events go to whoever waits for it, and it ends with exactly one of
//! [`Event::Ended`] and [`Event::Failed`]. Who goes away sets the job's cancel flag, or drops the receiver; the
//! sequence is free again within a round.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::metrics::Metrics;
use super::prefixes::Prefixes;
use crate::decode::{Pieces, Statistics};
use crate::energy::Account;
use crate::engine::SessionOptions;
use crate::error::{Error, Result, words_of};
use crate::lm::Token;
use crate::session::generation::{Piece, Request, Session, StopReason};
use crate::session::pair::Pair;

/// A generation that somebody waits for.
pub(super) struct Job {
    pub prompt: Vec<Token>,
    pub request: Request,
    /// Which of the answers to a request it is.
    pub index: usize,
    pub events: UnboundedSender<(usize, Event)>,
}

/// What a job has to tell.
#[derive(Debug)]
pub(super) enum Event {
    /// Its prompt was evaluated.
    Begun,
    /// The tokens of a round, and perhaps text that was held back.
    Round(Vec<Piece>),
    Ended(Box<Outcome>),
    Failed(Error),
}

/// How a generation ended.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub stop: StopReason,
    pub prompt_tokens: usize,
    /// Tokens of the prompt that were evaluated before.
    pub reused: usize,
    pub tokens: usize,
    pub statistics: Statistics,
    /// Seconds from the prompt's end to the last token.
    pub seconds: f64,
    pub joules: Option<f64>,
}

/// How much there is of everything.
pub(super) struct Sizes {
    /// Sequences.
    pub parallel: usize,
    /// Jobs that wait beyond those.
    pub queue: usize,
    /// Bytes of kept beginnings; see [`super::Options`].
    pub prefix_memory: Option<u64>,
}

/// How long a piece of a prompt takes where others wait for their next tokens.
const PACE_BESIDE: Duration = Duration::from_millis(100);

/// Threads with a session each.
pub(super) struct Pool {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    pair: Pair,
    prefixes: Prefixes,
    options: SessionOptions,
    /// Energy, if there is a meter.
    account: Option<Account>,
    metrics: Arc<Metrics>,
    /// The most jobs that wait.
    queue: usize,
    parallel: usize,
    state: Mutex<State>,
    posted: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Job, Instant)>,
    /// The cancel flags of what runs.
    running: Vec<Arc<AtomicBool>>,
    is_stopping: bool,
    /// Seconds that a job takes, lately.
    job_seconds: f64,
}

/// Why jobs were not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many wait; seconds after which there may be room.
    Full { retry_after: u64 },
    /// The server ends.
    Stopping,
}

impl Pool {
    /// Sequences with empty caches, and room for jobs and beginnings of texts.
    ///
    /// # Errors
    /// As [`Pair::session`]; the system has no threads.
    pub fn new(
        pair: &Pair,
        options: SessionOptions,
        Sizes { parallel, queue, prefix_memory }: Sizes,
        account: Option<Account>,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let sessions: Vec<Session> =
            (0..parallel).map(|_| pair.session(&options)).collect::<Result<_>>()?;
        let prefix_memory = prefix_memory.unwrap_or_else(|| {
            let row = pair.row_bytes(options.cache_type);
            let rows = (parallel * options.context.unwrap_or(0)) as u64;
            let left = pair.target().budget().left().unwrap_or(u64::MAX);
            rows.saturating_mul(row).min(left / 4)
        });
        let inner = Arc::new(Inner {
            pair: pair.clone(),
            prefixes: Prefixes::new(prefix_memory),
            options,
            account,
            metrics,
            queue,
            parallel,
            state: Mutex::default(),
            posted: Condvar::new(),
        });
        let pool = Pool { inner, threads: Mutex::default() };
        for (i, session) in sessions.into_iter().enumerate() {
            let inner = pool.inner.clone();
            let thread = std::thread::Builder::new().name(format!("mtad sequence {i}"));
            let thread = thread.spawn(move || inner.work(session));
            pool.lock_threads().push(thread.map_err(|e| Error::io("a thread", e))?);
        }
        Ok(pool)
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most jobs that one request may have.
    pub fn most_jobs(&self) -> usize {
        self.inner.parallel + self.inner.queue
    }

    /// Jobs that wait, and jobs that run.
    pub fn load(&self) -> (usize, usize) {
        let state = self.inner.lock();
        (state.waiting.len(), state.running.len())
    }

    /// Joules since the start, if there is a meter.
    pub fn joules(&self) -> Option<f64> {
        self.inner.account.as_ref()?.joules()
    }

    /// Takes all of these jobs, or none.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Refused> {
        let mut state = self.inner.lock();
        if state.is_stopping {
            return Err(Refused::Stopping);
        }
        // Those whose clients went away are in nobody's way.
        state.waiting.retain(|(job, _)| !job.is_abandoned());
        let idle = self.inner.parallel - state.running.len();
        if state.waiting.len() + jobs.len() > self.inner.queue + idle {
            let rounds = (state.waiting.len() + 1).div_ceil(self.inner.parallel);
            let seconds = state.job_seconds * rounds as f64;
            return Err(Refused::Full { retry_after: seconds.ceil().clamp(1.0, 60.0) as u64 });
        }
        let now = Instant::now();
        state.waiting.extend(jobs.into_iter().map(|job| (job, now)));
        drop(state);
        self.inner.posted.notify_all();
        Ok(())
    }

    /// Takes no more jobs, and fails those that wait. What runs goes on.
    pub fn refuse(&self) {
        let mut state = self.inner.lock();
        state.is_stopping = true;
        for (job, _) in state.waiting.drain(..) {
            job.tell(Event::Failed(Error::Cancelled));
        }
        drop(state);
        self.inner.posted.notify_all();
    }

    /// Cuts what runs.
    pub fn cut(&self) {
        self.inner.lock().running.iter().for_each(|cancel| cancel.store(true, Ordering::Relaxed));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.refuse();
        self.cut();
        for thread in self.lock_threads().drain(..) {
            // What panicked was told to whom it concerned.
            let _ = thread.join();
        }
    }
}

impl Job {
    fn is_abandoned(&self) -> bool {
        self.events.is_closed() || self.request.cancel.load(Ordering::Relaxed)
    }

    fn tell(&self, event: Event) {
        // Whoever has gone hears nothing.
        let _ = self.events.send((self.index, event));
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers jobs until there are no more to come.
    fn work(&self, session: Session) {
        let mut session = Some(session);
        while let Some((job, posted)) = self.next_job() {
            let cancel = job.request.cancel.clone();
            if !job.is_abandoned() {
                self.metrics.waited(posted.elapsed());
                let begun = Instant::now();
                self.answer_with(&mut session, &job, posted);
                let mut state = self.lock();
                state.job_seconds += 0.2 * (begun.elapsed().as_secs_f64() - state.job_seconds);
            }
            self.lock().running.retain(|running| !Arc::ptr_eq(running, &cancel));
        }
    }

    fn next_job(&self) -> Option<(Job, Instant)> {
        let mut state = self.lock();
        loop {
            if let Some(next) = state.waiting.pop_front() {
                state.running.push(next.0.request.cancel.clone());
                return Some(next);
            }
            if state.is_stopping {
                return None;
            }
            state = self.posted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Answers a job. If that panics or leaves the session in doubt, the next job has a new one.
    fn answer_with(&self, slot: &mut Option<Session>, job: &Job, posted: Instant) {
        let session = match slot.take() {
            Some(session) => Ok(session),
            None => self.pair.session(&self.options),
        };
        let answered = session.and_then(|mut session| {
            let answered =
                catch_unwind(AssertUnwindSafe(|| self.answer(&mut session, job, posted)));
            let outcome = answered.unwrap_or_else(|panic| {
                let device = self.pair.target().describe();
                Err(Error::Device {
                    device,
                    what: format!("a sequence panicked: {}", words_of(&*panic)),
                })
            })?;
            *slot = Some(session);
            Ok(outcome)
        });
        match answered {
            Ok(outcome) => {
                self.metrics.ended(&outcome, job.request.settings.strategy);
                job.tell(Event::Ended(Box::new(outcome)));
            }
            Err(error) => {
                tracing::error!(%error, "a sequence failed");
                job.tell(Event::Failed(error));
            }
        }
    }

    fn answer(&self, session: &mut Session, job: &Job, posted: Instant) -> Result<Outcome> {
        let share = self.account.as_ref().map(Account::share);
        let is_alone = self.lock().running.len() == 1;
        session.pace_prompts(if is_alone { Pieces::LONGEST } else { PACE_BESIDE });
        self.prefixes.lend(session, &job.prompt);
        let mut generation = session.generate_from(&job.prompt, &job.request)?;
        job.tell(Event::Begun);
        // Others who ask the same meanwhile need not wait for the answer.
        if generation.prefill().evaluated > 0 {
            self.prefixes.keep(generation.session());
        }
        let begun = Instant::now();
        let mut last: Option<Instant> = None;
        while let Some(pieces) = generation.next_round() {
            let pieces = pieces?;
            let now = Instant::now();
            let tokens = pieces.iter().filter(|piece| piece.token.is_some()).count();
            match last.replace(now) {
                None => self.metrics.first_token(posted.elapsed()),
                Some(last) => self.metrics.between(now - last, tokens),
            }
            self.metrics.tokens(&pieces);
            job.tell(Event::Round(pieces));
            if job.events.is_closed() {
                job.request.cancel.store(true, Ordering::Relaxed);
            }
        }
        self.prefixes.keep(generation.session());
        let seconds = last.map_or(Duration::ZERO, |last| last - begun).as_secs_f64();
        Ok(Outcome {
            stop: generation.stop_reason().unwrap_or(StopReason::Interrupt),
            prompt_tokens: generation.prompt_tokens(),
            reused: generation.prefill().reused,
            tokens: generation.tokens().len(),
            statistics: generation.statistics().clone(),
            seconds,
            joules: share.and_then(|share| share.joules()),
        })
    }
}
