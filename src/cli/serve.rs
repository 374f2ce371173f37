//! `mtad serve`: a server with OpenAI's interface.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::console::tell;
use super::run::load_pair;
use super::{
    DeviceArgs, VocabularyArgs, interrupts, note_listener, print_line, strategies, template,
};
use crate::chat::{Chat, Template};
use crate::decode::{Settings, Strategy};
use crate::energy::{Account, Found, Sources};
use crate::engine::{CacheType, SessionOptions};
use crate::error::{Error, Result};
use crate::serve::{self, Options, Server};
use crate::session::pair::{LoadOptions, Pair};

/// How long running answers may go on after a signal.
const PATIENCE: Duration = Duration::from_secs(4);

/// Serve a pair over HTTP, with OpenAI's interface
///
/// Without --model this serves the built-in pair of small story models. Requests may choose how they are decoded:
/// strategy, tau, gamma, beam_width. The page at / is a chat that shows who wrote what; /openapi.json says what can be
/// asked for. SIGTERM and Ctrl-C let running answers end, for some seconds.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct ServeArgs {
    /// Where to listen: an address, or a name of this machine
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,

    /// The port; 0 takes one that is free
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,

    /// The target model, a GGUF file [default: the built-in pair]
    #[arg(long, short, value_name = "GGUF")]
    model: Option<PathBuf>,

    /// The draft model, a GGUF file with the target's vocabulary
    #[arg(long, short, value_name = "GGUF", requires = "model")]
    draft: Option<PathBuf>,

    /// How many answers are made at the same time; they share each pass over the weights
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,

    /// How many requests wait beyond that; further ones are told to come back (429)
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: u16,

    /// The most memory for beginnings of texts that are kept for later requests, such as 500M; 0 keeps none [default: as
    /// much as the sequences take, and no more than a quarter of what they leave]
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    prefix_memory: Option<u64>,

    /// A key that requests must bring (`Authorization: Bearer KEY`); may be given more than once. Other users of this
    /// machine see it in the list of processes: see --api-key-file
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,

    /// A file with such keys, one on each line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,

    /// Let pages of this origin, such as https://example.com, ask from a browser; * is any; may be given more than once
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,

    /// The most bytes of a request, such as 500K or 16M
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = super::bytes)]
    body_limit: u64,

    /// The chat template: a file, a further one that the model names, or one of chatml, llama2,
    /// llama3, mistral, gemma, phi3, zephyr, vicuna, alpaca, plain [default: the model's]
    #[arg(long, value_name = "FILE|NAME")]
    template: Option<String>,

    /// How tokens are chosen where a request does not say [default: mtad with a draft, sample without]
    #[arg(long, short, value_name = "NAME", value_parser = strategies())]
    strategy: Option<Strategy>,

    /// The threshold of joint decoding where a request does not say
    #[arg(long, value_name = "T", default_value_t = Settings::default().tau)]
    tau: f64,

    /// Tokens that the draft proposes per round where a request does not say
    #[arg(long, value_name = "G", default_value_t = Settings::default().gamma)]
    gamma: usize,

    /// Beams where a request does not say
    #[arg(long, value_name = "W", default_value_t = Settings::default().beam_width)]
    beam_width: usize,

    /// How keys and values are kept
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = super::cache_types())]
    cache_type: CacheType,

    /// What is logged to standard error, without texts
    #[arg(long, value_name = "LEVEL", default_value = "warn", value_parser = ["off", "error", "warn", "info", "debug"])]
    log: String,

    /// Log lines of JSON
    #[arg(long)]
    log_json: bool,

    /// Print the document of the interface (OpenAPI) and serve nothing
    #[arg(long)]
    print_openapi: bool,

    #[command(flatten)]
    vocabulary: VocabularyArgs,

    #[command(flatten)]
    device: DeviceArgs,

    /// Where the draft runs [default: where the target does]
    #[arg(long, value_name = "DEVICE")]
    draft_device: Option<String>,
}

impl ServeArgs {
    fn address(&self) -> Result<SocketAddr> {
        let found = (self.host.as_str(), self.port).to_socket_addrs().ok();
        found.and_then(|mut found| found.next()).ok_or_else(|| {
            Error::invalid(format!("--host {}: there is no such address", self.host))
        })
    }

    fn keys(&self) -> Result<Vec<String>> {
        let mut keys = self.api_key.clone();
        if let Some(file) = &self.api_key_file {
            let name = file.display().to_string();
            let text = std::fs::read_to_string(file).map_err(|e| Error::io(&name, e))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let before = keys.len();
            keys.extend(lines.map(str::to_owned));
            if keys.len() == before {
                return Err(Error::invalid(format!("{name}: there is no key in it")));
            }
        }
        match keys.iter().any(|key| key.trim().is_empty()) {
            true => Err(Error::invalid("--api-key: a key is empty")),
            false => Ok(keys),
        }
    }

    fn defaults(&self, has_draft: bool) -> Result<Settings> {
        let settings = Settings {
            strategy: self.strategy.unwrap_or_else(|| Strategy::default_for(has_draft)),
            tau: self.tau,
            gamma: self.gamma,
            beam_width: self.beam_width,
            ..Settings::default()
        };
        if settings.strategy.needs_draft() && !has_draft {
            return Err(Error::invalid(format!(
                "strategy {} needs a draft model: name one with --draft",
                settings.strategy
            )));
        }
        settings.validate()?;
        Ok(settings)
    }

    /// How conversations are put to the model. One without a template is given them as plain text, which is said.
    /// Also says whether it has one.
    fn chat(&self, pair: &Pair) -> Result<(Chat, bool)> {
        let (template, is_tuned) = match (
            &self.template,
            Template::of_file(pair.target().file(), None),
        ) {
            (None, Ok(None)) => {
                tell!(
                    "mtad: {} has no chat template; conversations are put to it as plain text (--template)",
                    pair.target().file().name()
                );
                (Template::named("plain")?, false)
            }
            _ => (template::find(self.template.as_deref(), Some(pair.target().file()))?, true),
        };
        Ok((Chat::new(template, pair.tokenizer()), is_tuned))
    }

    fn log(&self) {
        use tracing_subscriber::filter::LevelFilter;
        let level = match self.log.as_str() {
            "off" => LevelFilter::OFF,
            "error" => LevelFilter::ERROR,
            "warn" => LevelFilter::WARN,
            "info" => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        };
        let lines = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(std::io::stderr)
            .with_target(false)
            // Standard error may be gone, and that is nobody's fault.
            .log_internal_errors(false);
        // (Somebody who embeds this may have a log already.)
        let _ = match self.log_json {
            true => lines.json().try_init(),
            false => {
                lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init()
            }
        };
    }
}

pub(super) fn serve(args: &ServeArgs) -> Result<()> {
    if args.print_openapi {
        return print_line(serve::openapi());
    }
    let has_draft = args.model.is_none() || args.draft.is_some();
    let (address, keys, defaults) = (args.address()?, args.keys()?, args.defaults(has_draft)?);
    args.log();
    let options = LoadOptions {
        draft_device: args.draft_device.clone(),
        pre_tokenizer: args.vocabulary.pre_tokenizer.clone(),
        ..args.device.load_options()?
    };
    let loads = Strategy::default_for(has_draft);
    let pair = load_pair(args.model.as_deref(), args.draft.as_deref(), loads, &options)?;
    pair.on_note(note_listener());
    let (chat, is_tuned) = args.chat(&pair)?;
    if !address.ip().is_loopback() && keys.is_empty() {
        tell!(
            "mtad: warning: anybody who reaches {} may ask; --api-key asks for a key",
            shown(address.ip())
        );
    }
    let meters = Sources::default().find().meters.into_iter().filter_map(|found| match found {
        Found::Meter(meter) => Some(meter),
        Found::Unavailable { .. } => None,
    });
    let options = Options {
        address,
        parallel: usize::from(args.parallel),
        queue: usize::from(args.queue),
        session: SessionOptions { context: args.device.context(), cache_type: args.cache_type },
        is_tuned,
        prefix_memory: args.prefix_memory,
        defaults,
        keys,
        origins: args.cors_origin.clone(),
        body_limit: usize::try_from(args.body_limit).unwrap_or(usize::MAX),
        account: Account::open(meters.collect()),
    };
    let server = Server::bind(pair, chat, options)?;
    interrupts::check()?;
    // From here on a signal lets answers end.
    let _finishing = interrupts::Finishing::first();
    tell!("listening on http://{}", server.address()?);
    server.run(interrupts::asked, PATIENCE)
}

fn shown(ip: IpAddr) -> String {
    match ip.is_unspecified() {
        true => "this machine".to_owned(),
        false => ip.to_string(),
    }
}
