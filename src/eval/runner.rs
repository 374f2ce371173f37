//! Arms take turns on tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Arm, Journal, Outcome, Task};
use crate::cached::Key;
use crate::decode::{CostTable, Settings, Strategy};
use crate::engine::SessionOptions;
use crate::error::Result;
use crate::session::generation::{Generation, Request, Session};
use crate::session::pair::Pair;

/// Told how an evaluation goes.
pub trait Observer {
    /// A session is about to be prompted.
    fn begins(&mut self, session: &mut Session);

    /// Its generation has ended, and becomes the outcome `index` of the journal.
    fn ended(&mut self, index: usize, generation: &Generation<'_>);

    /// Generations that are done, and that there are in all, for these arms; how the last was
    /// called.
    fn progress(&mut self, done: usize, total: usize, last: &str);
}

/// What an evaluation runs on.
pub struct Runner<'a> {
    /// The models.
    pub pair: &'a Pair,
    /// How sessions are made.
    pub options: SessionOptions,
    /// The tasks, in their order.
    pub tasks: Vec<Task>,
    /// How often each arm does each task.
    pub repeats: u32,
    /// Seed of the first repeat; the same for all arms and tasks.
    pub seed: u64,
    /// The most tokens of a text.
    pub max_tokens: usize,
    /// Set it from anywhere to stop.
    pub cancel: Arc<AtomicBool>,
    /// What finished.
    pub journal: Journal,
    /// What passes cost, for the controller: measured once, by the first that needs it.
    pub costs: Option<Arc<CostTable>>,
}

impl Runner<'_> {
    /// The tasks.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// All that finished so far.
    pub fn outcomes(&self) -> &[Outcome] {
        self.journal.outcomes()
    }

    /// Lets arms take turns on all tasks, beyond what the journal has. False if it was stopped.
    ///
    /// # Errors
    /// What generating or the journal reports.
    pub fn run(&mut self, arms: &[Arm], observer: &mut dyn Observer) -> Result<bool> {
        self.run_on(&|_| true, arms, observer)
    }

    /// The same on some of the tasks.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn run_on(
        &mut self,
        wanted: &dyn Fn(&Task) -> bool,
        arms: &[Arm],
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let mut turns = Vec::new();
        let mut total = 0;
        for repeat in 0..self.repeats {
            for task in (0..self.tasks.len()).filter(|&task| wanted(&self.tasks[task])) {
                // Who begins changes, so that nobody always comes after the same other.
                let shift = repeat as usize + task;
                for arm in (0..arms.len()).map(|i| &arms[(i + shift) % arms.len()]) {
                    if repeat > 0 && arm.is_deterministic() {
                        continue;
                    }
                    total += 1;
                    if !self.outcomes().iter().any(|o| o.is(&arm.label, task, repeat)) {
                        turns.push((arm, task, repeat));
                    }
                }
            }
        }
        self.warm_up(arms, &turns)?;
        let done = total - turns.len();
        for (i, (arm, task, repeat)) in turns.into_iter().enumerate() {
            observer.progress(done + i, total, &arm.label);
            if self.cancel.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let Some(outcome) = self.generate(arm, task, repeat, observer)? else {
                return Ok(false);
            };
            self.journal.push(outcome)?;
            observer.progress(done + i + 1, total, &arm.label);
        }
        Ok(true)
    }

    /// Lets each arm that has a turn generate a little, so that nobody pays for being first.
    fn warm_up(&mut self, arms: &[Arm], turns: &[(&Arm, usize, u32)]) -> Result<()> {
        for arm in arms {
            let Some((_, task, _)) = turns.iter().find(|turn| turn.0.label == arm.label) else {
                continue;
            };
            let mut request = self.request(arm, *task, 0);
            request.max_tokens = Some(16);
            let mut session = self.pair.session(&self.options)?;
            let mut generation = session.generate(&self.tasks[*task].prompt, &request)?;
            generation.by_ref().try_for_each(|piece| piece.map(drop))?;
            if let (None, Some(costs)) = (&self.costs, &generation.settings().costs) {
                self.costs = Some(costs.clone());
            }
        }
        Ok(())
    }

    fn request(&self, arm: &Arm, task: usize, repeat: u32) -> Request {
        let task = &self.tasks[task];
        let costs = self.costs.clone().filter(|_| arm.settings.strategy == Strategy::Auto);
        Request {
            settings: Settings {
                seed: self.seed.wrapping_add(u64::from(repeat)),
                score: true,
                costs,
                ..arm.settings.clone()
            },
            max_tokens: Some(task.max_tokens.map_or(self.max_tokens, |n| n.min(self.max_tokens))),
            stop: task.stop.clone(),
            special: false,
            cancel: self.cancel.clone(),
        }
    }

    fn generate(
        &self,
        arm: &Arm,
        task: usize,
        repeat: u32,
        observer: &mut dyn Observer,
    ) -> Result<Option<Outcome>> {
        let request = self.request(arm, task, repeat);
        let mut session = self.pair.session(&self.options)?;
        observer.begins(&mut session);
        let mut generation = session.generate(&self.tasks[task].prompt, &request)?;
        let mut text = String::new();
        for piece in generation.by_ref() {
            text.push_str(&piece?.text);
        }
        observer.ended(self.outcomes().len(), &generation);
        if self.cancel.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let answer = self.tasks[task].answer.as_ref();
        let score = answer.map(|answer| answer.try_score(&text)).transpose()?;
        let outcome = Outcome::new(&arm.label, task, repeat, text, &generation);
        Ok(Some(Outcome { score, ..outcome }))
    }
}

/// What must be the same for generations to be put together: the models, the tasks, and all
/// settings that arms share. (Arms, repeats and their number may differ.)
pub fn fingerprint(pair: &Pair, tasks: &[Task], shared: &[&dyn std::fmt::Debug]) -> String {
    let mut key = Key::new("evaluation").text(env!("CARGO_PKG_VERSION"));
    for model in [Some(pair.target()), pair.draft()].into_iter().flatten() {
        key = key.bytes(&model.digest().to_le_bytes()).text(&model.describe());
    }
    for task in tasks {
        key = key.text(&task.prompt).number(task.stop.len() as u64);
        key = task.stop.iter().fold(key, |key, stop| key.text(stop));
        key = key.text(&format!("{:?} {:?}", task.max_tokens, task.answer));
    }
    for setting in shared {
        key = key.text(&format!("{setting:?}"));
    }
    key.finish()
}
