//! What a strategy says of itself: each file has its own [`Descriptor`], from which validation, the command line,
//! reports and the interface to C take what they need.

use std::fmt;
use std::str::FromStr;

use super::{Algorithm, Settings};
use super::{
    auto, autoregressive, beam, bild, dsbd, mmtad, mtad, mtjd, specinfer, speculative, typical,
};
use crate::error::{Error, Result};
use crate::lm::MAX_TREE;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The target's most probable token, one at a time.
    Greedy,
    /// Draws from the target, one at a time.
    Sample,
    /// Speculative sampling: the target's distribution exactly.
    Speculative,
    /// Multi-token joint decoding: blocks whose joint likelihood ratio clears a threshold.
    Mtad,
    /// The same with all beams verified, as a tree.
    Mmtad,
    /// Lossless speculation on a tree.
    SpecInfer,
    /// The draft goes on while it is sure; the target rolls back what it finds too unlikely.
    Bild,
    /// Drafted tokens that are typical of the target.
    Typical,
    /// Beams of the target, over its whole text.
    Beam,
    /// Beams of the target, in blocks: what MTAD approximates.
    Mtjd,
    /// Beams of the target, helped by beams of the draft.
    Dsbd,
    /// Whatever of the above is the fastest at the threshold of MTAD, or plain decoding.
    Auto,
}

/// A setting that some strategies heed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Knob {
    /// [`Settings::tau`].
    Tau,
    /// [`Settings::gamma`].
    Gamma,
    /// [`Settings::beam_width`].
    BeamWidth,
    /// [`Settings::with_replacement`].
    WithReplacement,
    /// [`Settings::branching`].
    Branching,
    /// [`Settings::fallback`].
    Fallback,
    /// [`Settings::rollback`].
    Rollback,
    /// [`Settings::epsilon`].
    Epsilon,
    /// [`Settings::delta`].
    Delta,
}

impl Knob {
    /// All of them.
    pub const ALL: [Knob; 9] = [
        Knob::Tau,
        Knob::Gamma,
        Knob::BeamWidth,
        Knob::WithReplacement,
        Knob::Branching,
        Knob::Fallback,
        Knob::Rollback,
        Knob::Epsilon,
        Knob::Delta,
    ];

    /// What it is set to, in words for a report: `gamma 4`. Empty for a flag that is not set.
    pub fn words(self, s: &Settings) -> String {
        match self {
            Knob::Tau => format!("tau {}", s.tau),
            Knob::Gamma => format!("gamma {}", s.gamma),
            Knob::BeamWidth => format!("width {}", s.beam_width),
            Knob::WithReplacement if s.with_replacement => "with replacement".to_owned(),
            Knob::WithReplacement => String::new(),
            Knob::Branching => {
                let branching: Vec<_> = s.branching.iter().map(usize::to_string).collect();
                format!("branching {}", branching.join(","))
            }
            Knob::Fallback => format!("fallback {}", s.fallback),
            Knob::Rollback => format!("rollback {}", s.rollback),
            Knob::Epsilon => format!("epsilon {}", s.epsilon),
            Knob::Delta => format!("delta {}", s.delta),
        }
    }

    /// Refuses a value outside its range.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting's name, its range and what was found.
    pub fn validate(self, s: &Settings) -> Result<()> {
        let check = |fine: bool, what: String| match fine {
            true => Ok(()),
            false => Err(Error::invalid(what)),
        };
        let from_0 = |name: &str, x: f64| {
            check(x.is_finite() && x >= 0.0, format!("{name} must be 0 or more, not {x}"))
        };
        match self {
            Knob::Tau => from_0("tau", s.tau),
            Knob::Epsilon => from_0("epsilon", s.epsilon),
            Knob::Delta => from_0("delta", s.delta),
            Knob::Gamma => {
                let most = MAX_TREE - 1;
                let what = format!("gamma must be from 1 to {most}, not {}", s.gamma);
                check((1..=most).contains(&s.gamma), what)
            }
            Knob::BeamWidth => {
                let what = format!("beam-width must be from 1 to {MAX_TREE}, not {}", s.beam_width);
                check((1..=MAX_TREE).contains(&s.beam_width), what)
            }
            Knob::WithReplacement => Ok(()),
            Knob::Branching => check(
                !s.branching.is_empty() && !s.branching.contains(&0),
                format!(
                    "branching must be numbers from 1 on, one for each depth, not {:?}",
                    s.branching
                ),
            ),
            Knob::Fallback => {
                let what = format!("fallback must be from 0 (never) to 1, not {}", s.fallback);
                check((0.0..=1.0).contains(&s.fallback), what)
            }
            Knob::Rollback => {
                let what = format!("rollback must be 0 or more (inf: never), not {}", s.rollback);
                check(!s.rollback.is_nan() && s.rollback >= 0.0, what)
            }
        }
    }
}

/// What a strategy says of itself.
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// The name that users know it by.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Whether it needs a draft model.
    pub needs_draft: bool,
    /// The settings that it heeds.
    pub knobs: &'static [Knob],
    /// Rows of a round beside the pending token, at most.
    pub(super) rows: fn(&Settings) -> usize,
    /// The most tokens that a round drafts in a path.
    pub(super) draft_length: fn(&Settings) -> usize,
    /// Its algorithm, with no memory of any text.
    pub(super) algorithm: fn() -> Box<dyn Algorithm>,
}

impl Strategy {
    /// All strategies with the names that users know them by.
    pub const ALL: [(Strategy, &'static str); 12] = [
        Strategy::Greedy.named(),
        Strategy::Sample.named(),
        Strategy::Speculative.named(),
        Strategy::Mtad.named(),
        Strategy::Mmtad.named(),
        Strategy::SpecInfer.named(),
        Strategy::Bild.named(),
        Strategy::Typical.named(),
        Strategy::Beam.named(),
        Strategy::Mtjd.named(),
        Strategy::Dsbd.named(),
        Strategy::Auto.named(),
    ];

    const fn named(self) -> (Strategy, &'static str) {
        (self, self.descriptor().name)
    }

    /// What it says of itself.
    pub const fn descriptor(self) -> &'static Descriptor {
        match self {
            Strategy::Greedy => &autoregressive::GREEDY,
            Strategy::Sample => &autoregressive::SAMPLE,
            Strategy::Speculative => &speculative::DESCRIPTOR,
            Strategy::Mtad => &mtad::DESCRIPTOR,
            Strategy::Mmtad => &mmtad::DESCRIPTOR,
            Strategy::SpecInfer => &specinfer::DESCRIPTOR,
            Strategy::Bild => &bild::DESCRIPTOR,
            Strategy::Typical => &typical::DESCRIPTOR,
            Strategy::Beam => &beam::DESCRIPTOR,
            Strategy::Mtjd => &mtjd::DESCRIPTOR,
            Strategy::Dsbd => &dsbd::DESCRIPTOR,
            Strategy::Auto => &auto::DESCRIPTOR,
        }
    }

    /// The one to use where nobody names one: MTAD with a draft, drawing from the target without.
    pub fn default_for(has_draft: bool) -> Self {
        if has_draft { Strategy::Mtad } else { Strategy::Sample }
    }

    /// Whether it needs a draft model.
    pub fn needs_draft(self) -> bool {
        self.descriptor().needs_draft
    }

    /// Its algorithm, with no memory of any text.
    pub(super) fn algorithm(self) -> Box<dyn Algorithm> {
        (self.descriptor().algorithm)()
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.descriptor().name)
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, known)| *known == name);
        known.map(|(strategy, _)| *strategy).ok_or_else(|| {
            let names = Self::ALL.map(|(_, name)| name).join(", ");
            Error::invalid(format!("there is no strategy {name:?}; there are {names}"))
        })
    }
}
