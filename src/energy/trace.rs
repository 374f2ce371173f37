//! What one meter showed over time, and what that says of the joules between two instants.
//!
//! A counter's difference is the energy; between two of its changes energy is taken to flow
//! evenly. Power is integrated by the trapezoid rule. Beyond the first and last reading power is
//! taken to stay as it was, and a counter to stand still, which its uncertainty allows for.
//!
//! # Uncertainty
//!
//! A counter is wrong at each border by up to one step, and by what flows while its value ages: at
//! most `step + power * refresh` for a stretch. For power it is half a step all the time, plus
//! `range * refresh` for values that come late, plus what integrating every other reading
//! only would change; stretches shorter than twice `refresh` are refused, because such a meter
//! shows in them what was before. `refresh` is what the meter states, or what was seen to be
//! longer: the time between a counter's changes, the time between readings of power. The errors
//! of several stretches are independent and add as squares, all but power's half step.

use std::time::Instant;

use super::{Family, Info, Kind, Reading, Unavailable};

/// Figures with a larger relative uncertainty are not to be trusted.
pub const TRUSTED: f64 = 0.05;

/// What a meter showed.
#[derive(Debug, Clone)]
pub struct Trace {
    info: Info,
    origin: Instant,
    /// Seconds since the origin and values.
    readings: Vec<(f64, f64)>,
    lost: Option<(f64, Unavailable)>,
}

impl Trace {
    /// Nothing yet; times are kept relative to `origin`.
    pub fn new(info: Info, origin: Instant) -> Self {
        Trace { info, origin, readings: Vec::new(), lost: None }
    }

    /// The meter.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Number of readings.
    pub fn len(&self) -> usize {
        self.readings.len()
    }

    /// Whether there is no reading.
    pub fn is_empty(&self) -> bool {
        self.readings.is_empty()
    }

    /// Adds a reading, or that there could be none. After that the meter's figures are
    /// unavailable: what it consumed meanwhile is unknown.
    pub fn push(&mut self, reading: Result<Reading, Unavailable>) {
        match reading {
            Ok(reading) => {
                let seconds = self.seconds(reading.at);
                // A slow external meter shows the same reading more than once.
                if self.readings.last().is_none_or(|&(last, _)| seconds > last) {
                    self.readings.push((seconds, reading.value));
                }
            }
            Err(why) => {
                let now = self.seconds(Instant::now());
                self.lost.get_or_insert((now, why));
            }
        }
    }

    /// Whether a reading failed.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Seconds from the origin, negative before it.
    pub(super) fn seconds(&self, at: Instant) -> f64 {
        match at.checked_duration_since(self.origin) {
            Some(after) => after.as_secs_f64(),
            None => -self.origin.duration_since(at).as_secs_f64(),
        }
    }

    /// The trace as a curve of energy.
    ///
    /// # Errors
    /// A reading failed, or there are none.
    pub fn curve(&self) -> Result<Curve, Unavailable> {
        if let Some((at, why)) = &self.lost {
            return Err(Unavailable::new(format!("lost after {at:.1} s: {}", why.reason)));
        }
        let &[first, .., last] = self.readings.as_slice() else {
            return Err(Unavailable::new("it was read less than twice: measure for longer"));
        };
        let spacing = median(gaps(&self.readings));
        let stated = self.info.refresh.as_secs_f64();
        let (points, refresh) = match self.info.kind {
            // No reading of an assumption is needed to know it.
            Kind::Power if self.info.family == Family::Assumed => (self.readings.clone(), 0.0),
            Kind::Power => (self.readings.clone(), stated.max(spacing)),
            Kind::Energy => {
                // Between changes a counter that is renewed seldom does not stand still.
                let changes = changes(&self.readings);
                let seen = median(gaps(&changes));
                (changes, if seen > 1.5 * spacing { stated.max(seen) } else { stated })
            }
        };
        let mut curve = Curve {
            kind: self.info.kind,
            joules: Vec::with_capacity(points.len()),
            points,
            resolution: self.info.resolution,
            refresh,
            spacing,
            mean_watts: 0.0,
        };
        let mut sum = 0.0;
        for (i, &(at, value)) in curve.points.iter().enumerate() {
            match (curve.kind, i.checked_sub(1)) {
                (Kind::Energy, _) => sum = value,
                (Kind::Power, Some(before)) => {
                    let (since, watts) = curve.points[before];
                    sum += (at - since) * (watts + value) / 2.0;
                }
                (Kind::Power, None) => {}
            }
            curve.joules.push(sum);
        }
        curve.mean_watts = (curve.at(last.0) - curve.at(first.0)) / (last.0 - first.0);
        Ok(curve)
    }
}

/// Times between neighbours.
fn gaps(points: &[(f64, f64)]) -> Vec<f64> {
    points.windows(2).map(|pair| pair[1].0 - pair[0].0).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// The first and last reading, and those that differ from the one before.
fn changes(readings: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    for (i, &reading) in readings.iter().enumerate() {
        let changed = kept.last().is_none_or(|&(_, value)| value != reading.1);
        if changed || i + 1 == readings.len() {
            kept.push(reading);
        }
    }
    kept
}

/// Energy over time.
#[derive(Debug, Clone)]
pub struct Curve {
    kind: Kind,
    points: Vec<(f64, f64)>,
    /// Energy up to each point.
    joules: Vec<f64>,
    resolution: f64,
    /// How old a value may be, in seconds.
    refresh: f64,
    /// Seconds between readings.
    spacing: f64,
    mean_watts: f64,
}

/// The uncertainty of the joules in a stretch of time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Doubt {
    /// What is independent from stretch to stretch.
    pub random: f64,
    /// What grows with time.
    pub systematic: f64,
}

impl Curve {
    /// Joules from the origin to a time in seconds since then.
    pub(super) fn at(&self, t: f64) -> f64 {
        let i = self.points.partition_point(|&(at, _)| at <= t);
        let (Some(before), true) = (i.checked_sub(1), i < self.points.len()) else {
            // Outside of what was read.
            let edge = if i == 0 { 0 } else { i - 1 };
            let (at, value) = self.points[edge];
            let beyond = if self.kind == Kind::Power { value * (t - at) } else { 0.0 };
            return self.joules[edge] + beyond;
        };
        let ((from, a), (to, b)) = (self.points[before], self.points[i]);
        let share = (t - from) / (to - from);
        match self.kind {
            Kind::Energy => self.joules[before] + (b - a) * share,
            // The integral of a straight line from a to b.
            Kind::Power => self.joules[before] + (t - from) * (a + (b - a) * share / 2.0),
        }
    }

    /// The mean power over the whole trace.
    pub(super) fn mean_watts(&self) -> f64 {
        self.mean_watts
    }

    /// The shortest stretch, in seconds, whose energy is told from its neighbours'.
    pub(super) fn resolvable(&self) -> f64 {
        2.0 * self.spacing.max(self.refresh)
    }

    /// Refuses a stretch in which a gauge shows more of what was before than of its own.
    pub(super) fn check(&self, from: f64, to: f64) -> Result<(), Unavailable> {
        let (seconds, least) = (to - from, 2.0 * self.refresh);
        if self.kind == Kind::Energy || seconds >= least {
            return Ok(());
        }
        Err(Unavailable::new(format!(
            "too short to measure: {seconds:.3} s with a meter of power whose values are up to \
             {:.3} s old; each stretch must last {} or more",
            self.refresh,
            rounded_up(least)
        )))
    }

    /// How far the joules between two times may be off.
    pub(super) fn doubt(&self, from: f64, to: f64) -> Doubt {
        match self.kind {
            Kind::Energy => {
                let watts = ((self.at(to) - self.at(from)) / (to - from)).max(self.mean_watts);
                Doubt { random: self.resolution + watts * self.refresh, systematic: 0.0 }
            }
            Kind::Power => {
                // With those around it, whose values are of its time if the meter is late.
                let begin = self.points.partition_point(|&(at, _)| at < from - self.refresh);
                let end = self.points.partition_point(|&(at, _)| at <= to + self.refresh);
                let inside = &self.points[begin.saturating_sub(1)..self.points.len().min(end + 1)];
                let (low, high) = inside
                    .iter()
                    .fold((f64::MAX, f64::MIN), |(low, high), p| (low.min(p.1), high.max(p.1)));
                let range = if inside.is_empty() { 0.0 } else { high - low };
                let late = range * self.refresh;
                let coarse: Vec<_> = inside.iter().step_by(2).copied().collect();
                let coarser = match (inside, coarse.last()) {
                    ([first, ..], Some(last)) => {
                        (trapezoid(&coarse) - (self.at(last.0) - self.at(first.0))).abs()
                    }
                    _ => 0.0,
                };
                Doubt { random: late + coarser, systematic: self.resolution / 2.0 * (to - from) }
            }
        }
    }
}

fn trapezoid(points: &[(f64, f64)]) -> f64 {
    points.windows(2).map(|p| (p[1].0 - p[0].0) * (p[0].1 + p[1].1) / 2.0).sum()
}

/// Power with its uncertainty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Watts {
    /// The mean.
    pub watts: f64,
    /// How far it may be off.
    pub uncertainty: f64,
}

/// What a phase consumed.
#[derive(Debug, Clone, PartialEq)]
pub struct PhaseEnergy {
    /// The phase; `other` is the time outside of all phases.
    pub phase: &'static str,
    /// Its time.
    pub seconds: f64,
    /// Its energy.
    pub joules: f64,
    /// The share of its time in stretches that span two readings or more. The energy of shorter
    /// ones is what their neighbourhood consumed, shared by time.
    pub resolved: f64,
}

/// What was consumed in one or more stretches of time.
#[derive(Debug, Clone, PartialEq)]
pub struct Consumption {
    /// How long they were together.
    pub seconds: f64,
    /// Their energy.
    pub joules: f64,
    /// How far the energy may be off, in joules.
    pub uncertainty: f64,
    /// How long it would have to be measured in all for a relative uncertainty of [`TRUSTED`];
    /// `None` if this meter will never do.
    pub needed_seconds: Option<f64>,
    /// By phase, in order of first appearance. They add up to `joules`.
    pub phases: Vec<PhaseEnergy>,
}

impl Consumption {
    pub(super) fn new(
        seconds: f64,
        joules: f64,
        doubts: &[Doubt],
        phases: Vec<PhaseEnergy>,
    ) -> Self {
        let random = doubts.iter().map(|d| d.random * d.random).sum::<f64>().sqrt();
        let systematic: f64 = doubts.iter().map(|d| d.systematic).sum();
        // What is random halves with four times the stretches, or with twice the length of one.
        let wanted = TRUSTED * joules - systematic;
        let factor = random / wanted;
        let factor = if doubts.len() > 1 { factor * factor } else { factor };
        let needed = (wanted > 0.0).then_some(seconds * factor);
        Consumption {
            seconds,
            joules,
            uncertainty: random + systematic,
            needed_seconds: needed.filter(|s| s.is_finite()),
            phases,
        }
    }

    /// Mean power in watts.
    pub fn watts(&self) -> f64 {
        self.joules / self.seconds
    }

    /// The joules of a phase, 0 if it did not occur.
    pub fn phase(&self, phase: &str) -> f64 {
        self.phases.iter().find(|p| p.phase == phase).map_or(0.0, |p| p.joules)
    }

    /// Energy beyond what the machine would have consumed idling, and its uncertainty.
    pub fn net(&self, idle: Watts) -> (f64, f64) {
        let idle_uncertainty = idle.uncertainty * self.seconds;
        (self.joules - idle.watts * self.seconds, self.uncertainty.hypot(idle_uncertainty))
    }

    /// Says so if the figure is not to be trusted, and how long a measurement would do.
    pub fn caution(&self) -> Option<String> {
        let relative = self.uncertainty / self.joules;
        if relative <= TRUSTED {
            return None;
        }
        let percent = 100.0 * relative;
        Some(match self.needed_seconds {
            Some(needed) => format!(
                "too short to trust: {:.3} s are uncertain by {percent:.0}%; measure for {} or more",
                self.seconds,
                rounded_up(needed),
            ),
            None => format!("this meter is too coarse: uncertain by {percent:.0}%, however long"),
        })
    }

    /// Fails where the figure is smaller than its uncertainty: it is none then.
    pub(super) fn checked(self, mean_watts: f64, fixed: f64) -> Result<Self, Unavailable> {
        if self.joules > self.uncertainty {
            return Ok(self);
        }
        let mut reason = format!(
            "too short to measure: {:.4} J in {:.3} s, uncertain by {:.4} J",
            self.joules, self.seconds, self.uncertainty
        );
        if mean_watts > 0.0 {
            let needed = fixed / (TRUSTED * mean_watts);
            reason = format!("{reason}; measure for {} or more", rounded_up(needed));
        }
        Err(Unavailable::new(reason))
    }
}

fn rounded_up(seconds: f64) -> String {
    if seconds < 10.0 {
        format!("{:.1} s", (10.0 * seconds).ceil() / 10.0)
    } else {
        format!("{:.0} s", seconds.ceil())
    }
}
