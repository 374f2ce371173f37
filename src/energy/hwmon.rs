//! hwmon: power and energy that Linux drivers show, of graphics cards (amdgpu, xe, i915, nouveau)
//! and of INA sensors on supply rails.
//!
//! Units are those of the kernel's hwmon interface: `energy*_input` in microjoules, `power*` in
//! microwatts, `in*_input` in millivolts, `curr*_input` in milliamperes.

use std::time::Duration;

use super::sysfs::{Counter, Gauge, Tree, Unwrapped};
use super::{Family, Found, Info, Kind, Scope, Unavailable};

const HWMON: &str = "sys/class/hwmon";

/// Drivers of graphics cards.
const GPUS: [&str; 4] = ["amdgpu", "xe", "i915", "nouveau"];

/// Channels of a sensor are looked for up to this number.
const CHANNELS: usize = 16;

/// Directories whose driver's name is `wanted`, with that name.
fn devices(tree: &Tree, wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let names = tree.list(HWMON).unwrap_or_default();
    let directories = names.into_iter().map(|name| format!("{HWMON}/{name}"));
    directories
        .filter_map(|directory| {
            let driver = tree.text(&format!("{directory}/name")).ok()?;
            wanted(&driver).then_some((directory, driver))
        })
        .collect()
}

/// The bus address of a device, which stays the same over boots, or else its directory's name.
fn address(tree: &Tree, directory: &str) -> String {
    let uevent = tree.text(&format!("{directory}/device/uevent")).unwrap_or_default();
    let slot = uevent.lines().find_map(|line| line.strip_prefix("PCI_SLOT_NAME="));
    slot.or(directory.rsplit('/').next()).unwrap_or(directory).to_owned()
}

/// What a meter in a hwmon directory is, all but how it is read.
struct Channel<'a> {
    tree: &'a Tree,
    directory: &'a str,
    name: String,
    family: Family,
    scope: Scope,
    covers: String,
    /// How often the hardware renews its values.
    refresh: Duration,
}

impl Channel<'_> {
    fn info(&self, kind: Kind, resolution: f64, files: &[String]) -> Info {
        let paths = files.iter().map(|f| self.tree.path(f).display().to_string());
        Info {
            name: self.name.clone(),
            family: self.family,
            scope: self.scope,
            covers: self.covers.clone(),
            kind,
            resolution,
            refresh: self.refresh,
            interval: Duration::from_millis(5),
            source: paths.collect::<Vec<_>>().join(" x "),
        }
    }

    fn counter(&self, file: &str) -> Found {
        let path = format!("{}/{file}", self.directory);
        Found::tried(Counter {
            info: self.info(Kind::Energy, 1e-6, std::slice::from_ref(&path)),
            tree: self.tree.clone(),
            path,
            scale: 1e-6,
            // The drivers extend their hardware's counters to 64 bits.
            unwrapped: Unwrapped::new(None),
            advice: ": ask for read access to it, or run as root",
        })
    }

    /// `resolution` and `scale` in watts per unit of the product of the files.
    fn gauge(&self, files: &[&str], resolution: f64, scale: f64) -> Found {
        let factors: Vec<String> =
            files.iter().map(|f| format!("{}/{f}", self.directory)).collect();
        Found::tried(Gauge {
            info: self.info(Kind::Power, resolution, &factors),
            tree: self.tree.clone(),
            factors,
            scale,
        })
    }

    fn nothing(&self) -> Found {
        let why = format!(
            "{} has neither energy1_input nor power1_average nor power1_input: this card's \
             driver shows no power",
            self.tree.path(self.directory).display()
        );
        Found::Unavailable { name: self.name.clone(), why: Unavailable::new(why) }
    }
}

/// Graphics cards.
///
/// # Errors
/// There is none.
pub fn find_gpus(tree: &Tree) -> Result<Vec<Found>, Unavailable> {
    let cards = devices(tree, |driver| GPUS.contains(&driver));
    if cards.is_empty() {
        return Err(Unavailable::new(format!(
            "no {} device in {}",
            GPUS.join(", "),
            tree.path(HWMON).display()
        )));
    }
    Ok(cards.iter().flat_map(|(directory, driver)| gpu(tree, directory, driver)).collect())
}

fn gpu(tree: &Tree, directory: &str, driver: &str) -> Vec<Found> {
    let has = |file: &str| tree.has(&format!("{directory}/{file}"));
    // amdgpu hides the power limit of chips that share it with a CPU.
    let apu = driver == "amdgpu" && !has("power1_cap");
    let channel = |part: Option<&str>| {
        let name = format!("gpu:{driver}:{}", address(tree, directory));
        Channel {
            tree,
            directory,
            name: part.map_or(name.clone(), |part| format!("{name}:{part}")),
            family: Family::Gpu,
            scope: match part {
                Some(_) => Scope::Part,
                None if apu => Scope::Soc,
                None => Scope::Card,
            },
            covers: match (part, apu) {
                (Some(part), _) => format!("{part}: a part of the graphics card"),
                (None, true) => "the whole chip, CPU and GPU".to_owned(),
                (None, false) => "the graphics card".to_owned(),
            },
            // i915 and xe read the counter at each access; amdgpu's firmware averages power.
            refresh: Duration::from_millis(if driver == "amdgpu" { 100 } else { 1 }),
        }
    };
    let mut found = Vec::new();
    for n in (1..=CHANNELS).filter(|n| has(&format!("energy{n}_input"))) {
        let label = tree.text(&format!("{directory}/energy{n}_label")).unwrap_or_default();
        // xe: "card" is everything, "pkg" the chip on it.
        let whole = label == "card" || (found.is_empty() && label != "pkg");
        let alone = !has("energy2_input");
        let part = if label.is_empty() { format!("energy{n}") } else { label };
        let part = (!whole && !alone).then_some(part.as_str());
        found.push(channel(part).counter(&format!("energy{n}_input")));
    }
    if found.is_empty() {
        let power = ["power1_average", "power1_input"].into_iter().find(|file| has(file));
        let channel = channel(None);
        found.push(match power {
            Some(file) => channel.gauge(&[file], 1e-3, 1e-6),
            None => channel.nothing(),
        });
    }
    found
}

/// Rails that feed a whole board, as NVIDIA's and others' device trees label them.
pub(super) fn feeds_the_board(label: &str) -> bool {
    ["VDD_IN", "VIN", "POM_5V_IN", "SYS", "VDD_MAIN"].contains(&label.to_uppercase().as_str())
}

/// INA sensors whose drivers are hwmon's.
///
/// # Errors
/// There is none.
pub fn find_rails(tree: &Tree) -> Result<Vec<Found>, Unavailable> {
    let sensors = devices(tree, |driver| driver.starts_with("ina"));
    if sensors.is_empty() {
        return Err(Unavailable::new(format!("no INA sensor in {}", tree.path(HWMON).display())));
    }
    Ok(sensors.iter().flat_map(|(directory, driver)| rails(tree, directory, driver)).collect())
}

fn rails(tree: &Tree, directory: &str, driver: &str) -> Vec<Found> {
    let has = |file: &str| tree.has(&format!("{directory}/{file}"));
    let node = directory.rsplit('/').next().unwrap_or(directory);
    let mut found = Vec::new();
    for n in 1..=CHANNELS {
        let (energy, power) = (format!("energy{n}_input"), format!("power{n}_input"));
        let (volts, amperes) = (format!("in{n}_input"), format!("curr{n}_input"));
        let label = tree.text(&format!("{directory}/in{n}_label"));
        let label = label.or_else(|_| tree.text(&format!("{directory}/power{n}_label"))).ok();
        let channel = || {
            let which = label.clone().unwrap_or_else(|| format!("{driver}:{node}:{n}"));
            Channel {
                tree,
                directory,
                name: format!("rail:{which}"),
                family: Family::Rail,
                scope: if feeds_the_board(&which) { Scope::System } else { Scope::Part },
                covers: match &label {
                    Some(label) => format!("what the rail {label} feeds ({driver})"),
                    None => format!("what flows through the shunt of this {driver}"),
                },
                refresh: Duration::from_millis(10),
            }
        };
        if has(&energy) {
            found.push(channel().counter(&energy));
        } else if has(&power) {
            found.push(channel().gauge(&[&power], 0.02, 1e-6));
        } else if has(&volts) && has(&amperes) {
            // 8 mV and 1 mA are the usual steps; at 5 V that is some 10 mW.
            found.push(channel().gauge(&[&volts, &amperes], 0.01, 1e-6));
        }
    }
    found
}
