//! What measuring costs: tokens per second of the built-in pair with and without a recorder,
//! taking turns.
//!
//! `cargo run --release --example energy_overhead [PAIRS] [READINGS_PER_SECOND] [THREADS]`
//!
//! The meters are four counters in a temporary tree, read as RAPL's are. The built-in pair is the
//! worst case: its phases are shorter than any other model's.

use std::time::Instant;

use mtad::decode::Phase;
use mtad::energy::{Found, Meter, Recorder, Sources};
use mtad::{LoadOptions, Pair, Request, SessionOptions, Settings};

/// Seconds that all threads of this process have computed (Linux), which the load of other
/// processes changes less than it does the time on the wall.
fn computed() -> Option<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        nanoseconds += text.split_whitespace().next()?.parse::<f64>().ok()?;
    }
    Some(nanoseconds / 1e9)
}

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

    let meters = || -> Vec<Box<dyn Meter>> {
        let found = Sources::below(tree.path()).find().meters.into_iter();
        let readable = found.filter_map(|found| match found {
            Found::Meter(meter) => Some(meter),
            Found::Unavailable { .. } => None,
        });
        readable.collect()
    };
    let mut all = meters();
    let start = Instant::now();
    for _ in 0..1000 {
        all.iter_mut().try_for_each(|meter| meter.read().map(drop))?;
    }
    let micros = start.elapsed().as_secs_f64() * 1e3;
    let share = micros * rate / 1e4;
    println!("reading {} meters takes {micros:.1} us: {share:.2}% of one core", all.len());

    // Seconds of the same generation, which has the same tokens each time: on the wall, computing.
    let generate = |measured: bool| -> mtad::Result<[f64; 2]> {
        let mut session = pair.session(&SessionOptions::default())?;
        let mut recorder = None;
        if measured {
            let started = Recorder::start(meters(), rate)?;
            let marker = started.marker();
            session.listen(Box::new(move |phase, at| marker.mark(phase.map(Phase::name), at)));
            recorder = Some(started);
        }
        let (start, before) = (Instant::now(), computed());
        session.generate("Once upon a time", &request)?.try_for_each(|piece| piece.map(drop))?;
        let seconds = start.elapsed().as_secs_f64();
        let busy = before.zip(computed()).map_or(f64::NAN, |(before, after)| after - before);
        drop(recorder.map(Recorder::stop));
        Ok([seconds, busy])
    };
    generate(false)?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for i in 0..2 * pairs {
        // Without, with, with, without: nobody is always second.
        let measured = (i + i / 2) % 2 == 1;
        let seconds = generate(measured)?;
        if measured { with.push(seconds) } else { without.push(seconds) }
    }
    println!("seconds of a generation, {pairs} pairs, 4 meters at {rate} readings/s");
    for (i, clock) in ["on the wall", "computing"].into_iter().enumerate() {
        let sorted = |all: &[[f64; 2]]| {
            let mut all: Vec<f64> = all.iter().map(|seconds| seconds[i]).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let (with, without) = (sorted(&with), sorted(&without));
        for (name, share) in [("fastest tenth", 0.1), ("first quarter", 0.25), ("median", 0.5)] {
            let at = |sorted: &[f64]| sorted[(share * sorted.len() as f64) as usize];
            let (without, with) = (at(&without), at(&with));
            let slower = 100.0 * (with / without - 1.0);
            println!("{clock:11}, {name:13} without {without:.5}, with {with:.5}: {slower:+.2}%");
        }
    }
    Ok(())
}
