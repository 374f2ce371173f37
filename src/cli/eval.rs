//! `mtad eval`: strategies side by side on tasks.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::Value as Json;

use super::console::tell;
use super::interrupts::{self, Finishing};
use super::metering::{MeterArgs, Metering, Work};
use super::run::load_pair;
use super::{
    DeviceArgs, VocabularyArgs, cost_tables, note_listener, of_option, print_line, progress_bar,
    table,
};
use crate::decode::{Settings, Strategy};
use crate::engine::SessionOptions;
use crate::error::{Error, Result};
use crate::eval::report::Report;
use crate::eval::{
    Arm, Grid, Journal, Observer, Runner, Task, TaskSet, cool, fingerprint, summarize,
};
use crate::files;
use crate::sampling::Warp;
use crate::session::generation::{Generation, Session};
use crate::session::pair::{LoadOptions, Pair, builtin_questions};
use crate::tokenizer::EncodeOptions;

/// Compare strategies: perplexity, block efficiency, speed, energy, right answers
///
/// All strategies take turns on all prompts. Without --model this runs the built-in pair, and
/// without --prompts it goes on from beginnings of stories and asks small questions.
///
/// Perplexity is that of what was written, under the target before any warping. Tokens/pass is
/// block efficiency, 1 + accepted / rounds. Score is the share of right answers. Distinct-n is the
/// share of different runs of n tokens within a text. With --out, an evaluation that was
/// interrupted goes on where it was.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct EvalArgs {
    /// The target model, a GGUF file [default: the built-in pair]
    #[arg(long, short, value_name = "GGUF")]
    model: Option<PathBuf>,

    /// The draft model, a GGUF file with the target's vocabulary
    #[arg(long, short, value_name = "GGUF", requires = "model")]
    draft: Option<PathBuf>,

    /// Prompts: JSON lines (Spec-Bench, MT-bench, HumanEval, or {"prompt": .., "answer": ..}), a
    /// folder of Spider, or text with a prompt in each line; may be given more than once
    #[arg(long, short, value_name = "FILE")]
    prompts: Vec<PathBuf>,

    /// Take so many prompts of each file, evenly spread over it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,

    /// Put each prompt into this frame, at {prompt}
    #[arg(long, value_name = "TEXT")]
    template: Option<String>,

    /// The strategies to compare [default: sample,speculative,mtad,mmtad,auto; without a draft,
    /// sample]
    #[arg(long, short, value_name = "NAME,...", value_delimiter = ',')]
    strategy: Vec<Strategy>,

    /// Thresholds of joint acceptance (mtad, mmtad, auto)
    #[arg(long, value_name = "T,...", value_delimiter = ',', default_values_t = [0.01, 0.1, 0.5])]
    tau: Vec<f64>,

    /// Tokens drafted per round
    #[arg(long, value_name = "G,...", value_delimiter = ',', default_values_t = [4])]
    gamma: Vec<usize>,

    /// Beams
    #[arg(long, value_name = "W,...", value_delimiter = ',', default_values_t = [4])]
    beam_width: Vec<usize>,

    /// Temperatures
    #[arg(long, value_name = "X,...", value_delimiter = ',', default_values_t = [1.0])]
    temperature: Vec<f32>,

    /// Draw from the K most probable tokens only; 0 is off
    #[arg(long, value_name = "K", default_value_t = Warp::default().top_k)]
    top_k: usize,

    /// Draw from the most probable tokens that together have this probability; 1 is off
    #[arg(long, value_name = "P", default_value_t = Warp::default().top_p)]
    top_p: f32,

    /// How often each strategy takes its turn with each prompt, with other seeds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,

    /// Seed of the first repeat
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// The most tokens of a text
    #[arg(long, short = 'n', value_name = "N", default_value_t = 200,
          value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// Also find the temperature at which plain sampling has the perplexity of this strategy, and
    /// show it; none is off [default: mtad for the built-in pair and prompts, otherwise none]
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "mtad")]
    match_perplexity: Option<String>,

    /// Write results.json, results.csv and report.html to this folder, with a journal from which
    /// an interrupted evaluation goes on
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    vocabulary: VocabularyArgs,

    #[command(flatten)]
    device: DeviceArgs,

    /// Where the draft runs [default: where the target does]
    #[arg(long, value_name = "DEVICE")]
    draft_device: Option<String>,

    #[command(flatten)]
    meters: MeterArgs,
}

impl EvalArgs {
    fn strategies(&self) -> Vec<Strategy> {
        use Strategy::{Auto, Mmtad, Mtad, Sample, Speculative};
        match &self.strategy[..] {
            [] if self.model.is_none() || self.draft.is_some() => {
                vec![Sample, Speculative, Mtad, Mmtad, Auto]
            }
            [] => vec![Sample],
            named => named.to_vec(),
        }
    }

    fn grid(&self) -> Grid {
        let warp = Warp { top_k: self.top_k, top_p: self.top_p, ..Warp::default() };
        Grid {
            strategies: self.strategies(),
            taus: self.tau.clone(),
            gammas: self.gamma.clone(),
            widths: self.beam_width.clone(),
            temperatures: self.temperature.clone(),
            base: Settings { warp, ..Settings::default() },
        }
    }

    /// All tasks, what they are, and what is to be said of them.
    fn tasks(&self) -> Result<(Vec<Task>, String)> {
        let mut sets = Vec::new();
        for path in &self.prompts {
            sets.push((path.display().to_string(), TaskSet::read(path)?));
        }
        if sets.is_empty() {
            sets.push(("built in".to_owned(), TaskSet::stories()));
            if self.model.is_none() {
                let questions = TaskSet::parse(
                    "questions.jsonl",
                    builtin_questions().map_err(of_option("--prompts"))?,
                )?;
                sets.push(("built in".to_owned(), questions));
            }
        }
        let (mut tasks, mut described) = (Vec::new(), Vec::new());
        for (name, mut set) in sets {
            set.notes.iter().for_each(|note| tell!("mtad: {name}: {note}"));
            if let Some(limit) = self.limit {
                set.limit(limit as usize);
            }
            if let Some(template) = &self.template {
                set.frame(template).map_err(of_option("--template"))?;
            }
            described.push(format!("{} of {name} ({})", set.tasks.len(), set.layout));
            tasks.extend(set.tasks);
        }
        Ok((tasks, described.join("; ")))
    }

    /// The arm whose perplexity plain sampling is to be cooled to, if any.
    fn matched<'a>(&self, arms: &'a [Arm]) -> Result<Option<&'a Arm>> {
        let builtin = self.model.is_none() && self.prompts.is_empty();
        let wanted = match self.match_perplexity.as_deref() {
            Some("none") => return Ok(None),
            Some(name) => name,
            None if builtin => "mtad",
            None => return Ok(None),
        };
        let named = |arm: &&Arm| arm.label == wanted || arm.settings.strategy.to_string() == wanted;
        let usual = |arm: &&Arm| arm.settings.tau == Settings::default().tau;
        let hot = || arms.iter().filter(named).filter(|arm| !arm.is_deterministic());
        let found = hot().find(usual).or_else(|| hot().next());
        if found.is_none() && self.match_perplexity.is_some() {
            return Err(Error::invalid(format!(
                "--match-perplexity {wanted}: no strategy of that name draws tokens here"
            )));
        }
        Ok(found)
    }

    fn method(&self, tasks: String) -> Vec<(&'static str, String)> {
        vec![
            ("tasks", tasks),
            ("repeats", self.repeats.to_string()),
            ("seed", self.seed.to_string()),
            ("most tokens", self.max_tokens.to_string()),
        ]
    }
}

/// Shows progress and measures energy.
struct Watch {
    bar: ProgressBar,
    metering: Metering,
    begun: Option<Instant>,
    works: Vec<(usize, Work)>,
}

impl Observer for Watch {
    fn begins(&mut self, session: &mut Session) {
        self.metering.listen_to(session);
        self.begun = Some(self.metering.begin());
    }

    fn ended(&mut self, index: usize, generation: &Generation<'_>) {
        if let Some(begun) = self.begun.take() {
            self.works.push((index, Work::new(self.metering.end(begun), generation)));
        }
    }

    fn progress(&mut self, done: usize, total: usize, last: &str) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message(last.to_owned());
    }
}

/// Leaves out prompts that the context has no room for.
fn that_fit(tasks: Vec<Task>, pair: &Pair, options: &SessionOptions) -> Result<Vec<Task>> {
    let capacity = pair.session(options)?.capacity();
    let tokenizer = pair.tokenizer();
    let encoding = EncodeOptions { bos: tokenizer.add_bos(), special: false };
    let length = |task: &Task| tokenizer.encode(&task.prompt, encoding).len();
    let all = tasks.len();
    let tasks: Vec<Task> =
        tasks.into_iter().filter(|task| (1..capacity).contains(&length(task))).collect();
    if tasks.is_empty() {
        return Err(Error::invalid(format!("no prompt fits the context of {capacity} tokens")));
    }
    if tasks.len() < all {
        let gone = all - tasks.len();
        tell!("mtad: left out: {gone} prompts that do not fit the context of {capacity} tokens");
    }
    Ok(tasks)
}

pub(super) fn eval(args: &EvalArgs) -> Result<()> {
    let grid = args.grid();
    let arms = grid.arms()?;
    let matched = args.matched(&arms)?;
    #[cfg(feature = "spider")]
    if let Ok(program) = std::env::current_exe() {
        crate::eval::run_queries_with(program);
    }
    let (tasks, described) = args.tasks()?;
    let strategies = &grid.strategies;
    // A draft that there is belongs to the evaluation, whether these strategies use it or not.
    let has_draft = args.model.is_none() || args.draft.is_some();
    let drafting = strategies.iter().copied().find(|s| s.needs_draft());
    let loaded_for = drafting.unwrap_or(if has_draft { Strategy::Mtad } else { strategies[0] });
    // Whatever meters there are: the table has a column for them.
    let mut metering = args.meters.start(Some(0.0))?;
    let (model, draft) = (args.model.as_deref(), args.draft.as_deref());
    let draft_device = args.draft_device.clone();
    let pre_tokenizer = args.vocabulary.pre_tokenizer.clone();
    let load = LoadOptions { draft_device, pre_tokenizer, ..args.device.load_options()? };
    let pair = metering.load(|| load_pair(model, draft, loaded_for, &load))?;
    pair.on_note(note_listener());
    let options = SessionOptions { context: args.device.context(), ..SessionOptions::default() };
    let tasks = that_fit(tasks, &pair, &options)?;
    let mut journal = Journal::in_memory();
    if let Some(folder) = &args.out {
        for name in Report::FILES.into_iter().chain([Journal::FILE]) {
            let inputs = args.prompts.iter().map(PathBuf::as_path).chain(pair.files());
            files::check_inputs(&folder.join(name), inputs)?;
        }
        let shared: [&dyn std::fmt::Debug; 5] =
            [&args.seed, &args.max_tokens, &grid.base, &options, &args.meters.assumed()];
        journal = Journal::open(folder, &fingerprint(&pair, &tasks, &shared))
            .map_err(of_option("--out"))?;
    }
    if !journal.outcomes().is_empty() {
        tell!("mtad: {} generations are done already", journal.outcomes().len());
    }
    let kept_costs = cost_tables::Kept::of(&pair);
    let costs = strategies.contains(&Strategy::Auto).then(|| kept_costs.load()).flatten();
    let known_costs = costs.is_some();
    let mut runner = Runner {
        pair: &pair,
        options,
        tasks,
        repeats: args.repeats,
        seed: args.seed,
        max_tokens: args.max_tokens as usize,
        cancel: interrupts::flag(),
        journal,
        costs,
    };
    // What finished until an interrupt is reported.
    let _finishing = Finishing::first();
    let bar = progress_bar("{bar:40} {pos}/{len} {eta} {msg}");
    let mut watch = Watch { bar, metering, begun: None, works: Vec::new() };
    let (complete, cooled) = measure(&mut runner, &arms, matched, &mut watch)?;
    watch.bar.finish_and_clear();
    if let (false, Some(costs)) = (known_costs, &runner.costs) {
        kept_costs.store(costs);
    }
    let energy = joules(watch, &mut runner.journal)?;

    let row = |arm: &Arm| summarize(arm, &runner.tasks, runner.outcomes());
    let name = |model: &crate::engine::Model| model.file().name().to_owned();
    let report = Report {
        target: name(pair.target()),
        draft: pair.draft().map(name),
        device: pair.target().describe(),
        method: args.method(described),
        rows: arms.iter().map(row).collect(),
        cooled: cooled.map(|(of, arm)| (of, row(&arm))),
        no_joules: energy.why_not,
        energy: energy.setup,
        complete,
    };
    if let Some(folder) = &args.out {
        report.write(folder)?;
    }
    if args.json {
        print_line(report.json())?;
    } else {
        print(&report, args.out.as_deref())?;
    }
    match (report.no_joules, args.meters.is_wanted() && !args.meters.is_lenient()) {
        (Some(why), true) => Err(Error::unsupported(
            "energy",
            format!("{why}; everything else is above (--allow-no-meter makes that a success)"),
        )),
        _ => Ok(()),
    }
}

/// Runs all arms, then cools plain sampling to what one of them reached.
fn measure(
    runner: &mut Runner<'_>,
    arms: &[Arm],
    matched: Option<&Arm>,
    watch: &mut Watch,
) -> Result<(bool, Option<(String, Arm)>)> {
    if !runner.run(arms, watch)? {
        return Ok((false, None));
    }
    let Some(arm) = matched else { return Ok((true, None)) };
    let Some(wanted) = summarize(arm, &runner.tasks, runner.outcomes()).perplexity else {
        return Ok((true, None));
    };
    let found = cool(runner, &arm.settings, wanted.value, watch)?;
    Ok((found.is_some(), found.map(|found| (arm.label.clone(), found))))
}

/// What meters said.
struct Energy {
    setup: Json,
    why_not: Option<String>,
}

/// Stops the meters and takes down what each generation consumed.
fn joules(watch: Watch, journal: &mut Journal) -> Result<Energy> {
    let Watch { metering, works, .. } = watch;
    let measured = metering.finish().expect("energy is always asked for here");
    let setup = measured.setup_json();
    let mut why_not = None;
    // A generation that was cut short has work and no outcome.
    let finished = journal.outcomes().len();
    for (index, work) in works.iter().filter(|(index, _)| *index < finished) {
        match measured.figures(work) {
            Ok(figures) => journal.set_joules(*index, figures.used.joules)?,
            Err(why) => why_not = Some(why.reason),
        }
    }
    // Some reading is enough for a figure.
    let any = journal.outcomes().iter().any(|outcome| outcome.joules.is_some());
    Ok(Energy { setup: setup.into(), why_not: why_not.filter(|_| !any) })
}

fn print(report: &Report, folder: Option<&Path>) -> Result<()> {
    print_line(format_args!("target  {}", report.target))?;
    if let Some(draft) = &report.draft {
        print_line(format_args!("draft   {draft}"))?;
    }
    print_line(format_args!("device  {}", report.device))?;
    for (key, text) in &report.method {
        print_line(format_args!("{key}: {text}"))?;
    }
    print_line("")?;
    table(&report.table()).into_iter().try_for_each(print_line)?;
    report.notes().into_iter().try_for_each(print_line)?;
    match folder {
        Some(folder) => {
            print_line(format_args!("written to {}", folder.join("report.html").display()))
        }
        None => Ok(()),
    }
}
