//! Which phase a decoding is in, and how long each took.

use std::fmt;
use std::time::Instant;

/// What the models are busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Evaluating the prompt.
    Prefill,
    /// The draft proposes tokens (its passes and its draws).
    Draft,
    /// The target's pass.
    Verify,
    /// Accepting tokens and drawing the next.
    Sample,
}

impl Phase {
    /// All phases, in the order in which they are stored.
    pub const ALL: [Phase; 4] = [Phase::Prefill, Phase::Draft, Phase::Verify, Phase::Sample];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Draft => "draft",
            Phase::Verify => "verify",
            Phase::Sample => "sample",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Told of each phase that begins and when, `None` for the time between rounds; an energy meter,
/// say.
pub type Listener = Box<dyn FnMut(Option<Phase>, Instant) + Send>;

/// Cumulative time per phase, by one monotonic clock that is read when the phase changes.
#[derive(Default)]
pub struct Timeline {
    seconds: [f64; 4],
    current: Option<(Phase, Instant)>,
    listener: Option<Listener>,
}

impl Timeline {
    /// Ends the current phase and begins another.
    pub fn enter(&mut self, phase: Phase) {
        self.change(Some(phase));
    }

    /// Ends the current phase.
    pub fn stop(&mut self) {
        self.change(None);
    }

    fn change(&mut self, phase: Option<Phase>) {
        if self.current.map(|(phase, _)| phase) == phase {
            return;
        }
        let now = Instant::now();
        if let Some((phase, since)) = self.current {
            self.seconds[phase as usize] += (now - since).as_secs_f64();
        }
        self.current = phase.map(|phase| (phase, now));
        if let Some(listener) = &mut self.listener {
            listener(phase, now);
        }
    }

    /// Seconds in a phase so far, its current stretch not counted.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Sets all times to 0.
    pub fn reset(&mut self) {
        self.stop();
        self.seconds = [0.0; 4];
    }

    /// Has each change of phase told to `listener`, or to nobody.
    pub fn listen(&mut self, listener: Option<Listener>) {
        self.listener = listener;
    }
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeline")
            .field("seconds", &self.seconds)
            .field("current", &self.current)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn time_goes_to_the_phase_it_was_spent_in() {
        let mut timeline = Timeline::default();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ear = heard.clone();
        timeline.listen(Some(Box::new(move |phase, _| ear.lock().unwrap().push(phase))));
        timeline.enter(Phase::Draft);
        timeline.enter(Phase::Draft);
        std::thread::sleep(std::time::Duration::from_millis(5));
        timeline.enter(Phase::Verify);
        timeline.stop();
        timeline.stop();
        assert!(timeline.seconds(Phase::Draft) >= 0.005);
        assert!(timeline.seconds(Phase::Verify) >= 0.0);
        assert_eq!(timeline.seconds(Phase::Sample), 0.0);
        assert_eq!(*heard.lock().unwrap(), [Some(Phase::Draft), Some(Phase::Verify), None]);
        timeline.reset();
        assert_eq!(timeline.seconds(Phase::Draft), 0.0);
    }
}
