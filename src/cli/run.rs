//! `mtad run`: generates text after a prompt.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::chat::FrameArgs;
use super::console::{Text, tell};
use super::metering::{Measured, MeterArgs, Work};
use super::{
    DeviceArgs, VocabularyArgs, loading_bar, open_model_as, print_line, print_notes, read_text,
    warn_of_doubled_bos,
};
use super::{cost_tables, interrupts};
use crate::decode::{Choice, CostTable, Phase, Settings, Strategy};
use crate::engine::CacheType;
use crate::engine::{Device, SessionOptions};
use crate::error::{Error, Result};
use crate::sampling::{Constraint, Warp};
use crate::session::generation::{Generation, Request, StopReason, clock_seed};
use crate::session::pair::{LoadOptions, Pair};

/// Generate text after a prompt
///
/// Without --model this runs the built-in pair of small story models. The prompt is the argument,
/// or --file, or standard input.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct RunArgs {
    /// The text to go on from
    pub(super) prompt: Option<String>,

    /// Read the prompt from a file
    #[arg(long, short, value_name = "FILE", conflicts_with = "prompt")]
    pub(super) file: Option<PathBuf>,

    /// The target model, a GGUF file [default: the built-in pair]
    #[arg(long, short, value_name = "GGUF")]
    pub(super) model: Option<PathBuf>,

    /// The draft model, a GGUF file with the target's vocabulary
    #[arg(long, short, value_name = "GGUF", requires = "model")]
    pub(super) draft: Option<PathBuf>,

    /// How tokens are chosen [default: mtad with a draft, sample without]
    #[arg(long, short, value_name = "NAME", value_parser = super::strategies())]
    pub(super) strategy: Option<Strategy>,

    /// The most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 256)]
    pub(super) max_tokens: usize,

    /// Divide logits by this before drawing; 0 takes the most probable token
    #[arg(long, value_name = "X", default_value_t = Warp::default().temperature)]
    temperature: f32,

    /// Draw from the K most probable tokens only; 0 is off
    #[arg(long, value_name = "K", default_value_t = Warp::default().top_k)]
    top_k: usize,

    /// Draw from the most probable tokens that together have this probability; 1 is off
    #[arg(long, value_name = "P", default_value_t = Warp::default().top_p)]
    top_p: f32,

    /// Drop tokens less probable than this times the most probable one; 0 is off
    #[arg(long, value_name = "P", default_value_t = Warp::default().min_p)]
    min_p: f32,

    /// Make tokens of the last 64 less probable by this factor; 1 is off
    #[arg(long, value_name = "R", default_value_t = Warp::default().repeat_penalty)]
    repeat_penalty: f32,

    /// Take this off the logits of tokens that occur among the last 64; 0 is off
    #[arg(long, value_name = "P", default_value_t = Warp::default().presence_penalty)]
    presence_penalty: f32,

    /// Take this off the logits of such tokens for each time that they occur; 0 is off
    #[arg(long, value_name = "P", default_value_t = Warp::default().frequency_penalty)]
    frequency_penalty: f32,

    /// Seed of all draws: the same seed gives the same text [default: from the clock]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,

    /// Tokens that the draft proposes per round (mtjd: tokens of a block)
    #[arg(long, value_name = "G", default_value_t = Settings::default().gamma)]
    gamma: usize,

    /// Beams (mtad, mmtad, dsbd: of the draft; beam, mtjd: of the target)
    #[arg(long, value_name = "W", default_value_t = Settings::default().beam_width)]
    beam_width: usize,

    /// Accept blocks whose joint probability ratio, target to draft, is above this (mtad, mmtad,
    /// auto): higher is closer to the target, lower is faster
    #[arg(long, value_name = "T", default_value_t = Settings::default().tau)]
    tau: f64,

    /// Draw beams and candidates with replacement
    #[arg(long)]
    with_replacement: bool,

    /// Children of each node of the tree, depth by depth (specinfer)
    #[arg(long, value_name = "K,K,..", value_delimiter = ',', default_values_t = Settings::default().branching)]
    branching: Vec<usize>,

    /// The draft hands over where its largest probability is below this (bild)
    #[arg(long, value_name = "P", default_value_t = Settings::default().fallback)]
    fallback: f64,

    /// Roll back to the first drafted token whose -ln(probability) is above this; inf is never
    /// (bild)
    #[arg(long, value_name = "X", default_value_t = Settings::default().rollback)]
    rollback: f64,

    /// Accept drafted tokens of a probability above this, or above delta x exp(-entropy) (typical)
    #[arg(long, value_name = "P", default_value_t = Settings::default().epsilon)]
    epsilon: f64,

    /// The share of exp(-entropy) that is enough (typical)
    #[arg(long, value_name = "D", default_value_t = Settings::default().delta)]
    delta: f64,

    /// Decide by this table of what passes cost: the output of an earlier --json run, or its
    /// cost_table alone (auto) [default: measured once for each pair and device, and kept]
    #[arg(long, value_name = "FILE")]
    cost_table: Option<PathBuf>,

    /// End the text where this appears; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    #[cfg(feature = "grammar")]
    #[command(flatten)]
    grammar: super::grammar::GrammarArgs,

    /// Take names of control tokens in the prompt, such as </s>, for those tokens
    #[arg(long)]
    pub(super) special: bool,

    /// How keys and values are kept
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = super::cache_types())]
    cache_type: CacheType,

    /// Keep the session in this file: a later run whose prompt begins with the same text (prompt
    /// and what was generated) does not evaluate it again
    #[arg(long, value_name = "FILE")]
    pub(super) prompt_cache: Option<PathBuf>,

    /// Do not print the prompt before the text
    #[arg(long)]
    pub(super) no_echo: bool,

    /// Let control characters of the text through to a terminal, which obeys them; otherwise they
    /// are shown. (What goes to a file or a pipe is never changed.)
    #[arg(long, conflicts_with = "json")]
    pub(super) raw: bool,

    /// Print to standard error what happened: rounds, acceptance, speed, time by phase
    #[arg(long)]
    pub(super) stats: bool,

    /// Score the text: its perplexity under the target, before any warping
    #[arg(long)]
    pub(super) score: bool,

    /// Print one line of JSON instead of text
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    vocabulary: VocabularyArgs,

    #[command(flatten)]
    pub(super) device: DeviceArgs,

    /// Where the draft runs [default: where the target does]
    #[arg(long, value_name = "DEVICE")]
    draft_device: Option<String>,

    #[command(flatten)]
    pub(super) meters: MeterArgs,
}

/// Generate text after a prompt, or answer it
///
/// Without --model this runs the built-in pair of small story models. The prompt is the argument,
/// or --file, or standard input. With --chat it is a user's turn in the model's chat template, and
/// the answer alone is printed.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct RunCommand {
    #[command(flatten)]
    run: RunArgs,

    /// Answer the prompt, by the model's chat template
    #[arg(long, conflicts_with = "special")]
    chat: bool,

    #[command(flatten)]
    frame: FrameArgs,
}

/// Slower than plain decoding by less than this may be noise.
const NOTABLE: f64 = 1.1;

impl RunArgs {
    pub(super) fn strategy(&self) -> Strategy {
        let has_draft = self.model.is_none() || self.draft.is_some();
        self.strategy.unwrap_or_else(|| Strategy::default_for(has_draft))
    }

    /// The stored cost table, if one was named.
    pub(super) fn costs(&self) -> Result<Option<CostTable>> {
        self.cost_table.as_deref().map(cost_tables::read).transpose()
    }

    pub(super) fn request(
        &self,
        strategy: Strategy,
        seed: u64,
        costs: Option<CostTable>,
        cancel: &Arc<AtomicBool>,
    ) -> Request {
        Request {
            settings: Settings {
                strategy,
                gamma: self.gamma,
                beam_width: self.beam_width,
                tau: self.tau,
                with_replacement: self.with_replacement,
                branching: self.branching.clone(),
                fallback: self.fallback,
                rollback: self.rollback,
                epsilon: self.epsilon,
                delta: self.delta,
                costs: costs.map(Arc::new),
                warp: Warp {
                    temperature: self.temperature,
                    top_k: self.top_k,
                    top_p: self.top_p,
                    min_p: self.min_p,
                    repeat_penalty: self.repeat_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    ..Warp::default()
                },
                constraint: None,
                seed,
                score: self.score,
                alternatives: 0,
            },
            max_tokens: Some(self.max_tokens),
            stop: self.stop.clone(),
            special: self.special,
            cancel: cancel.clone(),
        }
    }

    pub(super) fn session_options(&self) -> SessionOptions {
        SessionOptions { context: self.device.context(), cache_type: self.cache_type }
    }

    /// The files that are read.
    pub(super) fn inputs(&self) -> impl Iterator<Item = &Path> {
        let files = [&self.file, &self.model, &self.draft, &self.cost_table];
        let files = files.into_iter().filter_map(|file| file.as_deref());
        #[cfg(feature = "grammar")]
        let files = files.chain(self.grammar.inputs());
        files
    }

    /// What the text is held to, if anything, in the pair's tokens.
    pub(super) fn constraint(&self, pair: &Pair) -> Result<Option<Arc<dyn Constraint>>> {
        #[cfg(feature = "grammar")]
        return self.grammar.constraint(pair.tokenizer());
        #[cfg(not(feature = "grammar"))]
        {
            _ = pair;
            Ok(None)
        }
    }

    /// Loads the pair, without a draft where the strategy has no use for one.
    pub(super) fn load(&self, strategy: Strategy) -> Result<Pair> {
        let draft_device = self.draft_device.clone();
        let pre_tokenizer = self.vocabulary.pre_tokenizer.clone();
        let options = LoadOptions { draft_device, pre_tokenizer, ..self.device.load_options()? };
        load_pair(self.model.as_deref(), self.draft.as_deref(), strategy, &options)
    }
}

/// Loads a pair, or the built-in one, without a draft where the strategy has no use for one.
pub(super) fn load_pair(
    model: Option<&Path>,
    draft: Option<&Path>,
    strategy: Strategy,
    options: &LoadOptions,
) -> Result<Pair> {
    let mut bar = loading_bar();
    let Some(model) = model else {
        if cfg!(not(feature = "builtin-pair")) {
            let why = "this program was built without the built-in pair; name a file with --model";
            return Err(Error::invalid(why));
        }
        return Pair::builtin(strategy.needs_draft(), options, &mut bar);
    };
    let draft = match draft {
        Some(draft) if strategy.needs_draft() => Some(open_model_as(draft, options)?),
        None if strategy.needs_draft() => {
            return Err(Error::invalid(format!(
                "strategy {strategy} needs a draft model: name one with --draft, or use greedy or sample"
            )));
        }
        _ => None,
    };
    Pair::from_files(open_model_as(model, options)?, draft, options, &mut bar)
}

pub(super) fn run(command: &RunCommand) -> Result<()> {
    let args = &command.run;
    if command.frame.is_given() && !command.chat {
        return Err(Error::invalid("--template and --system are of --chat, which is not given"));
    }
    let strategy = args.strategy();
    let seed = args.seed.unwrap_or_else(clock_seed);
    let mut request = args.request(strategy, seed, args.costs()?, &interrupts::flag());
    request.validate()?;
    let prompt = read_text(args.prompt.as_deref(), args.file.as_ref(), "prompt")?;
    let mut metering = args.meters.start(None)?;
    let pair = metering.load(|| args.load(strategy))?;
    request.settings.constraint = args.constraint(&pair)?;
    let mut kept_costs = None;
    if strategy == Strategy::Auto && request.settings.costs.is_none() {
        request.settings.costs = kept_costs.insert(cost_tables::Kept::of(&pair)).load();
    }

    let mut session = match &args.prompt_cache {
        Some(file) if file.exists() => pair.load_session(file, &args.session_options())?,
        _ => pair.session(&args.session_options())?,
    };
    print_notes(pair.take_notes());
    // From here on there is a text to report, and perhaps a session to save.
    let _finishing = interrupts::Finishing::first();
    metering.listen_to(&mut session);
    let begun = metering.begin();
    let start = Instant::now();
    let mut generation = match command.chat {
        true => session.generate_from(&command.frame.one_turn(&pair, &prompt)?, &request)?,
        false => session.generate(&prompt, &request)?,
    };
    warn_of_doubled_bos(pair.tokenizer(), generation.prompt());
    // What standard output does not take ends the text, but the session is saved all the same.
    let mut out = Text::new(args.raw);
    let mut show = |text: &str| if args.json { Ok(()) } else { out.show(text) };
    let mut shown = if args.no_echo || command.chat { Ok(()) } else { show(&prompt) };
    let mut text = String::new();
    while shown.is_ok()
        && let Some(piece) = generation.next()
    {
        let piece = piece?;
        shown = show(&piece.text);
        text.push_str(&piece.text);
    }
    let window = metering.end(begun);
    let shown = shown.and_then(|()| show("\n"));
    drop(out);
    print_notes(pair.take_notes());

    let total = start.elapsed().as_secs_f64();
    if let (Some(kept), Some(costs)) = (kept_costs, &generation.settings().costs) {
        kept.store(costs);
    }
    let measured = metering.finish();
    let work = Work::new(window, &generation);
    // Who interrupts does not want to wait for more passes.
    let plain = match strategy.needs_draft() && !interrupts::asked() {
        true => generation.plain_seconds()?,
        false => None,
    };
    let report = Report {
        generation: &generation,
        pair: &pair,
        strategy,
        seed,
        total,
        plain,
        energy: measured.as_ref().map(|measured| (measured, &work)),
        auto: args.device.device.eq_ignore_ascii_case("auto"),
    };
    let mut printed = shown;
    if args.json && printed.is_ok() {
        printed = print_line(report.json(&text, args.score));
    }
    if args.stats {
        report.print();
    }
    report.warn();
    if let Some(file) = &args.prompt_cache {
        session.save(file)?;
    }
    printed?;
    match &measured {
        Some(measured) => {
            tell!("");
            measured.print(&work);
            measured.judge([&work])
        }
        None => Ok(()),
    }
}

/// A choice of the controller, for people.
fn describe(choice: Choice) -> String {
    match choice {
        Choice { gamma: 0, .. } => "plain".to_owned(),
        Choice { strategy, gamma, beam_width: 1 } => format!("{strategy} gamma {gamma}"),
        Choice { strategy, gamma, beam_width } => {
            format!("{strategy} gamma {gamma} beam-width {beam_width}")
        }
    }
}

/// What a finished generation has to say.
struct Report<'a> {
    generation: &'a Generation<'a>,
    pair: &'a Pair,
    strategy: Strategy,
    seed: u64,
    total: f64,
    /// Seconds that the tokens would have taken without a draft.
    plain: Option<f64>,
    energy: Option<(&'a Measured, &'a Work)>,
    /// Whether the device was ours to choose.
    auto: bool,
}

/// A rate, if there was time to measure one.
fn per_second(count: usize, seconds: f64) -> Option<f64> {
    (count > 0 && seconds > 0.0).then(|| count as f64 / seconds)
}

impl Report<'_> {
    fn stop(&self) -> StopReason {
        self.generation.stop_reason().unwrap_or(StopReason::Interrupt)
    }

    fn tokens_per_second(&self) -> Option<f64> {
        per_second(self.generation.tokens().len(), self.generation.generating_seconds())
    }

    fn prompt_tokens_per_second(&self) -> Option<f64> {
        let seconds = self.generation.seconds(Phase::Prefill);
        per_second(self.generation.prefill().evaluated, seconds)
    }

    fn json(&self, text: &str, score: bool) -> serde_json::Value {
        let g = self.generation;
        let s = g.statistics();
        let mut seconds = json!({"load": self.pair.load_seconds(), "total": self.total});
        for phase in Phase::ALL {
            seconds[phase.to_string()] = g.seconds(phase).into();
        }
        let mut out = json!({
            "text": text,
            "token_ids": g.tokens(),
            "tokens": g.tokens().len(),
            "prompt_tokens": g.prompt_tokens(),
            "prompt_tokens_reused": g.prefill().reused,
            "strategy": self.strategy.to_string(),
            "rounds": s.rounds(),
            "forced": s.forced,
            "drafted": s.drafted(),
            "accepted": s.accepted(),
            "acceptance_rate": s.acceptance_rate(),
            "acceptance_by_depth": s.acceptance_by_depth(),
            "block_efficiency": s.block_efficiency(),
            "min_joint_ratio": s.min_ratio(),
            "tokens_per_second": self.tokens_per_second(),
            "prompt_tokens_per_second": self.prompt_tokens_per_second(),
            "plain_tokens_per_second":
                self.plain.and_then(|seconds| per_second(g.tokens().len(), seconds)),
            "seconds": seconds,
            "seed": self.seed,
            "stop": self.stop().name(),
            "device": self.pair.target().describe(),
        });
        if let Some(draft) = self.pair.draft() {
            out["draft_device"] = draft.describe().into();
        }
        if score {
            out["perplexity"] = g.perplexity().into();
        }
        if let Some(decisions) = g.decisions() {
            let choice = |choice: Choice| match choice {
                Choice { gamma: 0, .. } => json!({"strategy": "plain"}),
                Choice { strategy, gamma, beam_width } => json!({
                    "strategy": strategy.to_string(), "gamma": gamma, "beam_width": beam_width
                }),
            };
            let rounds = decisions.rounds.iter().map(|&(made, rounds)| {
                let mut entry = choice(made);
                entry["rounds"] = rounds.into();
                entry
            });
            out["auto"] = json!({
                "choices": rounds.collect::<Vec<_>>(),
                "trials": decisions.trials,
                "best": decisions.best.map(|(best, rate)| {
                    let mut entry = choice(best);
                    entry["tokens_per_second"] = rate.into();
                    entry
                }),
                "plain_tokens_per_second": decisions.plain,
            });
        }
        if let Some(costs) = &g.settings().costs {
            out["cost_table"] = cost_tables::to_json(costs);
        }
        if let Some((measured, work)) = self.energy {
            out["energy"] = measured.json(work);
        }
        out
    }

    /// One line if speculation did not pay.
    fn warn(&self) {
        let seconds = self.generation.generating_seconds();
        let notable = |plain: &f64| seconds > NOTABLE * plain && seconds > plain + 0.1;
        if let Some(plain) = self.plain.filter(notable) {
            tell!(
                "mtad: warning: {} took {seconds:.2} s where plain decoding would have taken about \
                 {plain:.2} s; try --strategy auto, or sample",
                self.strategy
            );
        }
    }

    /// What the controller chose, on standard error.
    fn print_decisions(&self) {
        let g = self.generation;
        let Some(decisions) = g.decisions() else { return };
        let most = decisions
            .rounds
            .iter()
            .take(6)
            .map(|&(choice, rounds)| format!("{rounds} x {}", describe(choice)));
        let mut chosen = most.collect::<Vec<_>>().join(", ");
        if decisions.rounds.len() > 6 {
            chosen += &format!(", {} others", decisions.rounds.len() - 6);
        }
        tell!("auto chose        {chosen}");
        tell!(
            "  trials          {} of the rounds, to see whether others are faster",
            decisions.trials
        );
        if let Some((best, rate)) = decisions.best {
            tell!(
                "  by now          {} is expected to give {rate:.1} tokens/s, plain decoding {:.1}",
                describe(best),
                decisions.plain
            );
        }
        if let Some(costs) = &g.settings().costs {
            let row = |entries: &[(usize, f64)]| {
                let cells = entries.iter().map(|(n, t)| format!("{n}: {:.3}", 1000.0 * t));
                cells.collect::<Vec<_>>().join(", ")
            };
            tell!("  ms by rows      target {}", row(costs.target_entries()));
            tell!("                  draft {}", row(costs.draft_entries()));
        }
    }

    /// For people, on standard error.
    fn print(&self) {
        let g = self.generation;
        let s = g.statistics();
        let rate = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
        tell!("");
        tell!("strategy          {} (seed {})", self.strategy, self.seed);
        tell!("device            {}", self.pair.target().describe());
        if let Some(draft) = self.pair.draft() {
            tell!("  draft           {}", draft.describe());
        }
        if self.auto {
            let (name, why) = Device::auto_choice();
            tell!("  auto chose      {name}: {why}");
        }
        tell!(
            "tokens            {} prompt + {} generated, ended by {}",
            g.prompt_tokens(),
            g.tokens().len(),
            self.stop().name()
        );
        tell!("rounds            {}", s.rounds());
        if let Some(acceptance) = s.acceptance_rate() {
            tell!("drafted           {}", s.drafted());
            tell!("accepted          {} ({:.1}%)", s.accepted(), 100.0 * acceptance);
            let depths = s.acceptance_by_depth();
            let depths: Vec<_> = depths.iter().map(|a| format!("{:.0}%", 100.0 * a)).collect();
            tell!("  by depth        {}", depths.join(" "));
        }
        if s.forced > 0 {
            tell!("forced            {} by the grammar, without a pass", s.forced);
        }
        tell!("block efficiency  {:.3} tokens per target pass", s.block_efficiency());
        if let Some(ratio) = s.min_ratio() {
            tell!(
                "joint ratio       at least {ratio:.4}, target to draft, in every accepted block"
            );
        }
        self.print_decisions();
        if let Some(perplexity) = g.perplexity() {
            tell!("perplexity        {perplexity:.3} under the target");
        }
        tell!("tokens/s          {}", rate(self.tokens_per_second()));
        if let Some(plain) = self.plain.and_then(|plain| per_second(g.tokens().len(), plain)) {
            tell!("plain tokens/s    {plain:.1} (about, without a draft)");
        }
        tell!("prompt tokens/s   {}", rate(self.prompt_tokens_per_second()));
        let phases = Phase::ALL.map(|phase| format!("{phase} {:.3}", g.seconds(phase)));
        tell!("seconds           load {:.3}, {}", self.pair.load_seconds(), phases.join(", "));
    }
}
