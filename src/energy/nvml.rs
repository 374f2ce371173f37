//! NVIDIA cards, through the management library that comes with their driver. It is loaded at run
//! time; where it is not there, there is no such meter and that is all.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::{Family, Found, Info, Kind, Library, Meter, Reading, Scope, Unavailable};

struct Card {
    info: Info,
    nvml: Arc<Nvml>,
    index: u32,
}

/// The cards that the driver shows.
///
/// # Errors
/// There is no library, no driver or no card.
pub fn find(library: &Library) -> Result<Vec<Found>, Unavailable> {
    let nvml = match library {
        Library::System => Nvml::init(),
        Library::File(path) => Nvml::builder().lib_path(OsStr::new(path)).init(),
        Library::None => return Err(Unavailable::new("not looked for")),
    };
    let nvml = Arc::new(nvml.map_err(|error| match error {
        NvmlError::LibloadingError(error) => {
            Unavailable::new(format!("no NVIDIA management library ({error})"))
        }
        error => Unavailable::new(format!("NVIDIA's driver does not answer: {error}")),
    })?);
    let count = nvml.device_count().map_err(said)?;
    if count == 0 {
        return Err(Unavailable::new("NVIDIA's driver shows no card"));
    }
    Ok((0..count).map(|index| card(&nvml, index)).collect())
}

fn said(error: NvmlError) -> Unavailable {
    Unavailable::new(format!("NVML: {error}"))
}

fn card(nvml: &Arc<Nvml>, index: u32) -> Found {
    let name = format!("nvml:{index}");
    let kind = match nvml.device_by_index(index) {
        // Cards before Volta have no counter.
        Ok(device) => match device.total_energy_consumption() {
            Ok(_) => Kind::Energy,
            Err(_) => Kind::Power,
        },
        Err(error) => return Found::Unavailable { name, why: said(error) },
    };
    let model = nvml.device_by_index(index).and_then(|device| device.name());
    let model = model.unwrap_or_else(|_| "card".to_owned());
    Found::tried(Card {
        info: Info {
            name,
            family: Family::Nvml,
            scope: Scope::Card,
            covers: format!("the graphics card with its memory ({model})"),
            kind,
            // Millijoules and milliwatts.
            resolution: 1e-3,
            // The counter moves every 20 to 100 ms; power is an average over up to a second.
            refresh: Duration::from_millis(if kind == Kind::Energy { 100 } else { 1000 }),
            interval: Duration::from_millis(20),
            source: match kind {
                Kind::Energy => "nvmlDeviceGetTotalEnergyConsumption".to_owned(),
                Kind::Power => "nvmlDeviceGetPowerUsage".to_owned(),
            },
        },
        nvml: nvml.clone(),
        index,
    })
}

impl Meter for Card {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self) -> Result<Reading, Unavailable> {
        let device = self.nvml.device_by_index(self.index).map_err(said)?;
        let before = Instant::now();
        let thousandths = match self.info.kind {
            Kind::Energy => device.total_energy_consumption().map_err(said)? as f64,
            Kind::Power => f64::from(device.power_usage().map_err(said)?),
        };
        Ok(Reading::since(before, thousandths / 1000.0))
    }
}
