//! A team of threads for one forward pass.
//!
//! A pass is a few hundred short operations. Forking and joining a thread pool for each costs 2
//! to 30 microseconds; so the pool is entered once per pass, and in between the threads meet at
//! spinning barriers, which cost well under one. Threads spin a bounded time, then yield, so that
//! a busy machine does not stall.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rounds of spinning before a waiting thread starts to yield: some tens of microseconds, longer
/// than the serial stretches between operations.
const SPINS: u32 = 4096;

/// Threads that can be called together for a pass. The calling thread is one of them.
#[derive(Debug)]
pub(super) struct Team {
    /// The other threads; none if one thread is all.
    pool: Option<rayon::ThreadPool>,
    /// Held during a pass: two passes that each waited for a worker of the other would never end.
    entered: Mutex<()>,
}

impl Team {
    /// A team of `threads`, the caller's included.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let pool = match threads {
            0 | 1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n - 1)
                    .thread_name(|i| format!("mtad-cpu-{}", i + 1))
                    .build()?,
            ),
        };
        Ok(Team { pool, entered: Mutex::new(()) })
    }

    /// Threads in the team.
    pub fn threads(&self) -> usize {
        1 + self.pool.as_ref().map_or(0, |pool| pool.current_num_threads())
    }

    /// Calls the team together while `lead` runs on the calling thread; alone if `!together`.
    pub fn enter<R>(&self, together: bool, lead: impl FnOnce(&Crew<'_>) -> R) -> R {
        let meeting = Meeting::default();
        match &self.pool {
            Some(pool) if together => pool.in_place_scope(|scope| {
                let _entered = self.entered.lock().unwrap_or_else(|e| e.into_inner());
                let meeting = &meeting;
                scope.spawn_broadcast(move |_, ctx| meeting.work(ctx.index() + 1));
                let crew = Crew { meeting, threads: self.threads() };
                // Dropped also when `lead` panics: the scope waits for the workers to leave.
                let _dismiss = Dismiss(meeting);
                lead(&crew)
            }),
            _ => lead(&Crew { meeting: &meeting, threads: 1 }),
        }
    }
}

/// The team while it is together.
pub(super) struct Crew<'t> {
    meeting: &'t Meeting,
    threads: usize,
}

impl Crew<'_> {
    /// Threads that take part.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `job(thread)` once on every thread and returns when all are done.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        if self.threads == 1 {
            return job(0);
        }
        self.meeting.call(job, self.threads - 1);
    }
}

/// A job as the workers see it. The lifetime is erased: see [`Meeting::call`].
type Job = *const (dyn Fn(usize) + Sync);

/// Where leader and workers meet: a slot for the job at hand, and two counters.
#[derive(Default)]
struct Meeting {
    /// Written by the leader only while no worker is at work.
    job: UnsafeCell<Option<Job>>,
    /// Counts jobs; a change tells the workers to read `job`.
    epoch: AtomicUsize,
    /// Workers that are done with the current job.
    done: AtomicUsize,
    /// What a worker panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written before `epoch` is released and read after it is acquired, and written
// again only after every worker has released `done` (or, on dismissal, after the last call
// returned), so it is never read and written at once. The pointee is `Sync`.
unsafe impl Sync for Meeting {}

impl Meeting {
    fn call(&self, job: &(dyn Fn(usize) + Sync), workers: usize) {
        // SAFETY: only the lifetime changes. This function does not return, nor unwind, before
        // every worker has counted itself done, after which none touches the job again.
        let erased: Job = unsafe { std::mem::transmute(job as *const (dyn Fn(usize) + Sync + '_)) };
        // SAFETY: no worker is at work: see `Sync` above.
        unsafe { *self.job.get() = Some(erased) };
        self.done.store(0, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::Release);
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        wait(|| self.done.load(Ordering::Acquire) == workers);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        let theirs = self.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    /// A worker's life during one pass.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            wait(|| self.epoch.load(Ordering::Acquire) != seen);
            seen += 1;
            // SAFETY: the leader wrote it before it released `epoch`.
            let Some(job) = (unsafe { *self.job.get() }) else { return };
            // SAFETY: the leader keeps the job alive until this worker is done.
            let job = unsafe { &*job };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(thread))) {
                *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }
}

/// Sends the workers home when the pass ends.
struct Dismiss<'a>(&'a Meeting);

impl Drop for Dismiss<'_> {
    fn drop(&mut self) {
        // SAFETY: every call has returned, so no worker is at work.
        unsafe { *self.0.job.get() = None };
        self.0.epoch.fetch_add(1, Ordering::Release);
    }
}

fn wait(ready: impl Fn() -> bool) {
    let mut spins = 0;
    while !ready() {
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_every_job_once() {
        let team = Team::new(4).unwrap();
        let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        team.enter(true, |crew| {
            assert_eq!(crew.threads(), 4);
            for _ in 0..1000 {
                crew.run(&|t| {
                    counts[t].fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1000));
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3).unwrap();
        for bad in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.enter(true, |crew| crew.run(&|t| assert_ne!(t, bad, "on purpose")));
            }));
            assert!(caught.is_err());
        }
        assert_eq!(team.enter(true, |crew| crew.threads()), 3);
    }
}
