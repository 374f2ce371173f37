//! What measuring costs: tokens per second of the built-in pair with and without a recorder,
//! taking turns.
//!
//! `cargo run --release --example energy_overhead [PAIRS] [READINGS_PER_SECOND] [THREADS]`
//!
//! The meters are four counters in a temporary tree, read as RAPL's are. The built-in pair is the
//! worst case: its phases are shorter than any other model's.

use std::time::Instant;

use mtad::decode::Phase;
use mtad::energy::{Found, Recorder, Sources};
use mtad::{LoadOptions, Pair, Request, SessionOptions, Settings};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default| arguments.get(i).map_or(Ok(default), |a| a.parse::<f64>());
    let (pairs, rate, threads) = (number(0, 200.0)? as usize, number(1, 50.0)?, number(2, 1.0)?);

    let tree = tempfile::tempdir()?;
    for zone in ["intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:0:2"] {
        let zone = tree.path().join("sys/class/powercap").join(zone);
        std::fs::create_dir_all(&zone)?;
        std::fs::write(zone.join("name"), "package-0")?;
        std::fs::write(zone.join("energy_uj"), "123456789")?;
        std::fs::write(zone.join("max_energy_range_uj"), "262143328850")?;
    }
    let options = LoadOptions { threads: threads as usize, ..LoadOptions::default() };
    let pair = Pair::builtin(true, &options, &mut |_, _| true)?;
    let settings = Settings { seed: 1, ..Settings::default() };
    let request = Request { settings, max_tokens: Some(200), ..Request::default() };

    // Seconds of the same generation, which has the same tokens each time.
    let generate = |measured: bool| -> mtad::Result<f64> {
        let mut session = pair.session(&SessionOptions::default());
        let mut recorder = None;
        if measured {
            let found = Sources::below(tree.path()).find().meters.into_iter();
            let meters = found.filter_map(|found| match found {
                Found::Meter(meter) => Some(meter),
                Found::Unavailable { .. } => None,
            });
            let started = Recorder::start(meters.collect(), rate)?;
            let marker = started.marker();
            session.listen(Box::new(move |phase, at| marker.mark(phase.map(Phase::name), at)));
            recorder = Some(started);
        }
        let start = Instant::now();
        session.generate("Once upon a time", &request)?.try_for_each(|piece| piece.map(drop))?;
        let seconds = start.elapsed().as_secs_f64();
        drop(recorder.map(Recorder::stop));
        Ok(seconds)
    };
    generate(false)?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for i in 0..2 * pairs {
        // Without, with, with, without: nobody is always second.
        let measured = (i + i / 2) % 2 == 1;
        let seconds = generate(measured)?;
        if measured { with.push(seconds) } else { without.push(seconds) }
    }
    with.sort_by(f64::total_cmp);
    without.sort_by(f64::total_cmp);
    println!("seconds of a generation, {pairs} pairs, 4 meters at {rate} readings/s");
    for (name, share) in [("fastest tenth", 0.1), ("first quarter", 0.25), ("median", 0.5)] {
        let at = |sorted: &[f64]| sorted[(share * sorted.len() as f64) as usize];
        let (without, with) = (at(&without), at(&with));
        let slower = 100.0 * (with / without - 1.0);
        println!("{name:14} without {without:.5}, with {with:.5}: {slower:+.2}%");
    }
    Ok(())
}
