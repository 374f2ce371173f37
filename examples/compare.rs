//! Compares strategies on the built-in pair: perplexity, tokens per target pass, speed.
//!
//!     cargo run --release --example compare            # the strategies at their defaults
//!     cargo run --release --example compare -- --grid  # mtad over gamma, beam width and tau
//!
//! Texts are drawn at temperature 1 with nothing cut off, unless `--temperature X` says otherwise.
//! Strategies take turns prompt by prompt, so that a slow minute of the machine slows all of them.

use std::process::ExitCode;

use mtad::{LoadOptions, Pair, Request, Result, SessionOptions, Settings, Strategy, Warp};

const PROMPTS: [&str; 10] = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and his dog",
    "The cat sat on",
    "There was a big red ball",
    "In the forest",
    "It was raining",
    "The boy wanted to",
    "They went to the park and",
    "The old man",
];

/// Sums over the texts of one strategy.
#[derive(Default)]
struct Sums {
    tokens: usize,
    log_prob: f64,
    rounds: u64,
    accepted: u64,
    drafted: u64,
    seconds: f64,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1)?.parse::<f32>().ok()
    };
    let temperature = value("--temperature").unwrap_or(1.0);
    let seeds = value("--seeds").unwrap_or(10.0) as u64;
    let base = Settings {
        score: true,
        warp: Warp { temperature, ..Warp::default() },
        ..Settings::default()
    };
    let mut rows = Vec::new();
    if args.iter().any(|arg| arg == "--grid") {
        for gamma in [3, 4, 5, 6, 8] {
            for beam_width in [1, 2, 4, 8] {
                for tau in [0.05, 0.1, 0.3] {
                    let name = format!("mtad gamma {gamma} width {beam_width} tau {tau}");
                    rows.push((name, Settings { gamma, beam_width, tau, ..base.clone() }));
                }
            }
        }
    } else {
        for (strategy, name) in Strategy::ALL {
            rows.push((name.to_owned(), Settings { strategy, ..base.clone() }));
        }
    }
    match compare(&rows, seeds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(rows: &[(String, Settings)], seeds: u64) -> Result<()> {
    let pair = Pair::builtin(true, &LoadOptions::default(), &mut |_, _| true)?;
    let mut sums: Vec<Sums> = rows.iter().map(|_| Sums::default()).collect();
    for seed in 0..seeds {
        for prompt in PROMPTS {
            for ((_, settings), sums) in rows.iter().zip(&mut sums) {
                let settings = Settings { seed, ..settings.clone() };
                let request = Request { settings, max_tokens: Some(200), ..Request::default() };
                let mut session = pair.session(&SessionOptions::default());
                let mut generation = session.generate(prompt, &request)?;
                for piece in generation.by_ref() {
                    piece?;
                }
                sums.tokens += generation.tokens().len();
                sums.log_prob += generation.scores().iter().sum::<f64>();
                sums.rounds += generation.statistics().rounds();
                sums.accepted += generation.statistics().accepted();
                sums.drafted += generation.statistics().drafted();
                sums.seconds += generation.generating_seconds();
            }
        }
    }
    println!("{}, {} texts each", pair.target().device().describe(), seeds * PROMPTS.len() as u64);
    println!("{:36} perplexity  tokens/pass  accepted  tokens/s", "strategy");
    for ((name, _), s) in rows.iter().zip(&sums) {
        let accepted = match s.drafted {
            0 => "-".to_owned(),
            n => format!("{:.1}%", 100.0 * s.accepted as f64 / n as f64),
        };
        println!(
            "{name:36} {:10.3} {:12.3} {accepted:>9} {:9.0}",
            (-s.log_prob / s.tokens as f64).exp(),
            1.0 + s.accepted as f64 / s.rounds as f64,
            s.tokens as f64 / s.seconds
        );
    }
    Ok(())
}
