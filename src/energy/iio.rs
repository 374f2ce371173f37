//! INA sensors whose drivers belong to Linux's industrial I/O: Raspberry Pi hats (`ina2xx-adc`),
//! and the ina3221x of older Jetsons.
//!
//! Mainline: `in_power*_raw` times `in_power*_scale` is milliwatts. Jetson: `in_power*_input` in
//! milliwatts, with `rail_name_*`.

use std::time::Duration;

use super::hwmon::feeds_the_board;
use super::sysfs::{Gauge, Tree};
use super::{Family, Found, Info, Kind, Scope, Unavailable};

const DEVICES: &str = "sys/bus/iio/devices";

/// Sensors of power.
///
/// # Errors
/// There is none.
pub fn find(tree: &Tree) -> Result<Vec<Found>, Unavailable> {
    let mut found = Vec::new();
    for device in tree.list(DEVICES).unwrap_or_default() {
        let directory = format!("{DEVICES}/{device}");
        let driver = tree.text(&format!("{directory}/name")).unwrap_or_default();
        if driver.starts_with("ina") {
            found.extend((0..8).filter_map(|n| channel(tree, &directory, &driver, n)));
        }
    }
    if found.is_empty() {
        return Err(Unavailable::new(format!("no INA sensor in {}", tree.path(DEVICES).display())));
    }
    Ok(found)
}

fn channel(tree: &Tree, directory: &str, driver: &str, n: usize) -> Option<Found> {
    let file = |name: String| Some(format!("{directory}/{name}")).filter(|path| tree.has(path));
    let factors = match file(format!("in_power{n}_input")) {
        Some(milliwatts) => vec![milliwatts],
        None => {
            let raw = file(format!("in_power{n}_raw"))?;
            let scale = [format!("in_power{n}_scale"), "in_power_scale".to_owned()];
            vec![raw, scale.into_iter().find_map(file)?]
        }
    };
    let device = directory.rsplit('/').next()?;
    let label = tree.text(&format!("{directory}/rail_name_{n}")).ok().filter(|l| !l.is_empty());
    let which = label.clone().unwrap_or_else(|| format!("{driver}:{device}:{n}"));
    // The step of a raw value is its scale, and the files in milliwatts have whole ones.
    let step = factors.get(1).and_then(|scale| tree.number(scale, 1e-3).ok()).unwrap_or(1e-3);
    let paths: Vec<String> = factors.iter().map(|f| tree.path(f).display().to_string()).collect();
    Some(Found::tried(Gauge {
        info: Info {
            name: format!("rail:{which}"),
            family: Family::Rail,
            scope: if feeds_the_board(&which) { Scope::System } else { Scope::Part },
            covers: match label {
                Some(label) => format!("what the rail {label} feeds ({driver})"),
                None => format!("what flows through the shunt of this {driver}"),
            },
            kind: Kind::Power,
            resolution: step,
            refresh: Duration::from_millis(10),
            interval: Duration::from_millis(5),
            source: paths.join(" x "),
        },
        tree: tree.clone(),
        factors,
        scale: 1e-3,
    }))
}
