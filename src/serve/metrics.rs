//! What the server counts, for Prometheus.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::pool::Outcome;
use crate::decode::Strategy;
use crate::engine::PassCounts;
use crate::session::generation::Piece;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    path: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct From {
    origin: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct By {
    strategy: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct In {
    model: &'static str,
}

/// What is counted.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Of, Counter>,
    waiting: Gauge,
    running: Gauge,
    tokens: Family<From, Counter>,
    prompt_tokens: Family<From, Counter>,
    rounds: Family<By, Counter>,
    drafted: Family<By, Counter>,
    accepted: Family<By, Counter>,
    passes: Family<In, Counter>,
    posts: Family<In, Counter>,
    rows: Family<In, Counter>,
    /// Counted where there is a meter.
    joules: Option<Counter<f64, AtomicU64>>,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    token_seconds: Histogram,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Upper bounds from `first` on, each about 2.15 times the one before: three for each power of ten.
fn seconds(first: f64, count: i32) -> Histogram {
    Histogram::new((0..count).map(move |i| {
        let exact = first * 10f64.powf(f64::from(i) / 3.0);
        // Two digits, as people write them.
        let unit = 10f64.powf(exact.log10().floor() - 1.0);
        (exact / unit).round() * unit
    }))
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new(has_meter: bool) -> Self {
        let metrics = Metrics {
            registry: Registry::default(),
            requests: Family::default(),
            waiting: Gauge::default(),
            running: Gauge::default(),
            tokens: Family::default(),
            prompt_tokens: Family::default(),
            rounds: Family::default(),
            drafted: Family::default(),
            accepted: Family::default(),
            passes: Family::default(),
            posts: Family::default(),
            rows: Family::default(),
            joules: has_meter.then(Counter::default),
            queue_seconds: seconds(0.001, 15),
            first_token_seconds: seconds(0.001, 16),
            token_seconds: seconds(0.0001, 14),
        };
        let mut r = Registry::with_prefix("mtad");
        r.register("requests", "Requests by route and status", metrics.requests.clone());
        r.register("waiting", "Generations that wait for a sequence", metrics.waiting.clone());
        r.register("running", "Generations that have a sequence", metrics.running.clone());
        r.register("tokens", "Generated tokens by who wrote them", metrics.tokens.clone());
        let what = "Tokens of prompts: evaluated, or known from earlier requests";
        r.register("prompt_tokens", what, metrics.prompt_tokens.clone());
        r.register("rounds", "Rounds of decoding by strategy", metrics.rounds.clone());
        r.register("drafted_tokens", "Drafted tokens by strategy", metrics.drafted.clone());
        r.register(
            "accepted_tokens",
            "Accepted drafted tokens by strategy",
            metrics.accepted.clone(),
        );
        r.register("passes", "Passes over a model's weights", metrics.passes.clone());
        let what = "What sequences asked of passes: more than passes where they shared some";
        r.register("pass_posts", what, metrics.posts.clone());
        r.register("pass_rows", "Rows of all passes", metrics.rows.clone());
        if let Some(joules) = &metrics.joules {
            r.register_with_unit("energy", "Energy since the start", Unit::Joules, joules.clone());
        }
        let histograms = [
            ("queue", "Time that generations waited for a sequence", &metrics.queue_seconds),
            (
                "time_to_first_token",
                "From the request to its first token",
                &metrics.first_token_seconds,
            ),
            (
                "time_per_token",
                "Time between rounds for each of their tokens",
                &metrics.token_seconds,
            ),
        ];
        for (name, what, histogram) in histograms {
            r.register_with_unit(name, what, Unit::Seconds, histogram.clone());
        }
        Metrics { registry: r, ..metrics }
    }

    /// A request was answered. Routes are those of the server, so there are few.
    pub fn answered(&self, path: &str, status: u16) {
        self.requests.get_or_create(&Of { path: path.to_owned(), status }).inc();
    }

    /// A generation waited for its sequence.
    pub fn waited(&self, time: Duration) {
        self.queue_seconds.observe(time.as_secs_f64());
    }

    /// The first tokens came so long after the request.
    pub fn first_token(&self, time: Duration) {
        self.first_token_seconds.observe(time.as_secs_f64());
    }

    /// So many tokens came so long after those before them.
    pub fn between(&self, time: Duration, tokens: usize) {
        for _ in 0..tokens {
            self.token_seconds.observe(time.as_secs_f64() / tokens as f64);
        }
    }

    /// Tokens were generated.
    pub fn tokens(&self, pieces: &[Piece]) {
        for piece in pieces.iter().filter(|piece| piece.token.is_some()) {
            let origin = piece.origin.name();
            self.tokens.get_or_create(&From { origin }).inc();
        }
    }

    /// A generation ended.
    pub fn ended(&self, outcome: &Outcome, strategy: Strategy) {
        let prompt = |origin, tokens: usize| {
            self.prompt_tokens.get_or_create(&From { origin }).inc_by(tokens as u64);
        };
        prompt("evaluated", outcome.prompt_tokens - outcome.reused);
        prompt("known", outcome.reused);
        let by = By { strategy: strategy.descriptor().name };
        self.rounds.get_or_create(&by).inc_by(outcome.statistics.rounds());
        self.drafted.get_or_create(&by).inc_by(outcome.statistics.drafted());
        self.accepted.get_or_create(&by).inc_by(outcome.statistics.accepted());
    }

    /// All of it as text, with what is known now: generations that wait and run, passes of the models, joules.
    pub fn text(
        &self,
        (waiting, running): (usize, usize),
        passes: &[(&'static str, PassCounts)],
        joules: Option<f64>,
    ) -> String {
        self.waiting.set(waiting as i64);
        self.running.set(running as i64);
        for &(model, counts) in passes {
            let set = |family: &Family<In, Counter>, count: u64| {
                family.get_or_create(&In { model }).inner().store(count, Ordering::Relaxed);
            };
            set(&self.passes, counts.passes);
            set(&self.posts, counts.posts);
            set(&self.rows, counts.rows);
        }
        if let (Some(counter), Some(joules)) = (&self.joules, joules) {
            counter.inner().store(joules.to_bits(), Ordering::Relaxed);
        }
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
