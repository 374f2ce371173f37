//! A pool of threads for the operations of a forward pass.
//!
//! A pass is a few hundred short operations. Forking and joining a thread pool for each costs 2
//! to 30 microseconds, as much as some of them take. So the pool's threads are called once, then
//! wait for operations by spinning, and stay a moment after the pass in case another follows, as
//! it does in decoding.
//!
//! An operation is cut into parts, and whoever is there takes the next one. The leader never waits
//! for a thread that has not begun: on a busy machine, where the system runs something else in
//! its place, the leader does all parts itself. Which thread does which part has no say in the
//! result.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Rounds of spinning before a waiting thread yields, or goes home if no pass is under way: about
/// a tenth of a millisecond.
const SPINS: u32 = 4096;

/// Threads that work together during a pass. The calling thread is one of them.
#[derive(Debug)]
pub(super) struct Pool {
    /// The other threads; none if one thread is all.
    others: Option<rayon::ThreadPool>,
    barrier: Arc<Barrier>,
    /// Held during a pass: there is one leader at a time.
    leading: Mutex<()>,
}

impl Pool {
    /// A pool of `threads`, the caller's included.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let others = match threads {
            0 | 1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n - 1)
                    .thread_name(|i| format!("mtad-cpu-{}", i + 1))
                    .build()?,
            ),
        };
        Ok(Pool { others, barrier: Arc::default(), leading: Mutex::new(()) })
    }

    /// Threads in the pool.
    pub fn threads(&self) -> usize {
        1 + self.others.as_ref().map_or(0, |pool| pool.current_num_threads())
    }

    /// Calls the threads while `lead` runs on the calling thread; nobody if `!together`.
    pub fn enter<R>(&self, together: bool, lead: impl FnOnce(&Scope<'_>) -> R) -> R {
        let Some(others) = self.others.as_ref().filter(|_| together) else {
            return lead(&Scope { barrier: None, threads: 1 });
        };
        let _leading = self.leading.lock().unwrap_or_else(|e| e.into_inner());
        self.barrier.in_pass.store(true, Ordering::Release);
        // Ends the pass also when `lead` panics.
        let _end = EndOfPass(&self.barrier);
        if self.barrier.present.load(Ordering::Acquire) == 0 {
            let barrier = self.barrier.clone();
            others.spawn_broadcast(move |_| barrier.attend());
        }
        lead(&Scope { barrier: Some(&self.barrier), threads: self.threads() })
    }
}

/// The threads during a pass.
pub(super) struct Scope<'t> {
    barrier: Option<&'t Barrier>,
    threads: usize,
}

impl Scope<'_> {
    /// Threads that may take part.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `job(part)` once for each of `parts` parts, on whichever threads are there, and
    /// returns when all are done.
    pub fn run(&self, parts: usize, job: &(dyn Fn(usize) + Sync)) {
        match self.barrier {
            Some(barrier) if parts > 1 => barrier.call(parts, job),
            _ => (0..parts).for_each(job),
        }
    }
}

/// A job as the workers see it. The lifetime is erased: see [`Barrier::call`].
type Job = *const (dyn Fn(usize) + Sync);

/// Where leader and workers meet.
#[derive(Default)]
struct Barrier {
    /// The job at hand and its parts. Written by the leader only while nobody is at work.
    job: UnsafeCell<Option<(Job, usize)>>,
    /// The job's number (high half), whether it still takes helpers ([`OPEN`]), and how many
    /// workers are at work on it (low bits).
    state: AtomicU64,
    /// The next part that nobody has taken.
    next: AtomicUsize,
    /// What a worker panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Whether a pass is under way.
    in_pass: AtomicBool,
    /// Workers that were called and have not gone home.
    present: AtomicUsize,
}

/// In [`Barrier::state`]: the job takes helpers.
const OPEN: u64 = 1 << 31;
/// In [`Barrier::state`]: the count of helpers.
const HELPERS: u64 = OPEN - 1;

// SAFETY: `job` is written by the leader while the state is closed and counts no helper, and read
// by workers only after they have counted themselves in while it was open; the leader waits for
// the count to be 0 before it goes on. So it is never read and written at once, and its pointee,
// which is `Sync`, is alive whenever it is used.
unsafe impl Sync for Barrier {}
// SAFETY: as above; the pointer in `job` is not used outside of a call.
unsafe impl Send for Barrier {}

impl std::fmt::Debug for Barrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Barrier").field("present", &self.present).finish_non_exhaustive()
    }
}

impl Barrier {
    /// Runs a job with whoever helps.
    fn call(&self, parts: usize, job: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes. This function does not return, nor unwind, before
        // the job is closed and no helper is left, after which nobody touches it.
        let erased: Job = unsafe { std::mem::transmute(job as *const (dyn Fn(usize) + Sync + '_)) };
        // SAFETY: the last job is closed and has no helper: see `Sync` above.
        unsafe { *self.job.get() = Some((erased, parts)) };
        self.next.store(0, Ordering::Relaxed);
        let number = (self.state.load(Ordering::Relaxed) >> 32) + 1;
        self.state.store(number << 32 | OPEN, Ordering::Release);
        let own = catch_unwind(AssertUnwindSafe(|| self.take_parts(parts, job)));
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.state.load(Ordering::Acquire) & HELPERS != 0 {
            pause(&mut spins);
        }
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        let theirs = self.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    fn take_parts(&self, parts: usize, job: &(dyn Fn(usize) + Sync)) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return;
            }
            job(part);
        }
    }

    /// A worker's stay: helps with jobs until no pass has been under way for a while.
    fn attend(&self) {
        self.present.fetch_add(1, Ordering::AcqRel);
        let (mut spins, mut last) = (0, 0);
        loop {
            let state = self.state.load(Ordering::Acquire);
            let joined = state & OPEN != 0
                && state >> 32 != last
                && self
                    .state
                    .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok();
            if joined {
                (spins, last) = (0, state >> 32);
                self.help();
                self.state.fetch_sub(1, Ordering::Release);
            } else if spins >= SPINS && !self.in_pass.load(Ordering::Acquire) {
                break;
            } else {
                pause(&mut spins);
            }
        }
        self.present.fetch_sub(1, Ordering::AcqRel);
    }

    /// Does parts of the job that this worker has counted itself into.
    fn help(&self) {
        // SAFETY: the leader wrote the job before it opened it, and neither changes nor frees it
        // while this worker is counted.
        let Some((job, parts)) = (unsafe { *self.job.get() }) else { return };
        // SAFETY: as above.
        let job = unsafe { &*job };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_parts(parts, job))) {
            *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
        }
    }
}

/// Says that no operation follows for now.
struct EndOfPass<'a>(&'a Barrier);

impl Drop for EndOfPass<'_> {
    fn drop(&mut self) {
        self.0.in_pass.store(false, Ordering::Release);
    }
}

fn pause(spins: &mut u32) {
    if *spins < SPINS {
        *spins += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_job_is_done_once() {
        let pool = Pool::new(4).unwrap();
        let counts: Vec<AtomicUsize> = (0..7).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..100 {
            pool.enter(true, |scope| {
                assert_eq!(scope.threads(), 4);
                for _ in 0..100 {
                    scope.run(7, &|part| {
                        counts[part].fetch_add(1, Ordering::Relaxed);
                    });
                    let sum: usize = counts.iter().map(|c| c.load(Ordering::Relaxed)).sum();
                    assert_eq!(sum % 7, 0, "a part was not done when the job returned");
                }
            });
        }
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 10_000));
    }

    #[test]
    fn leaders_on_several_threads_do_not_disturb_each_other() {
        let pool = Pool::new(3).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        pool.enter(true, |scope| {
                            scope.run(5, &|part| {
                                sum.fetch_add(part, Ordering::Relaxed);
                            });
                        });
                        assert_eq!(sum.into_inner(), 10);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_any_part_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        for bad in 0..6 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.enter(true, |scope| scope.run(6, &|part| assert_ne!(part, bad, "on purpose")));
            }));
            assert!(caught.is_err());
        }
        let done = AtomicUsize::new(0);
        pool.enter(true, |scope| {
            scope.run(6, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(done.into_inner(), 6);
    }
}
