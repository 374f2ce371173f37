//! What macOS and Windows show: Apple silicon's own power figures, and batteries there.
//!
//! Windows shows the power of processors to drivers only, and so does macOS on Intel; there an
//! external meter, or the battery, is what is left.

use super::Discovery;

/// Adds what the operating system shows.
#[cfg(not(any(target_os = "macos", windows)))]
pub(super) fn find(_all: &mut Discovery) {}

/// Adds what the operating system shows.
#[cfg(any(target_os = "macos", windows))]
pub(super) fn find(all: &mut Discovery) {
    use super::Family;
    // sysfs was looked for in vain: what the system itself shows counts instead.
    let elsewhere = [Family::Rapl, Family::Gpu, Family::Rail, Family::Battery];
    all.absent.retain(|(family, _)| !elsewhere.contains(family));
    let rapl = "this system shows the power of processors to drivers only; use its battery, or \
                an external meter (cmd:...)";
    if !cfg!(all(target_os = "macos", target_arch = "aarch64")) {
        all.absent.push((Family::Rapl, super::Unavailable::new(rapl)));
    }
    #[cfg(all(target_os = "macos", target_arch = "aarch64"))]
    all.add(Family::Apple, apple::find());
    all.add(Family::Battery, battery::find());
}

#[cfg(any(target_os = "macos", windows))]
mod battery {
    use std::time::{Duration, Instant};

    use starship_battery::units::energy::joule;
    use starship_battery::units::power::watt;
    use starship_battery::{Manager, State};

    use crate::energy::{Family, Found, Info, Kind, Meter, Reading, Scope, Unavailable};

    /// A battery, while it is being discharged.
    struct Battery {
        info: Info,
        number: usize,
    }

    fn said(error: starship_battery::Error) -> Unavailable {
        Unavailable::new(error.to_string())
    }

    pub fn find() -> Result<Vec<Found>, Unavailable> {
        let count = Manager::new().and_then(|m| m.batteries()).map_err(said)?.count();
        if count == 0 {
            return Err(Unavailable::new("no battery"));
        }
        Ok((0..count)
            .map(|number| {
                Found::tried(Battery {
                    info: Info {
                        name: format!("battery:{number}"),
                        family: Family::Battery,
                        scope: Scope::System,
                        covers: "everything that the battery feeds".to_owned(),
                        kind: Kind::Power,
                        resolution: 0.1,
                        refresh: Duration::from_secs(2),
                        interval: Duration::from_millis(500),
                        source: "the system's battery interface".to_owned(),
                    },
                    number,
                })
            })
            .collect())
    }

    impl Meter for Battery {
        fn info(&self) -> &Info {
            &self.info
        }

        fn read(&mut self) -> Result<Reading, Unavailable> {
            let before = Instant::now();
            // Handles of the system are bound to a thread, so none is kept.
            let mut batteries = Manager::new().and_then(|m| m.batteries()).map_err(said)?;
            let battery = batteries
                .nth(self.number)
                .ok_or_else(|| Unavailable::new("the battery is gone"))?
                .map_err(said)?;
            if battery.state() != State::Discharging {
                return Err(Unavailable::new(format!(
                    "the battery is not being discharged ({})",
                    battery.state()
                )));
            }
            let watts = f64::from(battery.energy_rate().get::<watt>()).abs();
            // A rate of 0 while energy leaves it is a driver that does not know.
            if watts == 0.0 && battery.energy().get::<joule>() > 0.0 {
                return Err(Unavailable::new("the battery's driver does not show its power"));
            }
            Ok(Reading::since(before, watts))
        }
    }
}

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod apple {
    use std::sync::{Arc, Mutex, PoisonError, Weak};
    use std::time::{Duration, Instant};

    use macmon::Sampler;

    use crate::energy::{Family, Found, Info, Kind, Meter, Reading, Scope, Unavailable};

    /// How long the sampler averages for each figure.
    const AVERAGED: Duration = Duration::from_millis(100);

    type Latest = Mutex<Result<Reading, Unavailable>>;

    /// The chip's power, which a thread of its own keeps asking for, since each answer takes as
    /// long as it averages.
    struct Soc {
        info: Info,
        latest: Arc<Latest>,
    }

    fn sample(sampler: &mut Sampler) -> Result<Reading, Unavailable> {
        let before = Instant::now();
        let metrics = sampler
            .get_metrics(AVERAGED.as_millis() as u32)
            .map_err(|error| Unavailable::new(error.to_string()))?;
        Ok(Reading::since(before, f64::from(metrics.all_power)))
    }

    fn follow(mut sampler: Sampler, latest: &Weak<Latest>) {
        loop {
            let reading = sample(&mut sampler);
            // Nobody to tell: the meter is gone.
            let Some(latest) = latest.upgrade() else { return };
            *latest.lock().unwrap_or_else(PoisonError::into_inner) = reading;
        }
    }

    pub fn find() -> Result<Vec<Found>, Unavailable> {
        let failed = |error: &dyn std::fmt::Display| Unavailable::new(error.to_string());
        let latest = Arc::new(Mutex::new(Err(Unavailable::new("no figure yet"))));
        let weak = Arc::downgrade(&latest);
        let (ready, started) = std::sync::mpsc::channel();
        // The sampler stays in the thread that made it.
        std::thread::Builder::new()
            .name("apple power".to_owned())
            .spawn(move || {
                let first = Sampler::new().map_err(|error| Unavailable::new(error.to_string()));
                let first = first.and_then(|mut s| sample(&mut s).map(|reading| (s, reading)));
                match first {
                    Ok((sampler, reading)) => {
                        let _ = ready.send(Ok(reading));
                        follow(sampler, &weak);
                    }
                    Err(why) => drop(ready.send(Err(why))),
                }
            })
            .map_err(|error| failed(&error))?;
        let first = started.recv().map_err(|error| failed(&error))??;
        *latest.lock().unwrap_or_else(PoisonError::into_inner) = Ok(first);
        Ok(vec![Found::tried(Soc {
            info: Info {
                name: "apple:soc".to_owned(),
                family: Family::Apple,
                scope: Scope::System,
                covers: "CPU, GPU and neural engine of the chip; neither memory nor screen"
                    .to_owned(),
                kind: Kind::Power,
                resolution: 1e-3,
                refresh: AVERAGED,
                interval: AVERAGED / 2,
                source: "IOReport".to_owned(),
            },
            latest,
        })])
    }

    impl Meter for Soc {
        fn info(&self) -> &Info {
            &self.info
        }

        fn read(&mut self) -> Result<Reading, Unavailable> {
            self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
        }
    }
}
