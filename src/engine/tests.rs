//! The scheduler over a device that only counts.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;

use super::memory::Budget;
use super::pipeline::Pipeline;
use super::scheduler::Scheduler;
use super::sequence::Handle;
use crate::error::{Error, Result};
use crate::exec::{CacheType, Executor, KvCache, Loaded, Rows, Stage, Workspace};
use crate::gguf::{Gguf, SharedTensor, Writer};
use crate::graph::{BufferId, Builder, KvShape, Program};
use crate::lm::{Batch, Lm, Row, Want};
use crate::quant::BlockType;

/// A device whose logits are the token of each row and the number of rows that it sees.
#[derive(Default)]
struct Counting {
    /// For each pass: the thread that ran it, and the rows of each segment.
    passes: Mutex<Vec<(ThreadId, Vec<usize>)>>,
    /// How long a pass takes.
    milliseconds: AtomicUsize,
    panics: AtomicBool,
    lost: AtomicBool,
}

struct CountingStage(Arc<Counting>);
struct NoCache;
struct Logits(Vec<f32>);

impl Executor for Counting {
    fn describe(&self) -> String {
        "counting".to_owned()
    }

    fn weight_memory(&self, _program: &Program, _ops: Range<usize>) -> u64 {
        0
    }

    fn load(
        self: Arc<Self>,
        _program: &Arc<Program>,
        _ops: Range<usize>,
        _loaded: Loaded<'_>,
    ) -> Result<Box<dyn Stage>> {
        Ok(Box::new(CountingStage(self)))
    }
}

impl Stage for CountingStage {
    fn cache(&self, _cache_type: CacheType) -> Box<dyn KvCache> {
        Box::new(NoCache)
    }

    fn workspace(&self) -> Box<dyn Workspace> {
        Box::new(Logits(Vec::new()))
    }

    fn run(
        &self,
        rows: &Rows<'_>,
        caches: &mut [&mut dyn KvCache],
        workspace: &mut dyn Workspace,
    ) -> Result<()> {
        assert_eq!(caches.len(), rows.segments.len());
        let Logits(logits) = crate::exec::own(workspace);
        logits.clear();
        for segment in rows.segments {
            for row in segment.rows.clone().filter(|row| rows.wanted.contains(&(*row as u32))) {
                let position = segment.position(row, rows.ancestors);
                logits.extend([rows.tokens[row] as f32, position as f32]);
            }
        }
        let lens = rows.segments.iter().map(|segment| segment.rows.len()).collect();
        self.0.passes.lock().unwrap().push((thread::current().id(), lens));
        thread::sleep(Duration::from_millis(self.0.milliseconds.load(Ordering::Relaxed) as u64));
        assert!(!self.0.panics.load(Ordering::Relaxed), "on purpose");
        match self.0.lost.load(Ordering::Relaxed) {
            true => Err(Error::DeviceLost { device: "counting".into(), reason: "pulled".into() }),
            false => Ok(()),
        }
    }
}

impl Workspace for Logits {
    fn write(&mut self, _buffer: BufferId, _rows: &[f32]) -> Result<()> {
        Ok(())
    }

    fn read<'a>(
        &'a mut self,
        _buffer: BufferId,
        rows: Range<usize>,
        _copy: &'a mut Vec<f32>,
    ) -> Result<&'a [f32]> {
        Ok(&self.0[2 * rows.start..2 * rows.end])
    }
}

impl KvCache for NoCache {
    fn move_rows(&mut self, _moves: &[(usize, usize)]) -> Result<()> {
        Ok(())
    }

    fn save_rows(&self, _slots: Range<usize>, _out: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn load_rows(&mut self, _slots: Range<usize>, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn fork(&self, _slots: usize) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(NoCache))
    }

    fn row_bytes(&self) -> usize {
        0
    }
}

fn engine() -> (Arc<Counting>, Arc<Scheduler>) {
    let mut writer = Writer::new();
    writer.tensor("w", &[2, 2], BlockType::F32, vec![0; 16]);
    let file = Arc::new(Gguf::from_vec("test", writer.to_vec()).unwrap());
    let mut b = Builder::new("test", 1000);
    let table = b.table(SharedTensor::find(&file, "w").unwrap());
    let x = b.embed(table, 1.0).unwrap();
    b.begin_layer(KvShape { heads: 1, head_dim: 2 });
    let logits = b.select_rows(x);
    let program = Arc::new(b.finish(logits).unwrap());
    let device = Arc::new(Counting::default());
    let placement: Vec<(Arc<dyn Executor>, usize)> = vec![(device.clone(), 1)];
    let pipeline = Pipeline::load(program, placement, &mut |_| Ok(())).unwrap();
    (device, Arc::new(Scheduler::new(pipeline)))
}

fn session(scheduler: &Arc<Scheduler>) -> Handle {
    let nothing = Budget::of(0).take(&[]).unwrap();
    Handle::new(scheduler.clone(), 1000, CacheType::F16, nothing)
}

/// Evaluates a token at the end of the line and commits it.
fn step(session: &mut Handle, token: u32) -> Result<()> {
    let position = session.committed();
    let outputs = session.eval(&Batch::chain(&[token], None, Row(0), Want::Logits))?;
    assert_eq!(outputs.logits(0), [token as f32, position as f32]);
    session.commit(Some(Row(0)))
}

#[test]
fn a_lone_session_runs_its_passes_on_its_own_thread() {
    let (device, scheduler) = engine();
    let mut a = session(&scheduler);
    let mut b = session(&scheduler);
    for _ in 0..10 {
        // (Two sessions of one thread are one after the other: neither waits for the other.)
        step(&mut a, 0).unwrap();
        step(&mut b, 1).unwrap();
    }
    let passes = device.passes.lock().unwrap();
    assert_eq!(passes.len(), 20);
    assert!(passes.iter().all(|(thread, lens)| *thread == thread::current().id() && *lens == [1]));
}

#[test]
fn sessions_of_several_threads_share_passes() {
    let (device, scheduler) = engine();
    device.milliseconds.store(2, Ordering::Relaxed);
    let (threads, steps) = (4, 50);
    let begin = Barrier::new(threads);
    thread::scope(|scope| {
        for i in 0..threads {
            let (scheduler, begin) = (&scheduler, &begin);
            scope.spawn(move || {
                let mut session = session(scheduler);
                begin.wait();
                (0..steps).for_each(|n| step(&mut session, (i + n) as u32 % 2).unwrap());
            });
        }
    });
    let counts = scheduler.counts();
    assert_eq!(counts.posts, (threads * steps) as u64);
    assert_eq!(counts.rows, counts.posts);
    assert_eq!(device.passes.lock().unwrap().len() as u64, counts.passes);
    // Nearly all passes are of four; some at both ends and where a thread was late are not.
    assert!(counts.passes < (2 * steps) as u64, "{counts:?}");
}

#[test]
fn who_stays_away_is_not_waited_for_again() {
    let (device, scheduler) = engine();
    device.milliseconds.store(20, Ordering::Relaxed);
    thread::scope(|scope| {
        let scheduler = &scheduler;
        let others: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(move || (0..3).for_each(|_| step(&mut session(scheduler), 1).unwrap()))
            })
            .collect();
        others.into_iter().for_each(|other| other.join().unwrap());
    });
    let mut alone = session(&scheduler);
    step(&mut alone, 0).unwrap();
    let begun = std::time::Instant::now();
    (0..5).for_each(|_| step(&mut alone, 0).unwrap());
    // Five passes, and no waiting between them.
    assert!(begun.elapsed() < Duration::from_millis(5 * 20 + 40), "{:?}", begun.elapsed());
}

#[test]
fn panics_and_lost_devices_reach_every_waiter_as_errors_and_the_engine_goes_on() {
    let (device, scheduler) = engine();
    device.milliseconds.store(5, Ordering::Relaxed);
    for fault in [&device.panics, &device.lost] {
        fault.store(true, Ordering::Relaxed);
        let begin = Barrier::new(3);
        thread::scope(|scope| {
            for _ in 0..3 {
                let (scheduler, begin) = (&scheduler, &begin);
                scope.spawn(move || {
                    let mut session = session(scheduler);
                    begin.wait();
                    let error = step(&mut session, 1).unwrap_err();
                    assert!(
                        matches!(&error, Error::Device { what, .. } if what.contains("on purpose"))
                            || matches!(error, Error::DeviceLost { .. }),
                        "{error}"
                    );
                    // Nothing was appended.
                    assert_eq!(session.committed(), 0);
                });
            }
        });
        fault.store(false, Ordering::Relaxed);
        step(&mut session(&scheduler), 1).unwrap();
    }
}
