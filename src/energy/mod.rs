//! Joules, from real meters.
//!
//! A [`Meter`] shows energy (a counter) or power (a gauge). [`Sources::find`] looks for all that a
//! machine has, [`Recorder`] reads the chosen ones from a thread of its own at a stated rate, and
//! its [`Recording`] says what was consumed between two instants, by phase, and how far to trust
//! that.
//!
//! - [`sysfs`]: files of a tree that looks like `/`, counters that wrap;
//! - [`rapl`], [`hwmon`], [`iio`], [`battery`]: what Linux shows there;
//! - [`nvml`]: NVIDIA; [`external`]: a file or a command; [`desktop`]: macOS and Windows;
//! - [`recorder`], [`trace`]: sampling, integration, uncertainty.
//!
//! Two rules hold throughout. All timestamps are [`Instant`]s, the clock that decoders mark their
//! phases by. And a meter that cannot be read is [`Unavailable`] with a reason, never 0 joules.

pub mod account;
pub mod battery;
pub mod desktop;
pub mod external;
pub mod hwmon;
pub mod iio;
pub mod nvml;
pub mod rapl;
pub mod recorder;
pub mod sysfs;
pub mod trace;

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use account::{Account, Share};
pub use recorder::{Marker, Recorder, Recording, Window};
pub use sysfs::Tree;
pub use trace::{Consumption, PhaseEnergy, Trace, Watts};

use crate::error::{Error, Result};

/// Why there is no figure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    /// For people: what was tried, what happened, what would help.
    pub reason: String,
}

impl Unavailable {
    /// With a reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Unavailable { reason: reason.into() }
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unavailable: {}", self.reason)
    }
}

impl std::error::Error for Unavailable {}

/// What a meter's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Joules since some moment, never falling.
    Energy,
    /// Watts at the moment of the reading.
    Power,
}

impl Kind {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Energy => "energy",
            Kind::Power => "power",
        }
    }

    /// The unit of the values.
    pub fn unit(self) -> &'static str {
        match self {
            Kind::Energy => "J",
            Kind::Power => "W",
        }
    }
}

/// Where a meter comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// RAPL, through powercap.
    Rapl,
    /// NVIDIA's management library.
    Nvml,
    /// A GPU driver's hwmon (amdgpu, xe, i915).
    Gpu,
    /// INA sensors on supply rails, through hwmon or iio.
    Rail,
    /// A battery that is being discharged.
    Battery,
    /// The power figures of Apple silicon.
    Apple,
    /// A file or command that the user named.
    External,
    /// No meter: a figure that the user assumed.
    Assumed,
}

impl Family {
    /// What names of its meters begin with.
    pub fn name(self) -> &'static str {
        match self {
            Family::Rapl => "rapl",
            Family::Nvml => "nvml",
            Family::Gpu => "gpu",
            Family::Rail => "rail",
            Family::Battery => "battery",
            Family::Apple => "apple",
            Family::External => "external",
            Family::Assumed => "assumed",
        }
    }
}

/// How much of a machine a meter covers; decides what may be added up, see [`counted`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All of it.
    System,
    /// A CPU package.
    Package,
    /// CPU and GPU of one chip, where RAPL's package may be the same chip.
    Soc,
    /// Memory modules.
    Memory,
    /// A graphics card.
    Card,
    /// A part of something wider in the same family.
    Part,
}

/// What a meter is.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    /// What `--meter` calls it: the family, a colon, and which one.
    pub name: String,
    /// Where it comes from.
    pub family: Family,
    /// How much it covers.
    pub scope: Scope,
    /// What its figures include, for people.
    pub covers: String,
    /// What its values are.
    pub kind: Kind,
    /// The smallest step of its values: joules or watts.
    pub resolution: f64,
    /// How old its values may be: the period at which the hardware is known to renew them.
    pub refresh: Duration,
    /// There is no use in reading it more often than this.
    pub interval: Duration,
    /// The file, library or command that is read.
    pub source: String,
}

/// A value and when it was true.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// By the clock that phases are marked by.
    pub at: Instant,
    /// Joules or watts, see [`Info::kind`].
    pub value: f64,
}

impl Reading {
    /// A value that was read between `before` and now; the middle is the best guess.
    pub fn since(before: Instant, value: f64) -> Self {
        Reading { at: before + before.elapsed() / 2, value }
    }
}

/// Something that shows energy or power.
pub trait Meter: Send {
    /// What it is.
    fn info(&self) -> &Info;

    /// What it shows.
    ///
    /// # Errors
    /// It cannot be read (any more), with the reason.
    fn read(&mut self) -> std::result::Result<Reading, Unavailable>;
}

/// A meter that was looked for.
pub enum Found {
    /// It was read, too.
    Meter(Box<dyn Meter>),
    /// The hardware is there, but the meter cannot be read.
    Unavailable {
        /// What `--meter` calls it.
        name: String,
        /// Why not.
        why: Unavailable,
    },
}

impl Found {
    /// A meter, if a first reading succeeds.
    fn tried(mut meter: impl Meter + 'static) -> Self {
        match meter.read() {
            Ok(_) => Found::Meter(Box::new(meter)),
            Err(why) => Found::Unavailable { name: meter.info().name.clone(), why },
        }
    }

    /// What `--meter` calls it.
    pub fn name(&self) -> &str {
        match self {
            Found::Meter(meter) => &meter.info().name,
            Found::Unavailable { name, .. } => name,
        }
    }
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Meter(meter) => f.debug_tuple("Meter").field(meter.info()).finish(),
            Found::Unavailable { name, why } => write!(f, "{name}: {why}"),
        }
    }
}

/// All meters of a machine.
#[derive(Debug, Default)]
pub struct Discovery {
    /// Meters, readable or not.
    pub meters: Vec<Found>,
    /// Families of which there is none, and what was looked for.
    pub absent: Vec<(Family, Unavailable)>,
}

impl Discovery {
    fn add(&mut self, family: Family, found: std::result::Result<Vec<Found>, Unavailable>) {
        match found {
            Ok(meters) => self.meters.extend(meters),
            Err(why) => self.absent.push((family, why)),
        }
    }
}

/// Where the NVIDIA library is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Library {
    /// Where the system's loader finds it.
    #[default]
    System,
    /// In a file.
    File(PathBuf),
    /// Not looked for.
    None,
}

/// Where meters are looked for.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The root of the tree that holds `sys`; `/`, unless it is a test's.
    pub tree: Tree,
    /// NVIDIA's library.
    pub nvml: Library,
    /// Whether to ask the operating system's own interfaces (macOS, Windows).
    pub desktop: bool,
}

impl Default for Sources {
    fn default() -> Self {
        Sources { tree: Tree::new("/"), nvml: Library::System, desktop: true }
    }
}

impl Sources {
    /// Only the tree below `root`: for tests.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Sources { tree: Tree::new(root), nvml: Library::None, desktop: false }
    }

    /// Looks for everything that the machine has.
    pub fn find(&self) -> Discovery {
        let mut all = Discovery::default();
        all.add(Family::Rapl, rapl::find(&self.tree));
        all.add(Family::Nvml, nvml::find(&self.nvml));
        all.add(Family::Gpu, hwmon::find_gpus(&self.tree));
        all.add(Family::Rail, rails(&self.tree));
        all.add(Family::Battery, battery::find(&self.tree));
        if self.desktop {
            desktop::find(&mut all);
        }
        all
    }

    /// The meters that names stand for: a meter's name (its parts come with it), a family (`rapl`),
    /// `cmd:COMMAND` or `file:PATH`. No name at all stands for everything found.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that nothing has, with those that there are.
    pub fn choose(&self, names: &[String]) -> Result<Discovery> {
        let external = |name: &String| external::is_external(name);
        // Asking a driver for what nobody wants takes time and may wake a device.
        let mut found = if names.is_empty() || !names.iter().all(external) {
            self.find()
        } else {
            Discovery::default()
        };
        if names.is_empty() {
            return Ok(found);
        }
        let mut chosen: Vec<Found> = Vec::new();
        for name in names {
            if external::is_external(name) {
                chosen.push(external::open(name));
                continue;
            }
            let family = format!("{name}:");
            let (mut matching, rest): (Vec<_>, Vec<_>) = found
                .meters
                .into_iter()
                .partition(|m| m.name() == name || m.name().starts_with(&family));
            found.meters = rest;
            let again = chosen.iter().any(|m| m.name() == name || m.name().starts_with(&family));
            if matching.is_empty() && !again {
                let absent = found.absent.iter().find(|(family, _)| family.name() == name);
                let Some((_, why)) = absent else {
                    let names: Vec<_> =
                        chosen.iter().chain(&found.meters).map(Found::name).collect();
                    let there = if names.is_empty() { "none".into() } else { names.join(", ") };
                    return Err(Error::invalid(format!(
                        "there is no meter {name:?}; there are: {there}, and cmd:COMMAND, file:PATH"
                    )));
                };
                matching.push(Found::Unavailable { name: name.clone(), why: why.clone() });
            }
            chosen.append(&mut matching);
        }
        Ok(Discovery { meters: chosen, absent: Vec::new() })
    }
}

/// Rails, whichever of the two subsystems the sensors' driver belongs to.
fn rails(tree: &Tree) -> std::result::Result<Vec<Found>, Unavailable> {
    match (hwmon::find_rails(tree), iio::find(tree)) {
        (Ok(mut hwmon), Ok(iio)) => {
            hwmon.extend(iio);
            Ok(hwmon)
        }
        (found @ Ok(_), Err(_)) | (Err(_), found @ Ok(_)) => found,
        (Err(_), Err(_)) => Err(Unavailable::new(
            "no INA sensor in /sys/class/hwmon or /sys/bus/iio/devices (boards such as Jetson \
             have them; a sensor of your own needs its driver loaded)",
        )),
    }
}

/// Which meters add up to the total, without counting anything twice: the first of these that is
/// there. A meter that the user named, for the whole machine; the rail that feeds a whole board;
/// CPU packages with memory and graphics cards; a whole chip with graphics cards; RAPL's platform
/// domain; batteries; graphics cards alone; rails or parts of a CPU.
///
/// Counters that are exact but cover less come before those that cover all but are coarse or
/// uncalibrated: what the total covers is said beside it.
pub fn counted(meters: &[&Info]) -> Vec<bool> {
    let pick = |rule: &dyn Fn(&Info) -> bool| {
        let picked: Vec<bool> = meters.iter().map(|m| rule(m)).collect();
        picked.contains(&true).then_some(picked)
    };
    let whole = |family| pick(&|m| m.family == family && m.scope == Scope::System);
    let chip = |scope| {
        let there = meters.iter().any(|m| m.scope == scope);
        there.then(|| pick(&|m| matches!(m.scope, Scope::Memory | Scope::Card) || m.scope == scope))
    };
    whole(Family::Assumed)
        .or_else(|| whole(Family::External))
        .or_else(|| whole(Family::Rail))
        .or_else(|| whole(Family::Apple))
        .or_else(|| chip(Scope::Package)?)
        .or_else(|| chip(Scope::Soc)?)
        .or_else(|| whole(Family::Rapl))
        .or_else(|| whole(Family::Battery))
        .or_else(|| pick(&|m| matches!(m.scope, Scope::Memory | Scope::Card)))
        .or_else(|| pick(&|m| m.family == meters[0].family))
        .unwrap_or_default()
}

/// A meter that shows what a user assumed: not a measurement.
#[derive(Debug)]
pub struct Assumed {
    info: Info,
    watts: f64,
}

impl Assumed {
    /// A machine that draws `watts`, always.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `watts` is a positive number.
    pub fn new(watts: f64) -> Result<Self> {
        if !(watts.is_finite() && watts > 0.0) {
            return Err(Error::invalid(format!("assumed watts must be above 0, not {watts}")));
        }
        let info = Info {
            name: "assumed".to_owned(),
            family: Family::Assumed,
            scope: Scope::System,
            covers: "a constant power that was assumed, not measured".to_owned(),
            kind: Kind::Power,
            resolution: 0.0,
            refresh: Duration::ZERO,
            interval: Duration::from_millis(100),
            source: format!("an assumption of {watts} W"),
        };
        Ok(Assumed { info, watts })
    }
}

impl Meter for Assumed {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> std::result::Result<Reading, Unavailable> {
        Ok(Reading { at: Instant::now(), value: self.watts })
    }
}
