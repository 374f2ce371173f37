//! Batteries in `/sys/class/power_supply`, while they are being discharged: then what leaves them
//! is what the whole machine consumes.
//!
//! `energy_now` is in microwatt-hours, `charge_now` in microampere-hours, `power_now` in
//! microwatts, `voltage_now` and `current_now` in microvolts and microamperes.

use std::time::{Duration, Instant};

use super::sysfs::{Tree, Unwrapped};
use super::{Family, Found, Info, Kind, Meter, Reading, Scope, Unavailable};

const SUPPLIES: &str = "sys/class/power_supply";

/// What of a battery is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shows {
    /// What it still holds, in joules.
    Energy,
    /// The charge it still holds, which times its voltage is energy.
    Charge,
    /// Power.
    Power,
    /// Power, as voltage times current.
    Current,
}

struct Battery {
    info: Info,
    tree: Tree,
    directory: String,
    shows: Shows,
    /// The joules that have left it.
    spent: Unwrapped,
    /// Charge and voltage of the last reading, and the joules that had left it by then.
    last: Option<(f64, f64)>,
    joules: f64,
}

/// Batteries of the machine (not those of mice and pens).
///
/// # Errors
/// There is none.
pub fn find(tree: &Tree) -> Result<Vec<Found>, Unavailable> {
    let mut found = Vec::new();
    for supply in tree.list(SUPPLIES).unwrap_or_default() {
        let directory = format!("{SUPPLIES}/{supply}");
        let is = |file: &str, what: &str| {
            tree.text(&format!("{directory}/{file}")).is_ok_and(|text| text == what)
        };
        if is("type", "Battery") && !is("scope", "Device") {
            found.extend(battery(tree, &directory, &supply));
        }
    }
    if found.is_empty() {
        return Err(Unavailable::new(format!("no battery in {}", tree.path(SUPPLIES).display())));
    }
    Ok(found)
}

fn battery(tree: &Tree, directory: &str, supply: &str) -> Vec<Found> {
    let has = |file: &str| tree.has(&format!("{directory}/{file}"));
    let store = match () {
        () if has("energy_now") => Some(Shows::Energy),
        () if has("charge_now") && has("voltage_now") => Some(Shows::Charge),
        () => None,
    };
    let flow = match () {
        () if has("power_now") => Some(Shows::Power),
        () if has("current_now") && has("voltage_now") => Some(Shows::Current),
        () => None,
    };
    let meter = |shows: Shows, name: String, scope: Scope| {
        let (kind, file, resolution) = match shows {
            Shows::Energy => {
                (Kind::Energy, "energy_now", 3600e-6 * step(tree, directory, "energy"))
            }
            Shows::Charge => {
                let volts = tree.number(&format!("{directory}/voltage_now"), 1e-6).unwrap_or(12.0);
                (Kind::Energy, "charge_now", 3600e-6 * step(tree, directory, "charge") * volts)
            }
            Shows::Power => (Kind::Power, "power_now", 0.01),
            Shows::Current => (Kind::Power, "current_now", 0.01),
        };
        Found::tried(Battery {
            info: Info {
                name,
                family: Family::Battery,
                scope,
                covers: "everything that the battery feeds: the whole machine with its screen"
                    .to_owned(),
                kind,
                resolution,
                // Embedded controllers renew their figures every few seconds.
                refresh: Duration::from_secs(2),
                // Asking one of them takes milliseconds.
                interval: Duration::from_millis(500),
                source: tree.path(&format!("{directory}/{file}")).display().to_string(),
            },
            tree: tree.clone(),
            directory: directory.to_owned(),
            shows,
            spent: Unwrapped::default(),
            last: None,
            joules: 0.0,
        })
    };
    let name = format!("battery:{supply}");
    match (store, flow) {
        (Some(store), Some(flow)) => vec![
            meter(store, name.clone(), Scope::System),
            // Finer, but an average of unknown length: beside the other, not added to it.
            meter(flow, format!("{name}:power"), Scope::Part),
        ],
        (Some(shows), None) | (None, Some(shows)) => vec![meter(shows, name, Scope::System)],
        (None, None) => {
            let why = "it shows neither energy_now nor charge_now with voltage_now nor power_now";
            vec![Found::Unavailable { name, why: Unavailable::new(why) }]
        }
    }
}

/// The step in which a battery counts, in millionths of its unit: the power of ten that what it
/// holds and what it could hold are multiples of. Gauges count in units of 1 or 10 mWh.
fn step(tree: &Tree, directory: &str, what: &str) -> f64 {
    let values = ["now", "full", "full_design"].map(|suffix| {
        tree.number(&format!("{directory}/{what}_{suffix}"), 1.0).unwrap_or(0.0) as u64
    });
    let mut step = 1;
    while step < 100_000 && values.iter().all(|value| value % (step * 10) == 0) {
        step *= 10;
    }
    step as f64
}

impl Battery {
    fn number(&self, file: &str, scale: f64) -> Result<f64, Unavailable> {
        self.tree.number(&format!("{}/{file}", self.directory), scale)
    }

    fn value(&mut self) -> Result<f64, Unavailable> {
        match self.shows {
            Shows::Energy => self.number("energy_now", 3600e-6),
            Shows::Charge => {
                let (charge, volts) =
                    (self.number("charge_now", 3600e-6)?, self.number("voltage_now", 1e-6)?);
                if let Some((last_charge, last_volts)) = self.last {
                    self.joules += (last_charge - charge) * (last_volts + volts) / 2.0;
                }
                self.last = Some((charge, volts));
                Ok(-self.joules)
            }
            Shows::Power => Ok(self.number("power_now", 1e-6)?.abs()),
            Shows::Current => {
                Ok((self.number("current_now", 1e-6)? * self.number("voltage_now", 1e-6)?).abs())
            }
        }
    }
}

impl Meter for Battery {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let before = Instant::now();
        let status = self.tree.text(&format!("{}/status", self.directory))?;
        if status != "Discharging" {
            return Err(Unavailable::new(format!(
                "the battery is not being discharged ({status:?}): it says what the machine \
                 consumes only without mains power"
            )));
        }
        let shown = self.value()?;
        let mut reading = Reading::since(before, shown);
        if self.info.kind == Kind::Energy {
            // What it holds falls, what was taken from it grows.
            reading.value = self.spent.advance(-shown, reading.at)?;
        }
        Ok(reading)
    }
}
