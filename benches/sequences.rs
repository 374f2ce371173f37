//! Several sequences that generate together: total tokens per second against one alone.
//!
//!     cargo bench --bench sequences                       # 1.1B Q4_0 of random weights, plain decoding
//!     cargo bench --bench sequences -- --model M.gguf     # another model
//!     cargo bench --bench sequences -- --model T.gguf --draft D.gguf --strategy mtad
//!
//! Numbers of sequences take turns, so that a machine's mood falls on all of them. `--tokens N` (48), `--turns N` (3),
//! `--device NAME` (cpu), `--counts 1,2,4,8`.

use std::sync::Barrier;
use std::time::Instant;

use mtad::bench::Synthetic;
use mtad::{LoadOptions, Pair, Request, SessionOptions, Settings, Strategy, Warp};

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Plan {
    model: Option<String>,
    draft: Option<String>,
    strategy: Strategy,
    tokens: usize,
    turns: usize,
    counts: Vec<usize>,
    device: String,
}

fn plan() -> Result<Plan, Failure> {
    let mut plan = Plan {
        model: None,
        draft: None,
        strategy: Strategy::Sample,
        tokens: 48,
        turns: 3,
        counts: vec![1, 2, 4, 8],
        device: "cpu".to_owned(),
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value"));
        match arg.as_str() {
            "--model" => plan.model = Some(value()?),
            "--draft" => plan.draft = Some(value()?),
            "--strategy" => plan.strategy = value()?.parse()?,
            "--tokens" => plan.tokens = value()?.parse()?,
            "--turns" => plan.turns = value()?.parse()?,
            "--device" => plan.device = value()?,
            "--counts" => {
                plan.counts = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            other => return Err(format!("`{other}` is not an option of this bench").into()),
        }
    }
    Ok(plan)
}

/// Tokens per second of all of `count` sequences together.
fn together(pair: &Pair, plan: &Plan, count: usize) -> Result<f64, Failure> {
    let options = SessionOptions { context: Some(512), ..SessionOptions::default() };
    let begin = Barrier::new(count + 1);
    std::thread::scope(|scope| {
        let users: Vec<_> = (0..count)
            .map(|i| {
                let begin = &begin;
                let settings = Settings {
                    strategy: plan.strategy,
                    seed: i as u64,
                    warp: Warp { temperature: 1.0, ..Warp::default() },
                    ..Settings::default()
                };
                scope.spawn(move || -> Result<usize, Failure> {
                    let mut session = pair.session(&options)?;
                    let request =
                        Request { settings, max_tokens: Some(plan.tokens), ..Request::default() };
                    let generation = session.generate("Once upon a time there was", &request);
                    begin.wait();
                    let mut tokens = 0;
                    for piece in generation? {
                        tokens += usize::from(piece?.token.is_some());
                    }
                    Ok(tokens)
                })
            })
            .collect();
        begin.wait();
        let start = Instant::now();
        let mut tokens = 0;
        for user in users {
            tokens += user.join().map_err(|_| "a sequence panicked")??;
        }
        Ok(tokens as f64 / start.elapsed().as_secs_f64())
    })
}

fn main() -> Result<(), Failure> {
    let plan = plan()?;
    let folder = tempfile::tempdir()?;
    let options = LoadOptions { device: plan.device.clone(), ..LoadOptions::default() };
    let target = match &plan.model {
        Some(path) => path.into(),
        None => {
            let path = folder.path().join("synthetic.gguf");
            "1.1b:Q4_0".parse::<Synthetic>()?.write(&path)?;
            path
        }
    };
    let pair = Pair::open(target, plan.draft.as_ref(), &options, &mut |_, _| true)?;
    println!("{} on {}", plan.strategy, pair.target().describe());
    let mut found = vec![Vec::new(); plan.counts.len()];
    for turn in 0..=plan.turns {
        for (count, found) in plan.counts.iter().zip(&mut found) {
            let rate = together(&pair, &plan, *count)?;
            // (The first turn warms up.)
            if turn > 0 {
                found.push(rate);
                eprintln!("turn {turn}/{}: {count} sequences, {rate:.1} tokens/s", plan.turns);
            }
        }
    }
    let median = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let medians: Vec<f64> = found.iter_mut().map(median).collect();
    for (count, rate) in plan.counts.iter().zip(&medians) {
        println!("{count:2} sequences: {rate:8.1} tokens/s, {:.2}x one alone", rate / medians[0]);
    }
    Ok(())
}
