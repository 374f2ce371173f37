//! Measuring energy: the options and figures that `run`, `energy` and other subcommands share.
//!
//! A subcommand flattens [`MeterArgs`] into its options, starts a [`Metering`] before it loads,
//! lets it listen to its sessions, and marks a window for each piece of [`Work`]. [`Measured`]
//! then has the figures, as JSON and for people.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Map, Value as Json, json};

use super::console::tell;
use crate::decode::{Phase, Statistics};
use crate::energy::{
    Assumed, Consumption, Discovery, Found, Info, Recorder, Recording, Sources, Unavailable, Watts,
    Window,
};
use crate::error::{Error, Result};
use crate::session::generation::{Generation, Session};

/// How energy is measured.
#[derive(Debug, Args)]
#[command(next_help_heading = "Energy")]
pub(super) struct MeterArgs {
    /// Measure energy, with all meters of this machine
    #[arg(long)]
    pub(super) energy: bool,

    /// Measure energy with this meter: a name or family that `mtad devices --meters` shows,
    /// cmd:COMMAND that prints lines such as "12.5 W" or "1034 J", or file:PATH with one; may be
    /// given more than once
    #[arg(long, value_name = "METER")]
    meter: Vec<String>,

    /// Read meters this often per second
    #[arg(long, value_name = "HZ", default_value_t = 50.0)]
    meter_rate: f64,

    /// Measure for so long, before anything else, what the idle machine consumes, and report
    /// energy net of it too; 0 is off [default: 5 for `mtad energy`, 0 elsewhere]
    #[arg(long, value_name = "SECONDS")]
    idle: Option<f64>,

    /// Measure nothing and compute what a machine would consume that always draws W watts; every
    /// figure is marked "assumed"
    #[arg(long, value_name = "W", conflicts_with = "meter")]
    assume_watts: Option<f64>,

    /// Exit with 0 even if no meter gave a figure
    #[arg(long)]
    allow_no_meter: bool,

    /// Look for meters below this directory instead of / (for tests)
    #[arg(long, value_name = "DIR", hide = true)]
    meter_root: Option<PathBuf>,
}

impl MeterArgs {
    /// Whether anything is to be measured.
    pub(super) fn is_given(&self) -> bool {
        self.energy || !self.meter.is_empty() || self.idle.is_some() || self.assume_watts.is_some()
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.energy || !self.meter.is_empty() || self.assume_watts.is_some()
    }

    /// Whether it is fine that no meter gives a figure.
    pub(super) fn is_lenient(&self) -> bool {
        self.allow_no_meter
    }

    /// The power that is assumed instead of measured.
    pub(super) fn assumed(&self) -> Option<f64> {
        self.assume_watts
    }

    /// Starts to measure if that is wanted, `default_idle` says that it is in any case. The idle
    /// baseline comes first.
    pub(super) fn start(&self, default_idle: Option<f64>) -> Result<Metering> {
        if !self.is_wanted() && default_idle.is_none() {
            return Ok(Metering(None));
        }
        let idle = self.idle.or(default_idle).unwrap_or(0.0);
        if !(0.0..=3600.0).contains(&idle) {
            return Err(Error::invalid(format!("--idle must be from 0 to 3600 s, not {idle}")));
        }
        let found = match self.assume_watts {
            Some(watts) => Discovery {
                meters: vec![Found::Meter(Box::new(Assumed::new(watts)?))],
                absent: Vec::new(),
            },
            None => sources(self.meter_root.as_ref()).choose(&self.meter)?,
        };
        let mut meters = Vec::new();
        let mut missing = Vec::new();
        for meter in found.meters {
            match meter {
                Found::Meter(meter) => meters.push(meter),
                Found::Unavailable { name, why } => missing.push((name, why)),
            }
        }
        // What a machine does not have is of interest only if it has nothing.
        if meters.is_empty() {
            missing.extend(found.absent.into_iter().map(|(f, why)| (f.name().to_owned(), why)));
        }
        let measurable = !meters.is_empty() && self.assume_watts.is_none();
        let recorder = Recorder::start(meters, self.meter_rate)?;
        let mut active = Active {
            recorder,
            missing,
            idle: None,
            load: None,
            assumed: self.assume_watts.is_some(),
            lenient: self.allow_no_meter,
        };
        if idle > 0.0 && measurable {
            tell!("mtad: measuring the idle machine for {idle} s");
            let begun = active.recorder.begin();
            std::thread::sleep(Duration::from_secs_f64(idle));
            active.idle = Some(active.recorder.end(begun));
        }
        Ok(Metering(Some(active)))
    }
}

/// Where meters are, on this machine or in a test's tree.
pub(super) fn sources(root: Option<&PathBuf>) -> Sources {
    root.map_or_else(Sources::default, Sources::below)
}

/// Energy being measured, or not.
pub(super) struct Metering(Option<Active>);

struct Active {
    recorder: Recorder,
    missing: Vec<(String, Unavailable)>,
    idle: Option<Window>,
    load: Option<Window>,
    assumed: bool,
    lenient: bool,
}

impl Metering {
    /// Nothing is measured.
    pub(super) fn off() -> Self {
        Metering(None)
    }

    /// Does what loads the models, as a phase of its own.
    pub(super) fn load<T>(&mut self, load: impl FnOnce() -> T) -> T {
        let begun = self.begin();
        let loaded = load();
        let window = self.end(begun);
        if let Some(active) = &mut self.0 {
            active.load = Some(window);
        }
        loaded
    }

    /// Takes down the phases of a session, from its next prompt on.
    pub(super) fn listen_to(&self, session: &mut Session) {
        if let Some(active) = &self.0 {
            let marker = active.recorder.marker();
            session.listen(Box::new(move |phase, at| marker.mark(phase.map(Phase::name), at)));
        }
    }

    /// The beginning of a window.
    pub(super) fn begin(&self) -> Instant {
        self.0.as_ref().map_or_else(Instant::now, |active| active.recorder.begin())
    }

    /// The end of a window.
    pub(super) fn end(&self, from: Instant) -> Window {
        match &self.0 {
            Some(active) => active.recorder.end(from),
            None => Window { from, to: Instant::now() },
        }
    }

    /// Stops; `None` if nothing was to be measured.
    pub(super) fn finish(self) -> Option<Measured> {
        let Active { recorder, missing, idle, load, assumed, lenient } = self.0?;
        let recording = recorder.stop();
        let idle_power = idle.map(|window| recording.mean_power(window));
        Some(Measured { recording, missing, idle, idle_power, load, assumed, lenient })
    }
}

/// What was generated, and when.
#[derive(Debug, Clone, Default)]
pub(super) struct Work {
    /// One for each generation, prompts included.
    pub windows: Vec<Window>,
    /// Generated tokens.
    pub tokens: usize,
    /// Prompt tokens that were evaluated.
    pub prompt_tokens: usize,
    /// Rounds, and what was accepted in them.
    pub statistics: Statistics,
    /// Seconds of generating, without the prompts.
    pub generating: f64,
}

impl Work {
    /// A generation that ran in a window.
    pub(super) fn new(window: Window, generation: &Generation<'_>) -> Self {
        Work {
            windows: vec![window],
            tokens: generation.tokens().len(),
            prompt_tokens: generation.prefill().evaluated,
            statistics: generation.statistics().clone(),
            generating: generation.generating_seconds(),
        }
    }

    /// Adds another piece of work.
    pub(super) fn add(&mut self, other: &Work) {
        self.windows.extend_from_slice(&other.windows);
        self.tokens += other.tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.statistics.merge(&other.statistics);
        self.generating += other.generating;
    }

    pub(super) fn seconds(&self) -> f64 {
        self.windows.iter().map(Window::seconds).sum()
    }

    pub(super) fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.generating
    }
}

/// What meters said.
pub(super) struct Measured {
    recording: Recording,
    missing: Vec<(String, Unavailable)>,
    idle: Option<Window>,
    idle_power: Option<Result<Watts, Unavailable>>,
    load: Option<Window>,
    assumed: bool,
    lenient: bool,
}

/// The figures of some work.
pub(super) struct Figures {
    /// What was consumed in all.
    pub used: Consumption,
    /// Joules per generated token, prompts included.
    pub per_token: f64,
    /// How far that may be off.
    pub per_token_uncertainty: f64,
    /// The same beyond what the idle machine consumes, if that was measured.
    pub per_token_net: Option<(f64, f64)>,
    /// Joules of the prompts per prompt token.
    pub per_prompt_token: Option<f64>,
    /// Generated tokens per joule.
    pub tokens_per_joule: f64,
}

/// Phases as reports show them; `other` is the time between rounds.
pub(super) const PHASES: [&str; 5] = ["prefill", "draft", "verify", "sample", "other"];

impl Measured {
    /// The figures of some work.
    pub(super) fn figures(&self, work: &Work) -> Result<Figures, Unavailable> {
        let used = self.recording.total(&work.windows)?;
        if work.tokens == 0 {
            return Err(Unavailable::new("nothing was generated"));
        }
        let tokens = work.tokens as f64;
        let net = self.idle_watts().map(|idle| used.net(idle));
        let prompt = (work.prompt_tokens > 0).then_some(work.prompt_tokens as f64);
        Ok(Figures {
            per_token: used.joules / tokens,
            per_token_uncertainty: used.uncertainty / tokens,
            per_token_net: net.map(|(net, uncertainty)| (net / tokens, uncertainty / tokens)),
            per_prompt_token: prompt.map(|prompt| used.phase("prefill") / prompt),
            tokens_per_joule: tokens / used.joules,
            used,
        })
    }

    fn idle_watts(&self) -> Option<Watts> {
        self.idle_power.as_ref().and_then(|power| power.as_ref().ok()).copied()
    }

    /// How far joules may be off; nobody knows that of assumed ones.
    pub(super) fn uncertainty(&self, used: &Consumption) -> Option<f64> {
        (!self.assumed).then_some(used.uncertainty)
    }

    /// A figure's name: assumed ones cannot be taken for measured ones.
    pub(super) fn key(&self, name: &str) -> String {
        if self.assumed { format!("assumed_{name}") } else { name.to_owned() }
    }

    /// A figure for people, likewise.
    pub(super) fn show(&self, figure: f64) -> String {
        let figure = significant(figure);
        if self.assumed { format!("{figure} assumed") } else { figure }
    }

    /// A figure with its uncertainty.
    pub(super) fn show_uncertain(&self, figure: f64, uncertainty: f64) -> String {
        if self.assumed {
            return self.show(figure);
        }
        format!("{} ±{}", significant(figure), significant_to(uncertainty, 2))
    }

    /// Fails if there is no figure at all, unless that was allowed.
    pub(super) fn judge<'a>(&self, works: impl IntoIterator<Item = &'a Work>) -> Result<()> {
        let mut why = None;
        for work in works {
            match self.figures(work) {
                Ok(_) => return Ok(()),
                Err(reason) => why = Some(reason),
            }
        }
        match why {
            Some(why) if !self.lenient => Err(Error::unsupported(
                "energy",
                format!(
                    "{}; the times above are all there is (--allow-no-meter makes that a success, \
                     `mtad devices --meters` shows what was looked for)",
                    why.reason
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The meters, how they were read, the idle baseline and loading, as JSON.
    pub(super) fn setup_json(&self) -> Map<String, Json> {
        let mut meters: Vec<Json> = Vec::new();
        for (i, (info, trace)) in self.recording.meters().zip(self.recording.traces()).enumerate() {
            let mut meter = info_json(info);
            meter["in_total"] = self.recording.is_counted(i).into();
            meter["readings"] = trace.len().into();
            if let Some(idle) = self.idle {
                meter["idle"] = self.used_json(self.recording.consumption(i, &[idle]));
            }
            meters.push(meter);
        }
        meters.extend(self.missing.iter().map(|(name, why)| unavailable_json(name, why)));
        let mut out = Map::new();
        out.insert("assumed".into(), self.assumed.into());
        out.insert("meters".into(), meters.into());
        out.insert("rate_hz".into(), self.recording.rate().into());
        let method = if self.assumed { "an assumed power, times time" } else { METHOD };
        out.insert("method".into(), method.into());
        let over = |window: Option<Window>| {
            window.map(|window| self.used_json(self.recording.total(&[window])))
        };
        out.insert("idle".into(), over(self.idle).into());
        out.insert("load".into(), over(self.load).into());
        out
    }

    fn used_json(&self, used: Result<Consumption, Unavailable>) -> Json {
        match used {
            Ok(used) => {
                let mut out = json!({"seconds": used.seconds});
                out[self.key("joules")] = used.joules.into();
                out[self.key("watts")] = used.watts().into();
                if !self.assumed {
                    out["joules_uncertainty"] = used.uncertainty.into();
                }
                out["caution"] = used.caution().into();
                out
            }
            Err(why) => json!({"joules": null, "unavailable": why.reason}),
        }
    }

    /// The figures of some work, as JSON.
    pub(super) fn figures_json(&self, work: &Work) -> Map<String, Json> {
        let mut out = Map::new();
        let times = self.recording.phase_seconds(&work.windows);
        let times: Map<String, Json> =
            times.into_iter().map(|(phase, seconds)| (phase.to_owned(), seconds.into())).collect();
        out.insert("phase_seconds".into(), times.into());
        let figures = match self.figures(work) {
            Ok(figures) => figures,
            Err(why) => {
                out.insert(self.key("joules"), Json::Null);
                out.insert(self.key("joules_per_token"), Json::Null);
                out.insert("unavailable".into(), why.reason.into());
                return out;
            }
        };
        let used = &figures.used;
        let mut put = |name: &str, value: Json| drop(out.insert(self.key(name), value));
        put("joules", used.joules.into());
        put("joules_per_token", figures.per_token.into());
        put("watts", used.watts().into());
        put("joules_per_prompt_token", figures.per_prompt_token.into());
        put("tokens_per_joule", figures.tokens_per_joule.into());
        if let Some((net, uncertainty)) = figures.per_token_net {
            put("joules_per_token_net", net.into());
            put("joules_per_token_net_uncertainty", uncertainty.into());
        }
        if !self.assumed {
            put("joules_uncertainty", used.uncertainty.into());
            put("joules_per_token_uncertainty", figures.per_token_uncertainty.into());
        }
        let mut phases = Map::new();
        for phase in &used.phases {
            let mut entry = json!({"seconds": phase.seconds});
            if !self.assumed {
                entry["resolved"] = phase.resolved.into();
            }
            entry[self.key("joules")] = phase.joules.into();
            entry[self.key("joules_per_token")] = (phase.joules / work.tokens as f64).into();
            entry[self.key("watts")] = (phase.joules / phase.seconds).into();
            phases.insert(phase.phase.to_owned(), entry);
        }
        out.insert("phases".into(), phases.into());
        let by_meter: Map<String, Json> = self
            .recording
            .meters()
            .enumerate()
            .map(|(i, info)| {
                let used = self.recording.consumption(i, &work.windows);
                (info.name.clone(), self.used_json(used))
            })
            .collect();
        out.insert("by_meter".into(), by_meter.into());
        out.insert("caution".into(), used.caution().into());
        out
    }

    /// Everything about one piece of work, as JSON.
    pub(super) fn json(&self, work: &Work) -> Json {
        let mut out = self.setup_json();
        out.extend(self.figures_json(work));
        out.into()
    }

    /// The meters, how they were read, the idle baseline and loading, for people.
    pub(super) fn setup_lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (i, info) in self.recording.meters().enumerate() {
            let total = if self.recording.is_counted(i) { "in the total" } else { "beside it" };
            lines.push(format!("{}: {} ({total}; {})", info.name, info.covers, info.kind.name()));
        }
        lines.extend(self.missing.iter().map(|(name, why)| format!("{name}: {why}")));
        if lines.is_empty() {
            lines.push("none".to_owned());
        }
        label("meters", &mut lines);
        if self.recording.meters().len() > 0 && !self.assumed {
            let rate = self.recording.rate();
            lines.push(format!("method            {rate} readings/s; {METHOD}"));
        }
        if let Some(idle) = self.idle {
            let power = match &self.idle_power {
                Some(Ok(w)) => format!("{} W", self.show_uncertain(w.watts, w.uncertainty)),
                Some(Err(why)) => why.to_string(),
                None => String::new(),
            };
            lines.push(format!("idle              {:.1} s, {power}", idle.seconds()));
        }
        if let Some(load) = self.load {
            let joules = match self.recording.total(&[load]) {
                Ok(used) => format!("{} J", self.show_uncertain(used.joules, used.uncertainty)),
                Err(why) => why.to_string(),
            };
            lines.push(format!("load              {:.3} s, {joules}", load.seconds()));
        }
        lines
    }

    /// The time of phases, for people.
    pub(super) fn times(&self, work: &Work) -> String {
        let times = self.recording.phase_seconds(&work.windows);
        let known = |name: &&str| times.iter().find(|(phase, _)| phase == name);
        let times = PHASES.iter().filter_map(known);
        let times: Vec<_> = times.map(|(phase, s)| format!("{phase} {s:.3} s")).collect();
        times.join(", ")
    }

    /// The energy of phases, for people.
    pub(super) fn phase_lines(&self, figures: &Figures, tokens: usize) -> Vec<String> {
        let known = |name: &&str| figures.used.phases.iter().find(|p| p.phase == *name);
        let phases = PHASES.iter().filter_map(known);
        phases
            .map(|phase| {
                let unresolved = match phase.resolved {
                    r if r >= 0.995 || self.assumed => String::new(),
                    r => format!(
                        "; {:.0}% of it shared by time, shorter than the readings' spacing",
                        100.0 * (1.0 - r)
                    ),
                };
                format!(
                    "{:8} {} J/token, {} W in {:.3} s{unresolved}",
                    phase.phase,
                    self.show(phase.joules / tokens as f64),
                    self.show(phase.joules / phase.seconds),
                    phase.seconds
                )
            })
            .collect()
    }

    /// One piece of work for people, on standard error.
    pub(super) fn print(&self, work: &Work) {
        self.setup_lines().iter().for_each(|line| tell!("{line}"));
        let figures = match self.figures(work) {
            Ok(figures) => figures,
            Err(why) => {
                tell!("energy            {why}");
                tell!("time              {:.3} s: {}", work.seconds(), self.times(work));
                return;
            }
        };
        let used = &figures.used;
        let joules = self.show_uncertain(used.joules, used.uncertainty);
        tell!(
            "energy            {joules} J in {:.3} s: {} W",
            used.seconds,
            self.show(used.watts())
        );
        let per_token = self.show_uncertain(figures.per_token, figures.per_token_uncertainty);
        tell!("J/token           {per_token}, {} tokens/J", self.show(figures.tokens_per_joule));
        if let Some((net, uncertainty)) = figures.per_token_net {
            tell!("  net of idle     {}", self.show_uncertain(net, uncertainty));
        }
        if let Some(joules) = figures.per_prompt_token {
            tell!("J/prompt token    {}", self.show(joules));
        }
        let mut phases = self.phase_lines(&figures, work.tokens);
        label("  by phase", &mut phases);
        phases.iter().for_each(|line| tell!("{line}"));
        if let Some(caution) = used.caution() {
            tell!("caution           {caution}");
        }
    }
}

/// How joules come about, in a line.
const METHOD: &str = "counters by difference, power by the trapezoid rule, phases by the clock \
                      that decoding marks them with";

/// Puts a label before the first line, and space before the others.
fn label(label: &str, lines: &mut [String]) {
    for (i, line) in lines.iter_mut().enumerate() {
        *line = format!("{:18}{line}", if i == 0 { label } else { "" });
    }
}

/// What a meter is, as JSON.
pub(super) fn info_json(info: &Info) -> Json {
    json!({
        "name": info.name,
        "kind": info.kind.name(),
        "covers": info.covers,
        "resolution": info.resolution,
        "unit": info.kind.unit(),
        "source": info.source,
    })
}

/// A meter that there is no reading of.
pub(super) fn unavailable_json(name: &str, why: &Unavailable) -> Json {
    json!({"name": name, "unavailable": why.reason})
}

/// Four significant digits.
fn significant(x: f64) -> String {
    significant_to(x, 4)
}

fn significant_to(x: f64, digits: usize) -> String {
    // The exponent after rounding: 9.9999 has four digits as 10.00.
    let scientific = format!("{x:.*e}", digits - 1);
    let exponent = scientific.rsplit_once('e').and_then(|(_, e)| e.parse::<i32>().ok());
    match exponent {
        Some(exponent) if x != 0.0 => {
            let decimals = (digits as i32 - 1 - exponent).clamp(0, 9);
            format!("{x:.*}", decimals as usize)
        }
        _ => format!("{x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_four_digits() {
        let all = [0.012344, 9.99996, 98.766, 123456.0, -0.5, 0.0].map(significant);
        assert_eq!(all, ["0.01234", "10.00", "98.77", "123456", "-0.5000", "0"]);
        assert_eq!(significant_to(0.00123, 2), "0.0012");
    }
}
