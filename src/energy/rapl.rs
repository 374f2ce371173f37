//! RAPL: the energy counters of Intel and AMD processors, through Linux's powercap.
//!
//! A domain is a directory of `/sys/class/powercap` with `name`, `energy_uj` and
//! `max_energy_range_uj`: `intel-rapl:0` is a package, `intel-rapl:0:1` a part of it.
//! `intel-rapl-mmio` shows the same packages by another way and is left out.

use std::time::Duration;

use super::sysfs::{Counter, Tree, Unwrapped};
use super::{Family, Found, Info, Kind, Scope, Unavailable};

const POWERCAP: &str = "sys/class/powercap";

const ADVICE: &str = ": since Linux 5.10 only root may read RAPL, because its counters reveal \
    what a processor computes. Until the next boot, `sudo chmod a+r \
    /sys/class/powercap/intel-rapl*/energy_uj` allows it to everyone on this machine; \
    docs/energy.md has a rule that lasts";

/// The domains of all packages.
///
/// # Errors
/// There is none.
pub fn find(tree: &Tree) -> Result<Vec<Found>, Unavailable> {
    let names = tree.list(POWERCAP).unwrap_or_default();
    let zones: Vec<&String> = names.iter().filter(|name| name.starts_with("intel-rapl:")).collect();
    if zones.is_empty() {
        return Err(Unavailable::new(format!(
            "no intel-rapl domain in {} (another processor, a virtual machine, or the module \
             intel_rapl_msr is not loaded)",
            tree.path(POWERCAP).display()
        )));
    }
    Ok(zones.into_iter().map(|zone| domain(tree, zone)).collect())
}

fn domain(tree: &Tree, zone: &str) -> Found {
    let directory = format!("{POWERCAP}/{zone}");
    let file = |name: &str| format!("{directory}/{name}");
    // A part is named after its package: "intel-rapl:0:1" lies in "intel-rapl:0".
    let parent = zone.rsplit_once(':').filter(|(parent, _)| parent.contains(':'));
    let own = tree.text(&file("name")).unwrap_or_else(|_| zone.to_owned());
    let name = match parent.and_then(|(p, _)| tree.text(&format!("{POWERCAP}/{p}/name")).ok()) {
        Some(parent) => format!("rapl:{parent}:{own}"),
        None => format!("rapl:{own}"),
    };
    let (scope, covers) = match own.as_str() {
        "core" => (Scope::Part, "the cores and their caches; part of the package"),
        "uncore" => (Scope::Part, "on client processors the integrated GPU; part of the package"),
        "dram" => (Scope::Memory, "memory modules, as the memory controller estimates them"),
        "psys" => (Scope::System, "the platform; calibrated on some laptops only"),
        _ if parent.is_none() => {
            (Scope::Package, "the processor package: cores, caches, memory controller, its own GPU")
        }
        _ => (Scope::Part, "a part of the package"),
    };
    let range = match tree.number(&file("max_energy_range_uj"), 1e-6) {
        Ok(range) if range > 0.0 => Some(range),
        // Without it a counter still does until it wraps, and then says so.
        _ => None,
    };
    Found::tried(Counter {
        info: Info {
            name,
            family: Family::Rapl,
            scope,
            covers: covers.to_owned(),
            kind: Kind::Energy,
            // Units of the counter: 2^-14 J, or 2^-16 J for the memory of servers.
            resolution: 1.0 / f64::from(1 << 14),
            refresh: Duration::from_millis(1),
            interval: Duration::from_millis(2),
            source: tree.path(&file("energy_uj")).display().to_string(),
        },
        tree: tree.clone(),
        path: file("energy_uj"),
        scale: 1e-6,
        unwrapped: Unwrapped::new(range),
        advice: ADVICE,
    })
}
