//! `mtad chat`: a conversation at a terminal, or line by line.

use std::io::{self, BufRead, IsTerminal};
use std::path::Path;

use clap::Args;
use serde_json::json;

use super::console::{Text, tell};
use super::run::RunArgs;
use super::{interrupts, print_line, print_notes, read_text, template};
use crate::chat::{Chat, Inputs};
use crate::decode::{Origin, Phase};
use crate::error::{Error, Result};
use crate::sampling::Warp;
use crate::session::generation::{Request, Session, StopReason, clock_seed};
use crate::session::pair::Pair;

/// How a conversation is put to the model.
#[derive(Debug, Args)]
pub struct FrameArgs {
    /// The chat template: a file, a further one that the model names, or one of chatml, llama2,
    /// llama3, mistral, gemma, phi3, zephyr, vicuna, alpaca, plain [default: the model's]
    #[arg(long, value_name = "FILE|NAME")]
    template: Option<String>,

    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

impl FrameArgs {
    /// Whether anything was asked for.
    pub(super) fn is_given(&self) -> bool {
        self.template.is_some() || self.system.is_some()
    }

    fn chat(&self, pair: &Pair) -> Result<Chat> {
        let found = template::find(self.template.as_deref(), Some(pair.target().file()))?;
        Ok(Chat::new(found, pair.tokenizer()))
    }

    fn inputs(&self, chat: &Chat) -> Result<Inputs> {
        let mut inputs = chat.inputs();
        template::set_now(&mut inputs)?;
        if let Some(system) = &self.system {
            inputs.push("system", system);
        }
        Ok(inputs)
    }

    /// The tokens of one user's turn.
    pub(super) fn one_turn(&self, pair: &Pair, said: &str) -> Result<Vec<u32>> {
        let chat = self.chat(pair)?;
        let mut inputs = self.inputs(&chat)?;
        inputs.push("user", said);
        chat.encode(&inputs)
    }
}

/// Talk with a model
///
/// At a terminal, /help tells of commands, a line that ends with \ goes on in the next, and so does
/// what begins with """ until it is closed. Ctrl-C ends an answer, Ctrl-D the conversation. From
/// standard input that is no terminal, each line is a turn, and each answer ends with a line end.
/// Names of control tokens in what you say are text.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    mut_arg("prompt", |arg| arg.help("The first turn")),
    mut_arg("file", |arg| arg.help("Read the first turn from a file")),
    mut_arg("max_tokens", |arg| arg.default_value("1024").help("The most tokens of an answer")),
    mut_arg("stats", |arg| arg.help("Print to standard error what each answer took")),
    mut_arg("json", |arg| arg.help("Print one line of JSON at the end instead of answers")),
    mut_arg("special", |arg| arg.hide(true)),
    mut_arg("no_echo", |arg| arg.hide(true)),
    mut_arg("prompt_cache", |arg| arg.hide(true)),
    mut_arg("energy", |arg| arg.hide(true)),
    mut_arg("meter", |arg| arg.hide(true)),
    mut_arg("meter_rate", |arg| arg.hide(true)),
    mut_arg("idle", |arg| arg.hide(true)),
    mut_arg("assume_watts", |arg| arg.hide(true)),
)]
pub struct ChatArgs {
    #[command(flatten)]
    frame: FrameArgs,

    /// Colour what the draft proposed and the target accepted
    #[arg(long)]
    show_origin: bool,

    #[command(flatten)]
    run: RunArgs,
}

impl ChatArgs {
    /// Refuses options of `run` that a conversation has no use for.
    fn check(&self) -> Result<()> {
        let unused = [
            (self.run.special, "--special: names of control tokens in what is said are text"),
            (self.run.prompt_cache.is_some(), "--prompt-cache: use /save and /load"),
            (self.run.meters.is_given(), "meters of energy: use `mtad energy`"),
        ];
        match unused.iter().find(|(is_given, _)| *is_given) {
            Some((_, what)) => Err(Error::invalid(format!("`mtad chat` has no {what}"))),
            None => Ok(()),
        }
    }
}

/// A conversation under way.
struct Talk<'a> {
    args: &'a ChatArgs,
    pair: Pair,
    chat: Chat,
    inputs: Inputs,
    session: Session,
    request: Request,
    /// What each answer was, for `--json`.
    answers: Vec<serde_json::Value>,
}

/// Escape sequences of a terminal.
mod colour {
    pub const DRAFTED: &str = "\x1b[32m";
    pub const PLAIN: &str = "\x1b[0m";
}

pub(super) fn chat(args: &ChatArgs) -> Result<()> {
    args.check()?;
    let strategy = args.run.strategy();
    let seed = args.run.seed.unwrap_or_else(clock_seed);
    let mut request = args.run.request(strategy, seed, args.run.costs()?, &interrupts::flag());
    request.validate()?;
    let first = match (&args.run.prompt, &args.run.file) {
        (None, None) => None,
        (prompt, file) => Some(read_text(prompt.as_deref(), file.as_ref(), "turn")?),
    };
    let pair = args.run.load(strategy)?;
    request.settings.constraint = args.run.constraint(&pair)?;
    print_notes(pair.take_notes());
    let chat = args.frame.chat(&pair)?;
    let inputs = args.frame.inputs(&chat)?;
    let session = pair.session(&args.run.session_options())?;
    let answers = Vec::new();
    let mut talk = Talk { args, pair, chat, inputs, session, request, answers };

    let is_terminal = io::stdin().is_terminal();
    // At a terminal Ctrl-C ends the answer that is being written, and not the program.
    let _finishing = is_terminal.then(interrupts::Finishing::first);
    if let Some(said) = first {
        talk.answer(&said)?;
    }
    if is_terminal {
        terminal::converse(&mut talk)?;
    } else {
        for line in io::stdin().lock().lines() {
            let line = line.map_err(|e| Error::io("standard input", e))?;
            if !line.trim().is_empty() {
                talk.answer(&line)?;
            }
        }
    }
    if args.run.json {
        let messages: serde_json::Value =
            serde_json::from_str(&talk.inputs.messages_json()).unwrap_or_default();
        print_line(json!({"messages": messages, "answers": talk.answers, "seed": seed}))?;
    }
    Ok(())
}

impl Talk<'_> {
    /// Says something and prints the answer. If there is none, nothing was said.
    fn answer(&mut self, said: &str) -> Result<()> {
        let before = self.inputs.len();
        self.inputs.push("user", said);
        let answered = self.write_answer();
        match &answered {
            Ok(text) => self.inputs.push("assistant", text),
            Err(_) => self.inputs.truncate(before),
        }
        answered.map(drop)
    }

    fn write_answer(&mut self) -> Result<String> {
        let prompt = self.chat.encode(&self.inputs)?;
        if io::stdin().is_terminal() {
            interrupts::forget();
        }
        let json = self.args.run.json;
        let coloured = self.args.show_origin && io::stdout().is_terminal();
        let mut out = Text::new(self.args.run.raw);
        let mut generation = self.session.generate_from(&prompt, &self.request)?;
        let mut text = String::new();
        let mut is_drafted = false;
        for piece in generation.by_ref() {
            let piece = piece?;
            // A template may leave the space before an answer to the model.
            let part = if text.is_empty() { piece.text.trim_start() } else { &piece.text };
            if part.is_empty() {
                continue;
            }
            if coloured && (piece.origin == Origin::Draft) != is_drafted {
                is_drafted = !is_drafted;
                out.control(if is_drafted { colour::DRAFTED } else { colour::PLAIN })?;
            }
            if !json {
                out.show(part)?;
            }
            text.push_str(part);
        }
        if is_drafted {
            out.control(colour::PLAIN)?;
        }
        let stop = generation.stop_reason().unwrap_or(StopReason::Interrupt);
        // One line end, whether the model wrote one or not.
        if !json && !text.ends_with('\n') {
            out.show("\n")?;
        }
        drop(out);
        let seconds = generation.generating_seconds();
        let tokens = generation.tokens().len();
        let rate = (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds);
        let statistics = generation.statistics();
        if self.args.run.stats {
            let rate = rate.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
            let accepted = statistics.acceptance_rate().map_or(String::new(), |share| {
                format!(", {:.0}% of the drafted accepted", 100.0 * share)
            });
            let perplexity = generation.perplexity().filter(|_| self.args.run.score);
            let perplexity = perplexity.map_or(String::new(), |p| format!(", perplexity {p:.3}"));
            tell!(
                "{} prompt tokens ({} known), {tokens} tokens, {rate}/s, {:.3} a pass{accepted}\
                 {perplexity}, ended by {}",
                prompt.len(),
                generation.prefill().reused,
                statistics.block_efficiency(),
                stop.name()
            );
        }
        if json {
            let mut answer = json!({
                "text": text.trim_end(),
                "token_ids": generation.tokens(),
                "tokens": tokens,
                "prompt_tokens": prompt.len(),
                "strategy": self.request.settings.strategy.to_string(),
                "rounds": statistics.rounds(),
                "drafted": statistics.drafted(),
                "accepted": statistics.accepted(),
                "acceptance_rate": statistics.acceptance_rate(),
                "block_efficiency": statistics.block_efficiency(),
                "tokens_per_second": rate,
                "prompt_seconds": generation.seconds(Phase::Prefill),
                "stop": stop.name(),
            });
            if self.args.run.score {
                answer["perplexity"] = generation.perplexity().into();
            }
            self.answers.push(answer);
        }
        match stop {
            StopReason::Context => tell!(
                "mtad: the context of {} tokens is full; /reset begins anew",
                self.session.capacity()
            ),
            StopReason::MaxTokens => {
                tell!("mtad: the answer was cut at {tokens} tokens (--max-tokens)")
            }
            _ => {}
        }
        print_notes(self.pair.take_notes());
        Ok(text.trim_end().to_owned())
    }

    /// Forgets what was said, but not what the model was told before.
    fn reset(&mut self) -> Result<()> {
        self.inputs = self.args.frame.inputs(&self.chat)?;
        self.session.reset()
    }

    fn save(&self, path: &Path) -> Result<()> {
        let text = self.inputs.messages_json() + "\n";
        crate::cached::write(path, text.as_bytes())
            .map_err(|e| Error::io(path.display().to_string(), e))
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(&name, e))?;
        let mut inputs = self.inputs.clone();
        inputs.set_messages(&text, &name)?;
        // Refused now rather than with the next turn.
        self.chat.encode(&inputs)?;
        self.inputs = inputs;
        Ok(())
    }

    /// Changes a setting.
    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        fn read<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
            value.parse().map_err(|_| Error::invalid(format!("{name} cannot be {value:?}")))
        }
        let mut request = self.request.clone();
        let settings = &mut request.settings;
        let Warp { temperature, top_k, top_p, min_p, repeat_penalty, .. } = &mut settings.warp;
        match name {
            "temperature" => *temperature = read(name, value)?,
            "top-k" => *top_k = read(name, value)?,
            "top-p" => *top_p = read(name, value)?,
            "min-p" => *min_p = read(name, value)?,
            "repeat-penalty" => *repeat_penalty = read(name, value)?,
            "presence-penalty" => settings.warp.presence_penalty = read(name, value)?,
            "frequency-penalty" => settings.warp.frequency_penalty = read(name, value)?,
            "tau" => settings.tau = read(name, value)?,
            "gamma" => settings.gamma = read(name, value)?,
            "beam-width" => settings.beam_width = read(name, value)?,
            "seed" => settings.seed = read(name, value)?,
            "max-tokens" => request.max_tokens = Some(read(name, value)?),
            "strategy" => {
                settings.strategy = value.parse()?;
                if settings.strategy.needs_draft() && self.pair.draft().is_none() {
                    return Err(Error::invalid(format!(
                        "strategy {value} needs a draft model; begin with --draft, or without a \
                         strategy that needs none"
                    )));
                }
            }
            _ => {
                return Err(Error::invalid(format!(
                    "there is no setting {name:?}; there are {}",
                    SETTINGS.join(", ")
                )));
            }
        }
        request.validate()?;
        self.request = request;
        Ok(())
    }

    /// Does what a line that begins with `/` says. False ends the conversation.
    fn command(&mut self, line: &str) -> Result<bool> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let file = || match rest {
            "" => Err(Error::invalid(format!("{name} FILE"))),
            file => Ok(Path::new(file)),
        };
        match name {
            "/help" | "/?" => tell!("{HELP}"),
            "/quit" | "/exit" | "/bye" => return Ok(false),
            "/reset" => self.reset()?,
            "/save" => self.save(file()?)?,
            "/load" => {
                self.load(file()?)?;
                tell!("{} messages", self.inputs.len());
            }
            "/set" => match rest.split_once(char::is_whitespace) {
                Some((name, value)) => self.set(name, value.trim())?,
                None => {
                    return Err(Error::invalid(format!(
                        "/set NAME VALUE, of {}",
                        SETTINGS.join(", ")
                    )));
                }
            },
            _ => {
                return Err(Error::invalid(format!(
                    "there is no {name}; /help tells what there is"
                )));
            }
        }
        Ok(true)
    }

    /// Takes a line from a terminal. What goes wrong is told, and the conversation goes on.
    fn take(&mut self, line: &str) -> bool {
        let line = line.trim();
        let done = match line {
            "" => Ok(true),
            _ if line.starts_with('/') => self.command(line),
            _ => self.answer(&joined(line)).map(|()| true),
        };
        done.unwrap_or_else(|error| {
            tell!("mtad: {error}");
            true
        })
    }
}

/// What `/set` can set.
const SETTINGS: [&str; 13] = [
    "temperature",
    "top-k",
    "top-p",
    "min-p",
    "repeat-penalty",
    "presence-penalty",
    "frequency-penalty",
    "tau",
    "gamma",
    "beam-width",
    "seed",
    "max-tokens",
    "strategy",
];

const HELP: &str = "\
/reset            forget what was said
/save FILE        keep the conversation, as JSON
/load FILE        go on with one
/set NAME VALUE   change a setting, such as tau 0.3 or temperature 0
/quit             end (or Ctrl-D)
A line that ends with \\ goes on in the next; so does what begins with \"\"\", until it is closed.
Ctrl-C ends an answer.";

/// Whether more lines belong to what was typed.
fn goes_on(typed: &str) -> bool {
    match typed.trim_start().strip_prefix("\"\"\"") {
        Some(rest) => !rest.trim_end().ends_with("\"\"\""),
        None => typed.ends_with('\\'),
    }
}

/// What was typed as the text that is meant.
fn joined(typed: &str) -> String {
    let quoted = typed.strip_prefix("\"\"\"").and_then(|rest| rest.strip_suffix("\"\"\""));
    match quoted {
        Some(text) => text.trim_matches('\n').to_owned(),
        None => typed.replace("\\\n", "\n"),
    }
}

#[cfg(feature = "chat")]
mod terminal {
    use rustyline::completion::Completer;
    use rustyline::error::ReadlineError;
    use rustyline::highlight::Highlighter;
    use rustyline::hint::Hinter;
    use rustyline::history::DefaultHistory;
    use rustyline::validate::{ValidationContext, ValidationResult, Validator};
    use rustyline::{Context, Editor, Helper};

    use super::{SETTINGS, Talk, goes_on, tell};
    use crate::error::{Error, Result};

    const COMMANDS: [&str; 6] = ["/help", "/load ", "/quit", "/reset", "/save ", "/set "];

    struct Typing;

    impl Helper for Typing {}
    impl Highlighter for Typing {}

    impl Hinter for Typing {
        type Hint = String;
    }

    impl Completer for Typing {
        type Candidate = String;

        fn complete(
            &self,
            line: &str,
            at: usize,
            _: &Context<'_>,
        ) -> rustyline::Result<(usize, Vec<String>)> {
            let typed = &line[..at];
            let (from, all): (usize, &[&str]) = match typed.strip_prefix("/set ") {
                Some(_) => ("/set ".len(), &SETTINGS),
                None => (0, &COMMANDS),
            };
            let begun = &typed[from..];
            let fits = |name: &&&str| typed.starts_with('/') && name.starts_with(begun);
            Ok((from, all.iter().filter(fits).map(|name| (*name).to_owned()).collect()))
        }
    }

    impl Validator for Typing {
        fn validate(
            &self,
            typed: &mut ValidationContext<'_>,
        ) -> rustyline::Result<ValidationResult> {
            Ok(match goes_on(typed.input()) {
                true => ValidationResult::Incomplete,
                false => ValidationResult::Valid(None),
            })
        }
    }

    /// Lines with editing, history and completion.
    pub(super) fn converse(talk: &mut Talk<'_>) -> Result<()> {
        let failed = |error: ReadlineError| Error::io("terminal", std::io::Error::other(error));
        let mut editor: Editor<Typing, DefaultHistory> = Editor::new().map_err(failed)?;
        editor.set_helper(Some(Typing));
        if talk.args.show_origin {
            tell!("green is the draft's, the rest the target's own; /help tells of commands");
        } else {
            tell!("/help tells of commands");
        }
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    if !line.trim().is_empty() {
                        let _ = editor.add_history_entry(line.as_str());
                    }
                    if !talk.take(&line) {
                        return Ok(());
                    }
                }
                Err(ReadlineError::Interrupted) => tell!("(Ctrl-D or /quit ends)"),
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// Plain lines, for a build without the feature `chat`.
#[cfg(not(feature = "chat"))]
mod terminal {
    use std::io::{self, BufRead, Write};

    use super::{Talk, goes_on};
    use crate::error::{Error, Result};

    pub(super) fn converse(talk: &mut Talk<'_>) -> Result<()> {
        let failed = |e| Error::io("terminal", e);
        let mut typed = String::new();
        loop {
            let prompt = if typed.is_empty() { "> " } else { ". " };
            let mut to = io::stderr();
            to.write_all(prompt.as_bytes()).and_then(|()| to.flush()).map_err(failed)?;
            let mut line = String::new();
            if io::stdin().lock().read_line(&mut line).map_err(failed)? == 0 {
                return Ok(());
            }
            typed.push_str(line.trim_end_matches(['\r', '\n']));
            if goes_on(&typed) {
                typed.push('\n');
            } else if !talk.take(&std::mem::take(&mut typed)) {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_join_to_turns() {
        for (typed, more) in [
            ("a", false),
            ("a\\", true),
            ("a\\\nb", false),
            ("\"\"\"a", true),
            ("\"\"\"a\nb\"\"\"", false),
        ] {
            assert_eq!(goes_on(typed), more, "{typed:?}");
        }
        assert_eq!(joined("a\\\nb"), "a\nb");
        assert_eq!(joined("\"\"\"\na\n b\n\"\"\""), "a\n b");
        assert_eq!(joined("a \"\"\"b\"\"\""), "a \"\"\"b\"\"\"");
    }
}
