//! `mtad energy`: joules per token of strategies side by side.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::Args;
use serde_json::{Value as Json, json};

use super::console::tell;
use super::interrupts::{self, Finishing};
use super::metering::{Measured, Metering, PHASES, Work};
use super::run::RunArgs;
use super::{note_listener, print_line, read_text, table};
use crate::decode::Strategy;
use crate::engine::SessionOptions;
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::session::generation::{Request, clock_seed};
use crate::session::pair::Pair;

/// Measure joules per token, by phase, of strategies side by side
///
/// The idle machine is measured first, then each strategy generates once unmeasured, then all of
/// them take turns over the prompts. Without prompts this uses three beginnings of stories.
#[derive(Debug, Args)]
#[command(
    mut_arg("energy", |arg| arg.hide(true)),
    mut_arg("strategy", |arg| arg.hide(true)),
    mut_arg("no_echo", |arg| arg.hide(true)),
    mut_arg("stats", |arg| arg.hide(true)),
    mut_arg("score", |arg| arg.hide(true)),
)]
pub struct EnergyArgs {
    /// The strategies to compare [default: sample, speculative and mtad; without a draft, sample]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', conflicts_with = "strategy")]
    strategies: Vec<Strategy>,

    /// Read prompts from a file, one from each line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file"])]
    prompts: Option<PathBuf>,

    /// How often each strategy takes its turn with each prompt
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,

    /// Write a line for each generation to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    #[command(flatten)]
    run: RunArgs,
}

/// What is measured if nobody names a prompt.
const PROMPTS: [&str; 3] = [
    "Once upon a time, there was a little girl who",
    "The old man looked at the sea and",
    "One day, Tom and his dog went to the park. They",
];

impl EnergyArgs {
    fn strategies(&self) -> Vec<Strategy> {
        let has_draft = self.run.model.is_none() || self.run.draft.is_some();
        match (&self.strategies[..], self.run.strategy) {
            ([], Some(one)) => vec![one],
            ([], None) if has_draft => {
                vec![Strategy::Sample, Strategy::Speculative, Strategy::Mtad]
            }
            ([], None) => vec![Strategy::Sample],
            (several, _) => several.to_vec(),
        }
    }

    fn prompts(&self) -> Result<Vec<String>> {
        let prompts: Vec<String> = match &self.prompts {
            Some(file) => {
                let text = read_text(None, Some(file), "prompt")?;
                text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
            }
            None if self.run.prompt.is_some() || self.run.file.is_some() => {
                vec![read_text(self.run.prompt.as_deref(), self.run.file.as_ref(), "prompt")?]
            }
            None => PROMPTS.map(str::to_owned).to_vec(),
        };
        if prompts.is_empty() {
            return Err(Error::invalid("the file of prompts has no line with text"));
        }
        Ok(prompts)
    }
}

/// One generation.
struct Turn {
    strategy: usize,
    repeat: u32,
    prompt: usize,
    work: Work,
}

pub(super) fn energy(args: &EnergyArgs) -> Result<()> {
    if args.run.stats || args.run.score || args.run.no_echo {
        return Err(Error::invalid("--stats, --score and --no-echo are for `mtad run`"));
    }
    let strategies = args.strategies();
    let prompts = args.prompts()?;
    let cancel = interrupts::flag();
    let first_seed = args.run.seed.unwrap_or_else(clock_seed);
    // The same seeds for all strategies, others with each repeat.
    let costs = args.run.costs()?;
    let request = |strategy, repeat: u32| {
        let seed = first_seed.wrapping_add(u64::from(repeat));
        args.run.request(strategy, seed, costs.clone(), &cancel)
    };
    strategies.iter().try_for_each(|&strategy| request(strategy, 0).validate())?;
    // A file that cannot be written is better known before than after the measurement.
    let inputs = || args.prompts.as_deref().into_iter().chain(args.run.inputs());
    let csv = args.csv.as_ref().map(|path| OutputFile::create(path, inputs())).transpose()?;

    let mut metering = args.run.meters.start(Some(5.0))?;
    let drafting = strategies.iter().find(|s| s.needs_draft()).unwrap_or(&strategies[0]);
    let pair = metering.load(|| args.run.load(*drafting))?;
    pair.on_note(note_listener());
    csv.as_ref().map_or(Ok(()), |csv| csv.is_none_of(pair.files()))?;
    let constraint = args.run.constraint(&pair)?;
    let options = args.run.session_options();
    // What was measured until an interrupt is reported.
    let _finishing = Finishing::first();
    for &strategy in &strategies {
        let mut warm_up = request(strategy, 0);
        warm_up.settings.constraint.clone_from(&constraint);
        warm_up.max_tokens = warm_up.max_tokens.map(|n| n.min(32));
        generate(&pair, &options, &prompts[0], &warm_up, &Metering::off())?;
    }
    let mut turns = Vec::new();
    'turns: for repeat in 0..args.repeats {
        tell!("mtad: repeat {} of {}", repeat + 1, args.repeats);
        for (prompt, text) in prompts.iter().enumerate() {
            // Who begins changes, so that nobody always comes after the same other.
            let shift = repeat as usize + prompt;
            for strategy in (0..strategies.len()).map(|i| (i + shift) % strategies.len()) {
                let mut request = request(strategies[strategy], repeat);
                request.settings.constraint.clone_from(&constraint);
                let work = generate(&pair, &options, text, &request, &metering)?;
                if cancel.load(Ordering::Relaxed) {
                    tell!("mtad: interrupted; what was measured so far is reported");
                    break 'turns;
                }
                turns.push(Turn { strategy, repeat, prompt, work });
            }
        }
    }
    let measured = metering.finish().expect("energy is always measured here");
    let report = Report { measured: &measured, pair: &pair, strategies, turns, seed: first_seed };
    if let Some(mut csv) = csv {
        report.csv(&mut csv).map_err(|e| csv.error(e))?;
        csv.finish()?;
    }
    if args.run.json {
        print_line(report.json())?;
    } else {
        report.print()?;
    }
    let works: Vec<Work> = (0..report.strategies.len()).map(|s| report.work(s, None)).collect();
    measured.judge(&works)
}

/// Generates in a session of its own, so that no strategy finds another's prompt evaluated.
fn generate(
    pair: &Pair,
    options: &SessionOptions,
    prompt: &str,
    request: &Request,
    metering: &Metering,
) -> Result<Work> {
    let mut session = pair.session(options)?;
    metering.listen_to(&mut session);
    let begun = metering.begin();
    let mut generation = session.generate(prompt, request)?;
    generation.by_ref().try_for_each(|piece| piece.map(drop))?;
    let window = metering.end(begun);
    Ok(Work::new(window, &generation))
}

struct Report<'a> {
    measured: &'a Measured,
    pair: &'a Pair,
    strategies: Vec<Strategy>,
    turns: Vec<Turn>,
    seed: u64,
}

impl Report<'_> {
    /// What a strategy did, in all repeats or one.
    fn work(&self, strategy: usize, repeat: Option<u32>) -> Work {
        let mut work = Work::default();
        let turns = self.turns.iter().filter(|turn| turn.strategy == strategy);
        for turn in turns.filter(|turn| repeat.is_none_or(|repeat| turn.repeat == repeat)) {
            work.add(&turn.work);
        }
        work
    }

    /// Standard deviation of J/token over the repeats.
    fn spread(&self, strategy: usize) -> Option<f64> {
        let repeats = self.turns.iter().map(|turn| turn.repeat + 1).max().unwrap_or(0);
        let figures: Option<Vec<f64>> = (0..repeats)
            .map(|repeat| {
                let figures = self.measured.figures(&self.work(strategy, Some(repeat)));
                figures.ok().map(|figures| figures.per_token)
            })
            .collect();
        let figures = figures.filter(|figures| figures.len() > 1)?;
        let mean = figures.iter().sum::<f64>() / figures.len() as f64;
        let squares: f64 = figures.iter().map(|x| (x - mean) * (x - mean)).sum();
        Some((squares / (figures.len() - 1) as f64).sqrt())
    }

    fn json(&self) -> Json {
        let results: Vec<Json> = self
            .strategies
            .iter()
            .enumerate()
            .map(|(i, strategy)| {
                let work = self.work(i, None);
                let mut out = json!({
                    "strategy": strategy.to_string(),
                    "generations": work.windows.len(),
                    "tokens": work.tokens,
                    "prompt_tokens": work.prompt_tokens,
                    "seconds": work.seconds(),
                    "tokens_per_second": work.tokens_per_second(),
                    "block_efficiency": work.statistics.block_efficiency(),
                    "acceptance_rate": work.statistics.acceptance_rate(),
                });
                let figures = self.measured.figures_json(&work);
                if let Some(out) = out.as_object_mut() {
                    out.extend(figures);
                }
                out[self.measured.key("joules_per_token_deviation")] = self.spread(i).into();
                out
            })
            .collect();
        let mut out = self.measured.setup_json();
        out.insert("device".into(), self.pair.target().describe().into());
        out.insert("seed".into(), self.seed.into());
        out.insert("results".into(), results.into());
        out.into()
    }

    fn print(&self) -> Result<()> {
        let m = self.measured;
        print_line(format_args!("device            {}", self.pair.target().describe()))?;
        m.setup_lines().into_iter().try_for_each(print_line)?;
        let head = [
            "strategy",
            "tokens",
            "seconds",
            "tokens/s",
            "block eff.",
            "J/token",
            "net of idle",
            "W",
            "J/prompt token",
            "tokens/J",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let mut details = Vec::new();
        for (i, strategy) in self.strategies.iter().enumerate() {
            let work = self.work(i, None);
            let mut row = vec![
                strategy.to_string(),
                work.tokens.to_string(),
                format!("{:.3}", work.seconds()),
                format!("{:.1}", work.tokens_per_second()),
                format!("{:.3}", work.statistics.block_efficiency()),
            ];
            match m.figures(&work) {
                Ok(figures) => {
                    let optional = |x: Option<f64>| x.map_or("-".to_owned(), |x| m.show(x));
                    let net = figures.per_token_net;
                    row.extend([
                        m.show_uncertain(figures.per_token, figures.per_token_uncertainty),
                        net.map_or("-".to_owned(), |(net, u)| m.show_uncertain(net, u)),
                        m.show(figures.used.watts()),
                        optional(figures.per_prompt_token),
                        m.show(figures.tokens_per_joule),
                    ]);
                    details.push(format!("\n{strategy} by phase"));
                    let phases = m.phase_lines(&figures, work.tokens);
                    details.extend(phases.into_iter().map(|line| format!("  {line}")));
                    if let Some(spread) = self.spread(i) {
                        let spread = m.show(spread);
                        details.push(format!("  J/token deviates by {spread} between repeats"));
                    }
                    details.extend(figures.used.caution().map(|caution| format!("  {caution}")));
                }
                Err(why) => {
                    row.extend(["unavailable", "-", "-", "-", "-"].map(str::to_owned));
                    details.push(format!("\n{strategy}: {why}"));
                    details.push(format!("  time by phase: {}", m.times(&work)));
                }
            }
            rows.push(row);
        }
        print_line("")?;
        table(&rows).into_iter().chain(details).try_for_each(print_line)
    }

    /// A line for each generation. Figures that are unavailable are empty, with the reason in the
    /// last column.
    fn csv(&self, out: &mut impl Write) -> std::io::Result<()> {
        let m = self.measured;
        let names =
            ["joules", "joules_uncertainty", "joules_per_token", "joules_per_token_net", "watts"];
        let mut head = "strategy,repeat,prompt,tokens,prompt_tokens,seconds,tokens_per_second,\
                        block_efficiency"
            .to_owned();
        let phases = PHASES.map(|phase| format!("joules_{phase}"));
        for name in names.iter().copied().chain(phases.iter().map(String::as_str)) {
            head = format!("{head},{}", m.key(name));
        }
        writeln!(out, "{head},note")?;
        for turn in &self.turns {
            let work = &turn.work;
            write!(
                out,
                "{},{},{},{},{},{},{},{}",
                self.strategies[turn.strategy],
                turn.repeat + 1,
                turn.prompt + 1,
                work.tokens,
                work.prompt_tokens,
                work.seconds(),
                work.tokens_per_second(),
                work.statistics.block_efficiency()
            )?;
            let (figures, note) = match m.figures(work) {
                Ok(figures) => {
                    let net = figures.per_token_net.map(|(net, _)| net);
                    let used = &figures.used;
                    let mut all = vec![
                        Some(used.joules),
                        m.uncertainty(used),
                        Some(figures.per_token),
                        net,
                        Some(used.watts()),
                    ];
                    all.extend(PHASES.map(|phase| Some(used.phase(phase))));
                    (all, used.caution().unwrap_or_default())
                }
                Err(why) => (vec![None; names.len() + PHASES.len()], why.to_string()),
            };
            for figure in figures {
                write!(out, ",{}", figure.map_or_else(String::new, |x| x.to_string()))?;
            }
            writeln!(out, ",\"{}\"", note.replace('"', "\"\""))?;
        }
        Ok(())
    }
}
