//! Reads meters from a thread of its own, while decoders mark their phases.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::trace::{Consumption, Curve, Doubt, PhaseEnergy, Trace, Watts};
use super::{Info, Meter, Unavailable, counted};
use crate::error::{Error, Result};

/// Meters that take longer than this between useful readings are not asked at borders.
const SLOW: Duration = Duration::from_millis(100);

/// The phase of what belongs to none.
const OTHER: &str = "other";

type Marks = Vec<(Instant, Option<&'static str>)>;

/// Takes down when phases begin; clones write into the same recording.
#[derive(Debug, Clone, Default)]
pub struct Marker(Arc<Mutex<Marks>>);

impl Marker {
    /// A phase began, or ended and none began, at a moment that is not before the last one marked.
    pub fn mark(&self, phase: Option<&'static str>, at: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((at, phase));
    }
}

/// A stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Its beginning.
    pub from: Instant,
    /// Its end.
    pub to: Instant,
}

impl Window {
    /// Its length in seconds.
    pub fn seconds(&self) -> f64 {
        self.to.saturating_duration_since(self.from).as_secs_f64()
    }
}

enum Order {
    /// Read now and answer.
    Read(Sender<()>),
    Stop,
}

/// Meters being read.
#[derive(Debug)]
pub struct Recorder {
    orders: Sender<Order>,
    thread: JoinHandle<Vec<Trace>>,
    marker: Marker,
    rate: f64,
}

impl Recorder {
    /// Begins to read meters `rate` times a second (a slow meter less often).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rate outside 0.1 to 1000 per second; no thread can be started.
    pub fn start(mut meters: Vec<Box<dyn Meter>>, rate: f64) -> Result<Self> {
        if !(0.1..=1000.0).contains(&rate) {
            return Err(Error::invalid(format!(
                "the rate of reading meters must be from 0.1 to 1000 per second, not {rate}"
            )));
        }
        let origin = Instant::now();
        let mut traces: Vec<Trace> =
            meters.iter().map(|meter| Trace::new(meter.info().clone(), origin)).collect();
        for (meter, trace) in meters.iter_mut().zip(&mut traces) {
            trace.push(meter.read());
        }
        let (orders, inbox) = mpsc::channel();
        let period = Duration::from_secs_f64(1.0 / rate);
        let thread = std::thread::Builder::new()
            .name("meters".to_owned())
            .spawn(move || follow(&inbox, meters, traces, period))
            .map_err(|e| Error::io("the thread that reads meters", e))?;
        Ok(Recorder { orders, thread, marker: Marker::default(), rate })
    }

    /// Takes down phases for this recording.
    pub fn marker(&self) -> Marker {
        self.marker.clone()
    }

    /// The beginning of a window: meters are read once more, so that its border is sharp.
    pub fn begin(&self) -> Instant {
        self.read_now();
        Instant::now()
    }

    /// The end of a window that began at `from`.
    pub fn end(&self, from: Instant) -> Window {
        let to = Instant::now();
        self.read_now();
        Window { from, to }
    }

    fn read_now(&self) {
        let (done, answer) = mpsc::channel();
        if self.orders.send(Order::Read(done)).is_ok() {
            // Fails only if the thread is gone, which `stop` notices.
            let _ = answer.recv();
        }
    }

    /// Ends the recording after one more reading.
    pub fn stop(self) -> Recording {
        let _ = self.orders.send(Order::Stop);
        let traces = self.thread.join().unwrap_or_default();
        Recording::new(traces, &self.marker, self.rate)
    }
}

/// The thread: reads each meter when it is due, or all when told to.
fn follow(
    inbox: &Receiver<Order>,
    mut meters: Vec<Box<dyn Meter>>,
    mut traces: Vec<Trace>,
    period: Duration,
) -> Vec<Trace> {
    let periods: Vec<_> = meters.iter().map(|meter| meter.info().interval.max(period)).collect();
    let mut due: Vec<_> = periods.iter().map(|&period| Instant::now() + period).collect();
    let mut read = |which: &dyn Fn(usize) -> bool, due: &mut Vec<Instant>| {
        for (i, (meter, trace)) in meters.iter_mut().zip(&mut traces).enumerate() {
            if which(i) && !trace.is_lost() {
                trace.push(meter.read());
                due[i] = Instant::now() + periods[i];
            }
            if trace.is_lost() {
                // Never due again.
                due[i] = Instant::now() + Duration::from_secs(3600);
            }
        }
    };
    loop {
        let now = Instant::now();
        let next = due.iter().min().copied().unwrap_or(now + Duration::from_secs(3600));
        match inbox.recv_timeout(next.saturating_duration_since(now)) {
            Err(RecvTimeoutError::Timeout) => {
                let now = Instant::now();
                let ripe: Vec<bool> = due.iter().map(|&due| due <= now).collect();
                read(&|i| ripe[i], &mut due);
            }
            Ok(Order::Read(done)) => {
                read(&|i| periods[i] <= SLOW.max(period), &mut due);
                let _ = done.send(());
            }
            Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => {
                read(&|_| true, &mut due);
                return traces;
            }
        }
    }
}

/// What meters showed, and when which phase was on.
#[derive(Debug, Clone)]
pub struct Recording {
    traces: Vec<Trace>,
    curves: Vec<std::result::Result<Curve, Unavailable>>,
    counted: Vec<bool>,
    marks: Marks,
    rate: f64,
}

/// What meters together say of some windows.
struct Sum {
    joules: f64,
    mean_watts: f64,
    /// One for each window.
    doubts: Vec<Doubt>,
    phases: Vec<PhaseEnergy>,
}

impl Recording {
    /// A recording of traces and phases that came from elsewhere.
    pub fn new(traces: Vec<Trace>, marker: &Marker, rate: f64) -> Self {
        let curves = traces.iter().map(Trace::curve).collect();
        let infos: Vec<&Info> = traces.iter().map(Trace::info).collect();
        let marks = marker.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Recording { counted: counted(&infos), curves, marks, rate, traces }
    }

    /// The meters, in the order in which they were given.
    pub fn meters(&self) -> impl ExactSizeIterator<Item = &Info> {
        self.traces.iter().map(Trace::info)
    }

    /// The traces of the meters.
    pub fn traces(&self) -> &[Trace] {
        &self.traces
    }

    /// Whether a meter is part of the total, see [`counted`].
    pub fn is_counted(&self, meter: usize) -> bool {
        self.counted.get(meter).is_some_and(|&counted| counted)
    }

    /// Readings per second.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// What one meter says of some windows.
    ///
    /// # Errors
    /// It failed at any time; or the windows are too short for it to say anything.
    pub fn consumption(
        &self,
        meter: usize,
        windows: &[Window],
    ) -> std::result::Result<Consumption, Unavailable> {
        self.sum(&[meter], windows)
    }

    /// What all meters say that are part of the total.
    ///
    /// # Errors
    /// As [`Recording::consumption`], for any of them; or there is no meter.
    pub fn total(&self, windows: &[Window]) -> std::result::Result<Consumption, Unavailable> {
        let meters: Vec<usize> = (0..self.traces.len()).filter(|&i| self.counted[i]).collect();
        self.sum(&meters, windows)
    }

    fn sum(
        &self,
        meters: &[usize],
        windows: &[Window],
    ) -> std::result::Result<Consumption, Unavailable> {
        let Some((&first, rest)) = meters.split_first() else {
            return Err(Unavailable::new("no meter can be read"));
        };
        let mut sum = self.one(first, windows)?;
        for &meter in rest {
            let one = self.one(meter, windows)?;
            sum.joules += one.joules;
            sum.mean_watts += one.mean_watts;
            for (a, b) in sum.doubts.iter_mut().zip(&one.doubts) {
                a.random = a.random.hypot(b.random);
                a.systematic += b.systematic;
            }
            for (a, b) in sum.phases.iter_mut().zip(&one.phases) {
                a.joules += b.joules;
                a.resolved = a.resolved.min(b.resolved);
            }
        }
        let fixed = sum.doubts.iter().map(|d| d.random).fold(0.0, f64::max);
        let seconds = windows.iter().map(Window::seconds).sum();
        Consumption::new(seconds, sum.joules, &sum.doubts, sum.phases)
            .checked(sum.mean_watts, fixed)
    }

    fn one(&self, meter: usize, windows: &[Window]) -> std::result::Result<Sum, Unavailable> {
        let named = |why: &Unavailable| {
            let name = &self.traces[meter].info().name;
            Unavailable::new(format!("{name}: {}", why.reason))
        };
        let curve = self.curves[meter].as_ref().map_err(named)?;
        let seconds = |at| self.traces[meter].seconds(at);
        let mut sum =
            Sum { joules: 0.0, mean_watts: curve.mean_watts(), doubts: Vec::new(), phases: vec![] };
        let mut resolved: Vec<f64> = Vec::new();
        for window in windows {
            let (from, to) = (seconds(window.from), seconds(window.to));
            curve.check(from, to).map_err(|why| named(&why))?;
            sum.joules += curve.at(to) - curve.at(from);
            sum.doubts.push(curve.doubt(from, to));
            for (phase, window) in self.stretches(window) {
                let (from, to) = (seconds(window.from), seconds(window.to));
                let i = sum.phases.iter().position(|p| p.phase == phase).unwrap_or_else(|| {
                    sum.phases.push(PhaseEnergy {
                        phase,
                        seconds: 0.0,
                        joules: 0.0,
                        resolved: 0.0,
                    });
                    resolved.push(0.0);
                    resolved.len() - 1
                });
                sum.phases[i].seconds += to - from;
                sum.phases[i].joules += curve.at(to) - curve.at(from);
                if to - from >= curve.resolvable() {
                    resolved[i] += to - from;
                }
            }
        }
        for (phase, resolved) in sum.phases.iter_mut().zip(resolved) {
            phase.resolved = resolved / phase.seconds;
        }
        Ok(sum)
    }

    /// Seconds by phase in some windows, which need no meter.
    pub fn phase_seconds(&self, windows: &[Window]) -> Vec<(&'static str, f64)> {
        let mut phases: Vec<(&'static str, f64)> = Vec::new();
        for (phase, stretch) in windows.iter().flat_map(|window| self.stretches(window)) {
            match phases.iter_mut().find(|(known, _)| *known == phase) {
                Some((_, seconds)) => *seconds += stretch.seconds(),
                None => phases.push((phase, stretch.seconds())),
            }
        }
        phases
    }

    /// A window cut where phases change.
    fn stretches(&self, window: &Window) -> Vec<(&'static str, Window)> {
        let first = self.marks.partition_point(|&(at, _)| at <= window.from);
        let mut phase = first.checked_sub(1).and_then(|i| self.marks[i].1);
        let mut from = window.from;
        let mut stretches = Vec::new();
        let end = (window.to, None);
        let inside = self.marks[first..].iter().take_while(|(at, _)| *at < window.to);
        for &(at, next) in inside.chain([&end]) {
            if at > from {
                stretches.push((phase.unwrap_or(OTHER), Window { from, to: at }));
            }
            (from, phase) = (at, next);
        }
        stretches
    }

    /// Mean power in a window: the idle baseline.
    ///
    /// # Errors
    /// As [`Recording::total`].
    pub fn mean_power(&self, window: Window) -> std::result::Result<Watts, Unavailable> {
        let used = self.total(&[window])?;
        Ok(Watts { watts: used.watts(), uncertainty: used.uncertainty / used.seconds })
    }
}
