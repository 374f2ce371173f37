//! Meters against trees that look like sysfs, libraries that look like NVML, and commands; what
//! is integrated from them against curves whose integral is known.
#![cfg(unix)]

use std::f64::consts::PI;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mtad::energy::{
    Consumption, Family, Found, Info, Kind, Library, Marker, Meter, Reading, Recorder, Recording,
    Scope, Sources, Trace, Unavailable, Window, counted,
};
use tempfile::TempDir;

/// A tree that stands for `/`.
struct Fake(TempDir);

impl Fake {
    fn new() -> Self {
        Fake(tempfile::tempdir().unwrap())
    }

    fn with(files: &[(&str, &str)]) -> Self {
        let fake = Fake::new();
        files.iter().for_each(|(path, text)| fake.set(path, text));
        fake
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn set(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // All at once, as the kernel does it.
        let whole = path.with_extension("new");
        fs::write(&whole, format!("{text}\n")).unwrap();
        fs::rename(whole, path).unwrap();
    }

    fn sources(&self) -> Sources {
        Sources::below(self.0.path())
    }

    fn find(&self) -> Vec<Found> {
        self.sources().find().meters
    }

    /// The meter of a name, which must be readable.
    fn meter(&self, name: &str) -> Box<dyn Meter> {
        meter(self.find(), name)
    }

    /// Why the meter of a name is unavailable.
    fn why_not(&self, name: &str) -> String {
        why_not(self.find(), name)
    }
}

fn meter(found: Vec<Found>, name: &str) -> Box<dyn Meter> {
    let names = format!("{found:?}");
    match found.into_iter().find(|m| m.name() == name) {
        Some(Found::Meter(meter)) => meter,
        _ => panic!("{name} is not among {names}"),
    }
}

fn why_not(found: Vec<Found>, name: &str) -> String {
    let names = format!("{found:?}");
    match found.into_iter().find(|m| m.name() == name) {
        Some(Found::Unavailable { why, .. }) => why.reason,
        _ => panic!("{name} is not unavailable among {names}"),
    }
}

fn value(meter: &mut dyn Meter) -> f64 {
    meter.read().unwrap().value
}

fn close(a: f64, b: f64, relative: f64) {
    assert!((a - b).abs() <= relative * b.abs(), "{a} is not within {relative} of {b}");
}

const RAPL: &str = "sys/class/powercap";

/// A package with its parts, and the platform.
fn rapl() -> Fake {
    let fake = Fake::new();
    for (zone, name, microjoules) in [
        ("intel-rapl:0", "package-0", 1_000_000),
        ("intel-rapl:0:0", "core", 2_000_000),
        ("intel-rapl:0:1", "uncore", 3_000_000),
        ("intel-rapl:0:2", "dram", 4_000_000),
        ("intel-rapl:1", "psys", 5_000_000),
        // The same package by another way, and what is no RAPL at all.
        ("intel-rapl-mmio:0", "package-0", 6_000_000),
        ("dtpm:0", "soc", 7_000_000),
    ] {
        fake.set(&format!("{RAPL}/{zone}/name"), name);
        fake.set(&format!("{RAPL}/{zone}/energy_uj"), &microjoules.to_string());
        fake.set(&format!("{RAPL}/{zone}/max_energy_range_uj"), "262143328850");
    }
    fake
}

#[test]
fn rapl_domains_are_named_counted_once_and_unwrapped() {
    let fake = rapl();
    let found = fake.find();
    let names: Vec<&str> = found.iter().map(Found::name).collect();
    let parts = ["rapl:package-0:core", "rapl:package-0:uncore", "rapl:package-0:dram"];
    assert_eq!(names[..2], ["rapl:package-0", "rapl:psys"]);
    assert_eq!(names[2..], parts);

    let mut package = fake.meter("rapl:package-0");
    assert_eq!(package.info().kind, Kind::Energy);
    assert_eq!(value(&mut *package), 0.0);
    fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), "3500000");
    close(value(&mut *package), 2.5, 1e-12);
    // Standing still is no fault.
    close(value(&mut *package), 2.5, 1e-12);
    // Near the end of its range and around it.
    let mut package = {
        fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), "262143000000");
        fake.meter("rapl:package-0")
    };
    fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), "671150");
    close(value(&mut *package), 1.0, 1e-9);
    // Back to 0 out of the middle is a reset, not a wrap-around.
    fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), "131071000000");
    package.read().unwrap();
    fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), "0");
    assert!(package.read().unwrap_err().reason.contains("set back"));
}

#[test]
fn rapl_says_what_is_missing_garbled_or_denied() {
    let fake = rapl();
    fs::remove_file(fake.path(&format!("{RAPL}/intel-rapl:0/energy_uj"))).unwrap();
    assert!(fake.why_not("rapl:package-0").ends_with("energy_uj is not there"));
    for garbage in ["", "lots", "12 34", "nan", "\u{1}\u{2}"] {
        fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), garbage);
        let why = fake.why_not("rapl:package-0");
        assert!(why.ends_with("not a number"), "{garbage:?}: {why}");
    }
    // Bytes that are no text.
    fs::write(fake.path(&format!("{RAPL}/intel-rapl:0/energy_uj")), [0xff, 0xfe]).unwrap();
    fake.why_not("rapl:package-0");
    // A domain without a name has its directory's; one without a range counts until it wraps.
    fs::remove_file(fake.path(&format!("{RAPL}/intel-rapl:1/name"))).unwrap();
    fs::remove_file(fake.path(&format!("{RAPL}/intel-rapl:1/max_energy_range_uj"))).unwrap();
    let mut nameless = fake.meter("rapl:intel-rapl:1");
    fake.set(&format!("{RAPL}/intel-rapl:1/energy_uj"), "6000000");
    close(value(&mut *nameless), 1.0, 1e-12);
    fake.set(&format!("{RAPL}/intel-rapl:1/energy_uj"), "5");
    assert!(nameless.read().is_err());

    let fake = rapl();
    let mut sources = fake.sources();
    sources.tree = sources.tree.with_fault(|path: &Path| {
        path.ends_with("energy_uj").then_some(io::ErrorKind::PermissionDenied)
    });
    let why = why_not(sources.find().meters, "rapl:package-0");
    for part in ["permission denied", "intel-rapl:0/energy_uj", "sudo chmod a+r", "docs/energy.md"]
    {
        assert!(why.contains(part), "{why}");
    }
    // Nothing at all is no error, but a statement.
    let empty = Fake::new().sources().find();
    assert!(empty.meters.is_empty());
    let families: Vec<_> = empty.absent.iter().map(|(family, _)| *family).collect();
    let expected = [Family::Rapl, Family::Nvml, Family::Gpu, Family::Rail, Family::Battery];
    assert_eq!(families, expected);
}

#[test]
fn a_domain_that_disappears_takes_its_figures_and_the_total_with_it() {
    let fake = rapl();
    let meters = vec![fake.meter("rapl:package-0"), fake.meter("rapl:package-0:dram")];
    let recorder = Recorder::start(meters, 500.0).unwrap();
    let from = recorder.begin();
    let dram = fake.path(&format!("{RAPL}/intel-rapl:0:2/energy_uj"));
    for i in 0..40 {
        fake.set(&format!("{RAPL}/intel-rapl:0/energy_uj"), &(2_000_000 + 500_000 * i).to_string());
        if i == 20 {
            fs::remove_file(&dram).unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let window = recorder.end(from);
    let recording = recorder.stop();
    assert!(recording.consumption(0, &[window]).unwrap().joules > 15.0);
    for why in [recording.consumption(1, &[window]), recording.total(&[window])] {
        let why = why.unwrap_err().to_string();
        assert!(why.starts_with("unavailable: rapl:package-0:dram: lost after 0."), "{why}");
        assert!(why.ends_with("is not there"), "{why}");
    }
}

#[test]
fn cards_show_energy_or_power_through_hwmon() {
    let fake = Fake::with(&[
        ("sys/class/hwmon/hwmon0/name", "acpitz"),
        ("sys/class/hwmon/hwmon1/name", "amdgpu"),
        ("sys/class/hwmon/hwmon1/power1_average", "35000000"),
        ("sys/class/hwmon/hwmon1/power1_cap", "100000000"),
        ("sys/class/hwmon/hwmon1/device/uevent", "DRIVER=amdgpu\nPCI_SLOT_NAME=0000:03:00.0"),
        ("sys/class/hwmon/hwmon2/name", "amdgpu"),
        ("sys/class/hwmon/hwmon2/power1_input", "15000000"),
        ("sys/class/hwmon/hwmon3/name", "xe"),
        ("sys/class/hwmon/hwmon3/energy1_input", "1000000"),
        ("sys/class/hwmon/hwmon3/energy1_label", "card"),
        ("sys/class/hwmon/hwmon3/energy2_input", "500000"),
        ("sys/class/hwmon/hwmon3/energy2_label", "pkg"),
        ("sys/class/hwmon/hwmon4/name", "i915"),
        ("sys/class/hwmon/hwmon4/energy1_input", "9000000"),
        ("sys/class/hwmon/hwmon5/name", "nouveau"),
        ("sys/class/hwmon/hwmon6/name", "xe"),
        ("sys/class/hwmon/hwmon6/energy1_input", "77"),
        ("sys/class/hwmon/hwmon6/energy1_label", "pkg"),
    ]);
    let mut card = fake.meter("gpu:amdgpu:0000:03:00.0");
    assert_eq!((card.info().kind, card.info().scope), (Kind::Power, Scope::Card));
    assert_eq!(value(&mut *card), 35.0);
    fake.set("sys/class/hwmon/hwmon1/power1_average", "40000000");
    assert_eq!(value(&mut *card), 40.0);
    fake.set("sys/class/hwmon/hwmon1/power1_average", "N/A");
    assert!(card.read().unwrap_err().reason.contains("\"N/A\", not a number"));
    // A chip with a CPU on it has no power limit of its own.
    assert_eq!(fake.meter("gpu:amdgpu:hwmon2").info().scope, Scope::Soc);
    let mut card = fake.meter("gpu:xe:hwmon3");
    assert_eq!((card.info().kind, card.info().scope), (Kind::Energy, Scope::Card));
    fake.set("sys/class/hwmon/hwmon3/energy1_input", "3000000");
    close(value(&mut *card), 2.0, 1e-12);
    assert_eq!(fake.meter("gpu:xe:hwmon3:pkg").info().scope, Scope::Part);
    assert_eq!(fake.meter("gpu:i915:hwmon4").info().kind, Kind::Energy);
    assert!(fake.why_not("gpu:nouveau:hwmon5").contains("energy1_input"));
    assert_eq!(fake.meter("gpu:xe:hwmon6").info().scope, Scope::Card);
}

#[test]
fn rails_show_power_through_hwmon_and_iio() {
    let fake = Fake::with(&[
        ("sys/class/hwmon/hwmon0/name", "ina3221"),
        ("sys/class/hwmon/hwmon0/in1_label", "VDD_IN"),
        ("sys/class/hwmon/hwmon0/in1_input", "5000"),
        ("sys/class/hwmon/hwmon0/curr1_input", "1200"),
        ("sys/class/hwmon/hwmon0/in2_label", "VDD_CPU_GPU_CV"),
        ("sys/class/hwmon/hwmon0/in2_input", "5000"),
        ("sys/class/hwmon/hwmon0/curr2_input", "-400"),
        // A voltage without a current is no power.
        ("sys/class/hwmon/hwmon0/in7_input", "5000"),
        ("sys/class/hwmon/hwmon1/name", "ina226"),
        ("sys/class/hwmon/hwmon1/power1_input", "2500000"),
        ("sys/class/hwmon/hwmon2/name", "ina238"),
        ("sys/class/hwmon/hwmon2/energy1_input", "1000000"),
        ("sys/class/hwmon/hwmon2/power1_input", "1"),
        ("sys/bus/iio/devices/iio:device0/name", "ina219"),
        ("sys/bus/iio/devices/iio:device0/in_power2_raw", "150"),
        ("sys/bus/iio/devices/iio:device0/in_power2_scale", "20"),
        ("sys/bus/iio/devices/iio:device1/name", "ina3221x"),
        ("sys/bus/iio/devices/iio:device1/in_power0_input", "4210"),
        ("sys/bus/iio/devices/iio:device1/rail_name_0", "POM_5V_GPU"),
        ("sys/bus/iio/devices/iio:device2/name", "mcp3008"),
    ]);
    let mut board = fake.meter("rail:VDD_IN");
    assert_eq!(board.info().scope, Scope::System);
    close(value(&mut *board), 6.0, 1e-9);
    let mut part = fake.meter("rail:VDD_CPU_GPU_CV");
    assert_eq!(part.info().scope, Scope::Part);
    close(value(&mut *part), 2.0, 1e-9);
    close(value(&mut *fake.meter("rail:ina226:hwmon1:1")), 2.5, 1e-9);
    assert_eq!(fake.meter("rail:ina238:hwmon2:1").info().kind, Kind::Energy);
    close(value(&mut *fake.meter("rail:ina219:iio:device0:2")), 3.0, 1e-9);
    close(value(&mut *fake.meter("rail:POM_5V_GPU")), 4.21, 1e-9);
    assert_eq!(fake.find().len(), 6);
    fs::remove_file(fake.path("sys/class/hwmon/hwmon0/curr1_input")).unwrap();
    assert!(board.read().unwrap_err().reason.contains("curr1_input is not there"));
    fake.set("sys/class/hwmon/hwmon1/power1_input", "-");
    assert!(fake.why_not("rail:ina226:hwmon1:1").contains("not a number"));
}

#[test]
fn batteries_count_only_while_they_are_discharged() {
    const BAT: &str = "sys/class/power_supply/BAT0";
    let fake = Fake::with(&[
        ("sys/class/power_supply/AC/type", "Mains"),
        ("sys/class/power_supply/hidpp_battery_0/type", "Battery"),
        ("sys/class/power_supply/hidpp_battery_0/scope", "Device"),
        ("sys/class/power_supply/hidpp_battery_0/energy_now", "1"),
        ("sys/class/power_supply/BAT0/type", "Battery"),
        ("sys/class/power_supply/BAT0/status", "Discharging"),
        ("sys/class/power_supply/BAT0/energy_now", "40000000"),
        ("sys/class/power_supply/BAT0/energy_full", "50010000"),
        ("sys/class/power_supply/BAT0/power_now", "12500000"),
        ("sys/class/power_supply/BAT1/type", "Battery"),
        ("sys/class/power_supply/BAT1/status", "Discharging"),
        ("sys/class/power_supply/BAT1/charge_now", "3000000"),
        ("sys/class/power_supply/BAT1/voltage_now", "12000000"),
        ("sys/class/power_supply/BAT1/current_now", "-1000000"),
    ]);
    assert_eq!(fake.find().len(), 4, "{:?}", fake.find());
    let mut battery = fake.meter("battery:BAT0");
    assert_eq!((battery.info().kind, battery.info().scope), (Kind::Energy, Scope::System));
    // It counts in steps of 10 mWh.
    close(battery.info().resolution, 36.0, 1e-9);
    fake.set(&format!("{BAT}/energy_now"), "39990000");
    close(value(&mut *battery), 36.0, 1e-9);
    close(value(&mut *fake.meter("battery:BAT0:power")), 12.5, 1e-9);
    // 1 mAh at 12 V and 1 mAh at 12 to 11 V.
    let mut charge = fake.meter("battery:BAT1");
    fake.set("sys/class/power_supply/BAT1/charge_now", "2999000");
    close(value(&mut *charge), 43.2, 1e-9);
    fake.set("sys/class/power_supply/BAT1/charge_now", "2998000");
    fake.set("sys/class/power_supply/BAT1/voltage_now", "11000000");
    close(value(&mut *charge), 43.2 + 41.4, 1e-9);
    close(value(&mut *fake.meter("battery:BAT1:power")), 11.0, 1e-9);
    // Plugged in, in the middle of it all.
    fake.set(&format!("{BAT}/status"), "Charging");
    assert!(battery.read().unwrap_err().reason.contains("not being discharged (\"Charging\")"));
    assert!(fake.why_not("battery:BAT0").contains("not being discharged"));
    fake.set(&format!("{BAT}/status"), "Discharging");
    fake.set(&format!("{BAT}/energy_now"), "?");
    assert!(fake.why_not("battery:BAT0").contains("not a number"));
    for file in ["energy_now", "power_now"] {
        fs::remove_file(fake.path(&format!("{BAT}/{file}"))).unwrap();
    }
    assert!(fake.why_not("battery:BAT0").contains("neither energy_now"));
}

#[test]
fn commands_and_files_are_meters() {
    let open = |name: &str| Sources::below("/nowhere").choose(&[name.to_owned()]).unwrap().meters;
    // A command that ends is run again, and counts joules from its first line on.
    let fake = Fake::with(&[("joules", "5000 J")]);
    let file = fake.path("joules").display().to_string();
    let name = format!("cmd:cat {file}");
    let mut counter = meter(open(&name), &name);
    assert_eq!((counter.info().kind, value(&mut *counter)), (Kind::Energy, 0.0));
    fake.set("joules", "5003 J");
    let begun = Instant::now();
    while value(&mut *counter) == 0.0 && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    close(value(&mut *counter), 3.0, 1e-9);
    fake.set("joules", "nothing");
    let begun = Instant::now();
    while counter.read().is_ok() && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(counter.read().unwrap_err().reason.contains("\"nothing\""));
    // One that goes on printing is read as it goes.
    let name = "cmd:echo 5 W; sleep 0.1; echo 6 W; exec sleep 60";
    let mut stream = meter(open(name), name);
    assert_eq!(stream.info().kind, Kind::Power);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(value(&mut *stream), 6.0);
    drop(stream);
    for (command, said) in [
        ("cmd:exit 3", "exit status: 3"),
        ("cmd:true", "printed nothing"),
        ("cmd:echo 12", "\"12\""),
        ("cmd:no-such-command-anywhere 2>/dev/null", "failed"),
    ] {
        let why = why_not(open(command), command);
        assert!(why.contains(said), "{command}: {why}");
    }
    // A file.
    let name = format!("file:{file}");
    fake.set("joules", "2 W");
    let mut gauge = meter(open(&name), &name);
    assert_eq!((gauge.info().kind, value(&mut *gauge)), (Kind::Power, 2.0));
    fake.set("joules", "2 J");
    assert!(gauge.read().unwrap_err().reason.contains("changed between power and energy"));
    fs::remove_file(fake.path("joules")).unwrap();
    assert!(gauge.read().is_err());
    assert!(why_not(open("file:/dev/null"), "file:/dev/null").contains("cmd:cat"));
}

/// A library with the functions of NVML that are used: card 0 counts energy, card 1 shows power
/// only, card 2 is lost. `INIT` is what it answers at first, `CARDS` how many it has.
const NVML: &str = r#"
#include <string.h>
static unsigned long long energy = 1000000;
static int devices[3] = {0, 1, 2};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = CARDS; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) {
    if (i > 2) return 2;
    *device = &devices[i];
    return i == 2 ? 15 : 0;
}
int nvmlDeviceGetName(void *device, char *name, unsigned len) {
    strncpy(name, "Stub 9000", len);
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    if (*(int *)device != 0) return 3;
    *millijoules = energy;
    energy += 2500;
    return 0;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 75000; return 0; }
"#;

/// The stub as a library, or `None` where there is no C compiler (in CI that is a failure).
fn nvml_stub(directory: &Path, init: u32, cards: u32) -> Option<Library> {
    let (source, library) =
        (directory.join("nvml.c"), directory.join(format!("libnvml-{init}-{cards}.so")));
    fs::write(&source, NVML).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", &format!("-DINIT={init}"), &format!("-DCARDS={cards}"), "-o"]);
    if cc.arg(&library).arg(&source).status().is_ok_and(|status| status.success()) {
        return Some(Library::File(library));
    }
    let why = "no C compiler (cc) to build the stub of NVML with";
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{why}");
    eprintln!("skipped: {why}");
    None
}

#[test]
fn nvml_counts_energy_or_shows_power_and_may_be_absent() {
    let fake = Fake::new();
    let with = |library| Sources { nvml: library, ..fake.sources() }.find();
    let absent = |library| {
        let all = with(library);
        assert!(all.meters.is_empty());
        let nvml = all.absent.into_iter().find(|(family, _)| *family == Family::Nvml);
        nvml.unwrap().1.reason
    };
    let nowhere = Library::File(fake.path("libnvidia-ml.so.1"));
    assert!(absent(nowhere).starts_with("no NVIDIA management library"));
    fake.set("libgarbage.so", "not a library");
    assert!(absent(Library::File(fake.path("libgarbage.so"))).starts_with("no NVIDIA"));

    let Some(library) = nvml_stub(fake.0.path(), 0, 3) else { return };
    let without_driver = nvml_stub(fake.0.path(), 9, 3).unwrap();
    assert!(absent(without_driver).starts_with("NVIDIA's driver does not answer: "));
    let without_card = nvml_stub(fake.0.path(), 0, 0).unwrap();
    assert_eq!(absent(without_card), "NVIDIA's driver shows no card");
    let mut counter = meter(with(library.clone()).meters, "nvml:0");
    assert_eq!(counter.info().kind, Kind::Energy);
    assert!(counter.info().covers.contains("Stub 9000"));
    let first = value(&mut *counter);
    close(value(&mut *counter) - first, 2.5, 1e-9);
    let mut gauge = meter(with(library.clone()).meters, "nvml:1");
    assert_eq!((gauge.info().kind, value(&mut *gauge)), (Kind::Power, 75.0));
    assert!(why_not(with(library).meters, "nvml:2").starts_with("NVML: "));
}

/// The real library, where there is one.
#[test]
fn nvml_of_this_machine() {
    let sources = Sources { nvml: Library::System, ..Sources::below("/nowhere") };
    let found = sources.find();
    for card in found.meters {
        eprintln!("{card:?}");
        if let Found::Meter(mut card) = card {
            let first = card.read().unwrap();
            std::thread::sleep(Duration::from_millis(300));
            let second = card.read().unwrap();
            assert!(second.value > 0.0);
            assert!(card.info().kind == Kind::Power || second.value > first.value);
        }
    }
}

#[test]
fn meters_are_chosen_by_name_or_family() {
    let fake = rapl();
    let choose = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let chosen = fake.sources().choose(&names);
        chosen.map(|all| all.meters.iter().map(|m| m.name().to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(choose(&[]).unwrap().len(), 5);
    assert_eq!(choose(&["rapl"]).unwrap().len(), 5);
    assert_eq!(choose(&["rapl:psys"]).unwrap(), ["rapl:psys"]);
    // A package stands for its parts, too.
    assert_eq!(choose(&["rapl:package-0"]).unwrap().len(), 4);
    assert_eq!(choose(&["rapl:package-0:core", "rapl"]).unwrap().len(), 5);
    assert_eq!(choose(&["rapl", "rapl:psys"]).unwrap().len(), 5);
    // A family that there is none of is unavailable, a name that nothing can have a mistake.
    assert_eq!(choose(&["nvml"]).unwrap(), ["nvml"]);
    let why = choose(&["rapple"]).unwrap_err().to_string();
    assert!(why.contains("\"rapple\"") && why.contains("rapl:psys"), "{why}");
}

fn info(name: &str, family: Family, scope: Scope) -> Info {
    Info {
        name: name.to_owned(),
        family,
        scope,
        covers: String::new(),
        kind: Kind::Energy,
        resolution: 1e-6,
        refresh: Duration::from_millis(1),
        interval: Duration::from_millis(1),
        source: String::new(),
    }
}

#[test]
fn nothing_is_counted_twice() {
    use Family::*;
    use Scope::*;
    let total = |meters: &[(Family, Scope)]| {
        let infos: Vec<Info> =
            meters.iter().enumerate().map(|(i, m)| info(&i.to_string(), m.0, m.1)).collect();
        let picked = counted(&infos.iter().collect::<Vec<_>>());
        (0..meters.len()).filter(|&i| picked[i]).collect::<Vec<_>>()
    };
    let laptop = [(Rapl, Package), (Rapl, Part), (Rapl, Memory), (Rapl, System), (Battery, System)];
    assert_eq!(total(&laptop), [0, 2]);
    assert_eq!(total(&[(Rapl, Package), (Rapl, Package), (Nvml, Card), (Gpu, Soc)]), [0, 1, 2]);
    assert_eq!(total(&[(Gpu, Soc), (Gpu, Card)]), [0, 1]);
    assert_eq!(
        total(&[(Nvml, Card), (Battery, System), (Battery, System), (Battery, Part)]),
        [1, 2]
    );
    assert_eq!(total(&[(Nvml, Card), (Rapl, System)]), [1]);
    assert_eq!(total(&[(Nvml, Card), (Rapl, Part)]), [0]);
    assert_eq!(total(&[(Rail, System), (Rail, Part), (Rail, Part)]), [0]);
    assert_eq!(total(&[(Rail, Part), (Rail, Part)]), [0, 1]);
    assert_eq!(total(&[(Rapl, Package), (External, System)]), [1]);
    assert_eq!(total(&[(Rapl, Part)]), [0]);
    assert_eq!(total(&[]), [0usize; 0]);
}

/// A recording of one meter that showed `value(t)` at the given seconds, with phases.
fn recorded(
    info: Info,
    origin: Instant,
    times: impl Iterator<Item = f64>,
    value: impl Fn(f64) -> f64,
    marker: &Marker,
) -> Recording {
    let mut trace = Trace::new(info, origin);
    for t in times {
        let at = origin + Duration::from_secs_f64(t);
        trace.push(Ok(Reading { at, value: value(t) }));
    }
    Recording::new(vec![trace], marker, 50.0)
}

fn window(origin: Instant, from: f64, to: f64) -> Window {
    let at = |t| origin + Duration::from_secs_f64(t);
    Window { from: at(from), to: at(to) }
}

/// Times 20 ms apart, with jitter.
fn times(seconds: f64) -> impl Iterator<Item = f64> {
    let count = (seconds / 0.02) as usize;
    (0..=count).map(|i| i as f64 * 0.02 + 0.008 * (i as f64 * 1.7).sin().abs())
}

#[test]
fn a_known_power_curve_is_integrated_and_phases_add_up() {
    let origin = Instant::now();
    // Watts and joules of a load that swings, with a spike now and then.
    let watts = |t: f64| 20.0 + 12.0 * (2.0 * PI * t / 0.7).sin() + t;
    let joules = |t: f64| {
        20.0 * t + 12.0 * 0.7 / (2.0 * PI) * (1.0 - (2.0 * PI * t / 0.7).cos()) + t * t / 2.0
    };
    let marker = Marker::default();
    let at = |t: f64| origin + Duration::from_secs_f64(t);
    let phases = ["prefill", "draft", "verify", "sample"];
    let mut expected = [0.0; 5];
    let mut t = 1.0;
    for i in 0..60 {
        let phase = i % 5;
        let length = [0.31, 0.11, 0.23, 0.002, 0.05][phase];
        marker.mark(phases.get(phase).copied(), at(t));
        expected[phase] += joules(t + length) - joules(t);
        t += length;
    }
    marker.mark(None, at(t));
    let end = t + 0.3;
    expected[4] += joules(end) - joules(t);
    for (kind, value) in [(Kind::Power, &watts as &dyn Fn(f64) -> f64), (Kind::Energy, &joules)] {
        let info = Info { kind, ..info("known", Family::External, Scope::System) };
        let recording = recorded(info, origin, times(12.0), value, &marker);
        let used = recording.total(&[window(origin, 1.0, end)]).unwrap();
        close(used.joules, joules(end) - joules(1.0), 0.005);
        assert!((used.joules - (joules(end) - joules(1.0))).abs() <= used.uncertainty);
        close(used.phases.iter().map(|p| p.joules).sum(), used.joules, 0.001);
        close(used.phases.iter().map(|p| p.seconds).sum(), used.seconds, 0.001);
        for (phase, expected) in phases.into_iter().chain(["other"]).zip(expected) {
            // The samples of 2 ms are shorter than what was read; the rest is.
            let within = if phase == "sample" { 0.2 } else { 0.005 };
            close(used.phase(phase), expected, within);
        }
        let resolved = |phase| used.phases.iter().find(|p| p.phase == phase).unwrap().resolved;
        assert_eq!((resolved("prefill"), resolved("sample")), (1.0, 0.0));
        // Several windows are their sum.
        let parts = [window(origin, 1.0, 3.0), window(origin, 3.0, 4.5)];
        let both = recording.total(&parts).unwrap();
        close(both.joules, joules(4.5) - joules(1.0), 0.005);
        close(both.phases.iter().map(|p| p.joules).sum(), both.joules, 0.001);
    }
}

/// A meter that shows a power that is a function of time.
struct Known {
    info: Info,
    origin: Instant,
}

fn known_watts(t: f64) -> f64 {
    30.0 + 10.0 * (2.0 * PI * t / 0.25).sin()
}

impl Meter for Known {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let at = Instant::now();
        Ok(Reading { at, value: known_watts((at - self.origin).as_secs_f64()) })
    }
}

#[test]
fn the_thread_integrates_a_known_power_curve() {
    let origin = Instant::now();
    let info = Info {
        kind: Kind::Power,
        resolution: 1e-6,
        ..info("known", Family::External, Scope::System)
    };
    let recorder = Recorder::start(vec![Box::new(Known { info, origin })], 200.0).unwrap();
    let from = recorder.begin();
    let marker = recorder.marker();
    for i in 0..10 {
        marker.mark(Some(if i % 2 == 0 { "draft" } else { "verify" }), Instant::now());
        std::thread::sleep(Duration::from_millis(70));
    }
    let window = recorder.end(from);
    let recording = recorder.stop();
    let used = recording.total(&[window]).unwrap();
    let joules = |at: Instant| {
        let t = (at - origin).as_secs_f64();
        30.0 * t - 10.0 * 0.25 / (2.0 * PI) * (2.0 * PI * t / 0.25).cos()
    };
    let expected = joules(window.to) - joules(window.from);
    close(used.joules, expected, 0.005);
    close(used.phase("draft") + used.phase("verify") + used.phase("other"), used.joules, 0.001);
    assert!(used.caution().is_none(), "{used:?}");
    assert!(recording.traces()[0].len() > 50);
    assert!(Recorder::start(Vec::new(), 0.0).is_err());
}

#[test]
fn a_run_too_short_for_its_meter_says_so_and_how_long_it_should_be() {
    let origin = Instant::now();
    // A battery: 15 W, in steps of 36 J, renewed every 2.4 s.
    let steps = |t: f64| (15.0 * t / 36.0).floor() * 36.0;
    let battery = Info {
        resolution: 36.0,
        refresh: Duration::from_secs(2),
        ..info("battery:BAT0", Family::Battery, Scope::System)
    };
    let marker = Marker::default();
    let over = |seconds: f64| -> Result<Consumption, Unavailable> {
        let times = (0..(2.0 * seconds) as usize).map(|i| i as f64 / 2.0);
        let recording = recorded(battery.clone(), origin, times, steps, &marker);
        recording.total(&[window(origin, 0.0, seconds - 1.0)])
    };
    // Nothing moved: no 0, but nothing.
    let why = over(2.0).unwrap_err().reason;
    assert!(why.contains("too short to measure"), "{why}");
    let why = over(5.0).unwrap_err().reason;
    assert!(why.contains("measure for"), "{why}");
    let caution = over(30.0).unwrap().caution().unwrap();
    assert!(caution.contains("too short to trust"), "{caution}");
    let needed = over(30.0).unwrap().needed_seconds.unwrap();
    assert!((80.0..160.0).contains(&needed), "{needed}");
    // As long as it was told to be, it is trusted and right.
    let used = over(needed + 10.0).unwrap();
    assert_eq!(used.caution(), None);
    close(used.joules, 15.0 * used.seconds, 0.05);

    // A gauge whose steps are as large as what it shows will never do.
    let coarse = Info {
        kind: Kind::Power,
        resolution: 1.0,
        ..info("coarse", Family::External, Scope::System)
    };
    let recording = recorded(coarse, origin, times(20.0), |_| 2.0, &marker);
    let used = recording.total(&[window(origin, 0.0, 20.0)]).unwrap();
    assert_eq!(used.needed_seconds, None);
    assert!(used.caution().unwrap().contains("too coarse"));
    // A gauge that is a second behind says nothing of a tenth of a second.
    let late = Info {
        kind: Kind::Power,
        refresh: Duration::from_secs(1),
        ..info("nvml:0", Family::Nvml, Scope::Card)
    };
    let recording = recorded(late, origin, times(20.0), |_| 70.0, &marker);
    let why = recording.total(&[window(origin, 5.0, 5.1)]).unwrap_err().reason;
    assert!(why.contains("must last 2.0 s or more"), "{why}");
    close(recording.total(&[window(origin, 5.0, 9.0)]).unwrap().joules, 280.0, 1e-6);
    // No meter at all is unavailable, too.
    let none = Recorder::start(Vec::new(), 10.0).unwrap();
    let window = none.end(none.begin());
    assert_eq!(none.stop().total(&[window]).unwrap_err().reason, "no meter can be read");
}

#[test]
fn idle_power_is_subtracted_with_its_uncertainty() {
    let origin = Instant::now();
    let gauge = Info {
        kind: Kind::Power,
        resolution: 0.01,
        ..info("known", Family::External, Scope::System)
    };
    let watts = |t: f64| if t < 5.0 { 4.0 } else { 10.0 };
    let marker = Marker::default();
    let recording = recorded(gauge, origin, times(20.0), watts, &marker);
    let idle = recording.mean_power(window(origin, 0.0, 4.5)).unwrap();
    close(idle.watts, 4.0, 1e-9);
    let used = recording.total(&[window(origin, 6.0, 16.0)]).unwrap();
    let (net, uncertainty) = used.net(idle);
    close(net, 60.0, 1e-9);
    assert!(uncertainty > used.uncertainty && uncertainty < 0.2, "{uncertainty}");
}
