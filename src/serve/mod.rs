//! A server that many programs and people use at once: OpenAI's interface over HTTP, with joint decoding behind it.
//!
//! A request becomes jobs (`request`), which sequences answer that share each pass over the weights (`pool`). What
//! these tell becomes answers and streams (`answers`); `routes` has what can be asked for, `http` the connections.
//! What a request is answered does not depend on what runs beside it: sequences share passes, and passes do not mix
//! rows.

mod answers;
mod api;
mod errors;
mod http;
mod metrics;
mod page;
mod pool;
mod prefixes;
mod request;
mod routes;
mod tools;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::chat::Chat;
use crate::decode::Settings;
use crate::energy::Account;
use crate::engine::SessionOptions;
use crate::error::{Error, Result};
use crate::session::pair::Pair;

use metrics::Metrics;
use pool::{Pool, Sizes};

/// How a server serves.
pub struct Options {
    /// Where it listens. Port 0 is any that is free.
    pub address: SocketAddr,
    /// How many answers are made at the same time.
    pub parallel: usize,
    /// How many wait beyond that; more are refused.
    pub queue: usize,
    /// How each of them keeps its rows. [`SessionOptions::context`] is that of one answer with its prompt.
    pub session: SessionOptions,
    /// The most bytes that beginnings of texts take which are kept for later requests; `None` for as many as the
    /// sequences take, but no more than a quarter of what these leave.
    pub prefix_memory: Option<u64>,
    /// Whether the model was tuned to answer: it has a chat template of its own, or the user named one.
    pub is_tuned: bool,
    /// What requests do not say.
    pub defaults: Settings,
    /// One of these must come with a request, if there are any.
    pub keys: Vec<String>,
    /// Pages of these origins may ask from a browser; `*` is all.
    pub origins: Vec<String>,
    /// The most bytes of a request's body.
    pub body_limit: usize,
    /// Meters of energy, by which joules are told.
    pub account: Option<Account>,
}

/// A server that listens, and has not answered yet.
pub struct Server {
    listener: TcpListener,
    state: Arc<State>,
}

/// What all requests share.
struct State {
    pair: Pair,
    /// How conversations are put to the model.
    chat: Chat,
    is_tuned: bool,
    pool: Pool,
    metrics: Arc<Metrics>,
    defaults: Settings,
    context: usize,
    keys: Vec<String>,
    origins: Vec<String>,
    body_limit: usize,
    /// Whether only names of this machine are taken for the host.
    is_local: bool,
    /// The model's name.
    name: String,
    fingerprint: String,
    created: u64,
}

impl Server {
    /// Makes room for the answers and listens. Conversations are put to the model by `chat`.
    ///
    /// # Errors
    /// The address is taken; as [`Pair::session`].
    pub fn bind(pair: Pair, chat: Chat, options: Options) -> Result<Self> {
        let at = |e| Error::io(options.address.to_string(), e);
        let listener = TcpListener::bind(options.address).map_err(at)?;
        listener.set_nonblocking(true).map_err(at)?;
        let metrics = Arc::new(Metrics::new(options.account.is_some()));
        let session = SessionOptions {
            context: Some(pair.context_for(&options.session, options.parallel)),
            ..options.session
        };
        let sizes = Sizes {
            parallel: options.parallel,
            queue: options.queue,
            prefix_memory: options.prefix_memory,
        };
        let pool = Pool::new(&pair, session, sizes, options.account, metrics.clone())?;
        let name = model_name(pair.target().file().name());
        let digest = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
        let state = State {
            chat,
            is_tuned: options.is_tuned,
            pool,
            metrics,
            defaults: options.defaults,
            context: session.context.unwrap_or(usize::MAX),
            is_local: options.address.ip().is_loopback() && options.keys.is_empty(),
            keys: options.keys,
            origins: options.origins,
            body_limit: options.body_limit,
            fingerprint: format!("mtad-{}-{:08x}", env!("CARGO_PKG_VERSION"), digest as u32),
            name,
            created: now(),
            pair,
        };
        Ok(Server { listener, state: Arc::new(state) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system reports.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(|e| Error::io("a socket", e))
    }

    /// Answers until `is_stopped`. Then what runs may end within `patience`, and is cut.
    ///
    /// # Errors
    /// The system has no threads.
    pub fn run(self, is_stopped: impl Fn() -> bool, patience: Duration) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("mtad http")
            .enable_all()
            .build()
            .map_err(|e| Error::io("threads", e))?;
        let served = runtime.block_on(http::serve(self.listener, self.state, is_stopped, patience));
        // Nothing that is left has anybody who waits for it.
        runtime.shutdown_background();
        served
    }
}

/// The document of the interface, in OpenAPI's form.
pub fn openapi() -> String {
    routes::openapi()
}

/// A model's name as clients say it: its file's, without the ending.
fn model_name(file: &str) -> String {
    let name = file.rsplit(['/', '\\']).next().unwrap_or(file);
    name.strip_suffix(".gguf").unwrap_or(name).to_owned()
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A number that nobody has seen, for names of answers. It is no secret.
fn random() -> u64 {
    // Each state has keys of its own, which come from the system.
    RandomState::new().build_hasher().finish()
}
