//! Passes that several sequences share.
//!
//! A sequence *posts* rows and waits for their logits. The thread that finds no pass under way leads the next
//! one: it waits a moment for the other threads that posted lately, runs one pass over all that was posted, and
//! hands out what it found. Nobody waits for longer than half a pass, whoever comes first is served first,
//! and a thread that posts alone runs its pass at once, on itself.
//!
//! Linear layers read each weight once for all rows of a pass, and what a row gets does not depend on its
//! neighbours, so sharing passes saves time and changes nothing else.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::pipeline::{Pipeline, Workspace};
use super::sequence::Sequence;
use crate::error::{Error, Result, words_of};
use crate::lm::{MAX_TREE, Token, TopK};

/// The most rows of a pass that several sequences share. (One of them has [`MAX_TREE`] at most.)
const MAX_ROWS: usize = 4 * MAX_TREE;

/// Nobody waits longer than this for others.
const MOST_PATIENCE: Duration = Duration::from_millis(50);

/// What a sequence wants of a pass.
#[derive(Default)]
pub(super) struct Post {
    pub sequence: Sequence,
    /// The rows that its tree was given last.
    pub tokens: Vec<Token>,
    /// Which of them want logits.
    pub wanted: Vec<u32>,
    /// How many of the largest logits do for all rows, and the temperature of their sums, if the rows want
    /// nothing else.
    pub top: Option<(usize, f32)>,
    /// What was found, if another thread ran the pass.
    found: TopK,
    logits: Vec<f32>,
    found_top: bool,
}

/// What a pass found for one sequence.
pub(super) enum Found<'a> {
    /// Whole rows of logits, one for each wanted row.
    Logits(&'a [f32]),
    /// The largest logits of each wanted row.
    Top(&'a TopK),
}

/// Takes what was found.
pub(super) type Sink<'a> = &'a mut dyn FnMut(Found<'_>);

/// Gathers what sequences post into passes.
pub(super) struct Scheduler {
    pipeline: Pipeline,
    state: Mutex<State>,
    changed: Condvar,
}

impl Post {
    /// Nothing asked of a sequence yet.
    pub fn of(sequence: Sequence) -> Box<Self> {
        Box::new(Post { sequence, ..Post::default() })
    }
}

#[derive(Default)]
struct State {
    /// None while a pass is under way.
    workspace: Option<Box<Workspace>>,
    /// Whether somebody is gathering posts for the next pass.
    gathering: bool,
    queue: VecDeque<Queued>,
    /// What passes made of posts whose threads have not fetched them yet.
    done: HashMap<u64, (Box<Post>, Result<()>)>,
    next_ticket: u64,
    /// Threads that post at the moment: a thread has one post at a time.
    expected: Vec<ThreadId>,
    /// Seconds of a pass, lately.
    pass_seconds: f64,
    counts: PassCounts,
}

/// What an engine has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassCounts {
    /// Passes.
    pub passes: u64,
    /// What sequences posted: more than passes where they shared some.
    pub posts: u64,
    /// Rows of all passes.
    pub rows: u64,
}

struct Queued {
    ticket: u64,
    thread: ThreadId,
    post: Box<Post>,
}

impl State {
    fn expect(&mut self, thread: ThreadId) {
        if !self.expected.contains(&thread) {
            self.expected.push(thread);
        }
    }

    /// Takes a pass down: how long it took, and its posts.
    fn took<'a>(&mut self, time: Duration, posts: impl Iterator<Item = &'a Post>) {
        self.counts.passes += 1;
        for post in posts {
            self.counts.posts += 1;
            self.counts.rows += post.tokens.len() as u64;
        }
        self.pass_seconds += 0.25 * (time.as_secs_f64() - self.pass_seconds);
    }

    /// Whether there is somebody to wait for, and room for them.
    fn may_grow(&self) -> bool {
        let here = |thread: &ThreadId| self.queue.iter().any(|queued| queued.thread == *thread);
        let rows: usize = self.queue.iter().map(|queued| queued.post.tokens.len()).sum();
        rows < MAX_ROWS && !self.expected.iter().all(here)
    }

    /// The posts of the next pass, first come first served.
    fn gather(&mut self) -> Vec<Queued> {
        // Who did not come in time is not waited for again before it posts.
        let queue = &self.queue;
        self.expected.retain(|thread| queue.iter().any(|queued| queued.thread == *thread));
        let mut rows = 0;
        let mut posts = Vec::new();
        while let Some(next) = self.queue.front() {
            rows += next.post.tokens.len();
            if rows > MAX_ROWS && !posts.is_empty() {
                break;
            }
            posts.extend(self.queue.pop_front());
        }
        posts
    }
}

impl Scheduler {
    pub fn new(pipeline: Pipeline) -> Self {
        let workspace = Some(Box::new(pipeline.workspace()));
        let state = State { workspace, ..State::default() };
        Scheduler { pipeline, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// What it has done so far.
    pub fn counts(&self) -> PassCounts {
        self.lock().counts
    }

    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // (What panics holds no lock, and leaves the state as it should be.)
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Evaluates what a post asks for, perhaps together with other posts, and hands what was found to `sink`.
    ///
    /// # Errors
    /// What the device reports, and [`Error::Device`] if a pass panicked; all posts of a pass fail together.
    pub fn evaluate(&self, post: &mut Box<Post>, sink: Sink<'_>) -> Result<()> {
        let me = std::thread::current().id();
        let mut state = self.lock();
        state.expect(me);
        if state.expected.len() == 1
            && state.queue.is_empty()
            && !state.gathering
            && let Some(mut workspace) = state.workspace.take()
        {
            drop(state);
            let begun = Instant::now();
            let evaluated = self.attempt(&mut workspace, |workspace| {
                self.pipeline.pass(&mut [&mut *post], workspace)?;
                let rows = 0..post.wanted.len();
                self.deliver(rows, post.top, workspace, &mut TopK::default(), sink)
            });
            let mut state = self.lock();
            state.took(begun.elapsed(), std::iter::once(&**post));
            state.workspace = Some(workspace);
            // (Waking is a system call even where nobody waits, and a small model's pass is short.)
            let is_wanted = !state.queue.is_empty();
            drop(state);
            if is_wanted {
                self.changed.notify_all();
            }
            return evaluated;
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.queue.push_back(Queued { ticket, thread: me, post: std::mem::take(post) });
        self.changed.notify_all();
        loop {
            if let Some((done, evaluated)) = state.done.remove(&ticket) {
                drop(state);
                *post = done;
                evaluated?;
                match post.found_top {
                    true => sink(Found::Top(&post.found)),
                    false => sink(Found::Logits(&post.logits)),
                }
                return Ok(());
            }
            state = match state.workspace.is_some() && !state.gathering {
                true => self.lead(state),
                false => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Gathers posts, runs a pass over them and hands out what it found.
    fn lead<'s>(&'s self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        state.gathering = true;
        let patience = Duration::from_secs_f64(0.5 * state.pass_seconds).min(MOST_PATIENCE);
        let deadline = Instant::now() + patience;
        while state.may_grow() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut queued = state.gather();
        state.gathering = false;
        let Some(mut workspace) = state.workspace.take() else { return state };
        drop(state);

        let begun = Instant::now();
        let evaluated = self.attempt(&mut workspace, |workspace| {
            let mut posts: Vec<_> = queued.iter_mut().map(|queued| &mut queued.post).collect();
            self.pipeline.pass(&mut posts, workspace)?;
            let mut first = 0;
            for post in posts {
                let rows = first..first + post.wanted.len();
                first = rows.end;
                let Post { found, logits, found_top, top, .. } = &mut **post;
                let mut largest = std::mem::take(found);
                self.deliver(rows, *top, workspace, &mut largest, &mut |found| match found {
                    Found::Top(_) => *found_top = true,
                    Found::Logits(rows) => {
                        *found_top = false;
                        logits.clear();
                        logits.extend_from_slice(rows);
                    }
                })?;
                post.found = largest;
            }
            Ok(())
        });
        let mut state = self.lock();
        state.took(begun.elapsed(), queued.iter().map(|queued| &*queued.post));
        state.workspace = Some(workspace);
        for Queued { ticket, post, .. } in queued {
            let evaluated = match &evaluated {
                Ok(()) => Ok(()),
                Err(error) => Err(error.for_another()),
            };
            state.done.insert(ticket, (post, evaluated));
        }
        self.changed.notify_all();
        state
    }

    /// Runs a pass; if it panics, the workspace is made anew and the panic becomes an error.
    fn attempt(
        &self,
        workspace: &mut Workspace,
        pass: impl FnOnce(&mut Workspace) -> Result<()>,
    ) -> Result<()> {
        catch_unwind(AssertUnwindSafe(|| pass(workspace))).unwrap_or_else(|panic| {
            *workspace = self.pipeline.workspace();
            let what = format!("a pass panicked: {}", words_of(&*panic));
            Err(Error::Device { device: self.pipeline.describe(), what })
        })
    }

    /// Hands the logits of some rows to `sink`, or the largest of them where these do and cost less.
    fn deliver(
        &self,
        rows: Range<usize>,
        top: Option<(usize, f32)>,
        workspace: &mut Workspace,
        found: &mut TopK,
        sink: Sink<'_>,
    ) -> Result<()> {
        if rows.is_empty() {
            sink(Found::Logits(&[]));
            return Ok(());
        }
        if let Some((k, temperature)) = top
            && self.pipeline.top_k(workspace, rows.clone(), k, temperature, found)?
        {
            sink(Found::Top(found));
            return Ok(());
        }
        sink(Found::Logits(self.pipeline.logits(workspace, rows)?));
        Ok(())
    }
}
