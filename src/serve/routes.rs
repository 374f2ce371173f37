//! What can be asked for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::to_bytes;
use axum::extract::{MatchedPath, Request, State as Shared};
use axum::http::header::{
    AUTHORIZATION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response, Sse, sse};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use subtle::ConstantTimeEq;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::timeout;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{Any, CorsLayer};
use utoipa::OpenApi;

use super::answers::{Answers, Head, Look, Shape, Waiting};
use super::api::{
    Answer, ChatChoice, ChatOwn, ChatRequest, CompletionChoice, CompletionOwn, CompletionRequest,
    DetokenizeRequest, Detokenized, EmbeddingRequest, Health, ModelEntry, ModelList, Options,
    PairEntry, StrategyEntry, TokenizeRequest, Tokenized,
};
use super::errors::{ApiError, ErrorBody};
use super::pool::{Job, Refused};
use super::request::{Terms, Wanted};
use super::{State, now, random};
use crate::decode::{Knob, Strategy};
use crate::tokenizer::EncodeOptions;

/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// A stream begins after so long, whether its prompt is evaluated or not: until then an error is a status.
const STREAM_BEGINS: Duration = Duration::from_secs(5);
/// How often a stream without news says that it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// All of it.
pub(super) fn router(state: Arc<State>) -> Router {
    let keyed = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/metrics", get(metrics))
        .route_layer(from_fn_with_state(state.clone(), check_key));
    let open = Router::new().route("/health", get(health)).route("/openapi.json", get(document));
    let all = keyed.merge(open).merge(super::page::router());
    let all = all
        .fallback(nowhere)
        .method_not_allowed_fallback(not_so)
        .layer(from_fn_with_state(state.clone(), check_host))
        .layer(CatchPanicLayer::custom(panicked));
    let all = match cors(&state.origins) {
        Some(cors) => all.layer(cors),
        None => all,
    };
    all.layer(from_fn_with_state(state.clone(), log)).with_state(state)
}

/// Lets pages of these origins ask.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([AUTHORIZATION, CONTENT_TYPE]);
    Some(match origins.iter().any(|origin| origin == "*") {
        true => layer.allow_origin(Any),
        false => layer.allow_origin(
            origins
                .iter()
                .filter_map(|origin| HeaderValue::from_str(origin).ok())
                .collect::<Vec<_>>(),
        ),
    })
}

/// Counts a request, and has it in the log, without its text.
async fn log(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    // Paths that there are not are no route of ours, and there is no end of them.
    let route = route.as_deref().unwrap_or("other");
    state.metrics.answered(route, status);
    let seconds = begun.elapsed().as_secs_f64();
    tracing::info!(%method, route, status, seconds, "request");
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
    );
    response
}

/// Refuses requests without one of the keys.
async fn check_key(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    if state.keys.is_empty() {
        return next.run(request).await;
    }
    let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some(given) = given.and_then(|value| value.strip_prefix("Bearer ")) else {
        let what = "a key is needed: send the header `Authorization: Bearer KEY`";
        return ApiError::unauthorized(what).into_response();
    };
    // All of them are compared, each in time that does not depend on where it differs.
    let is_right = state.keys.iter().fold(false, |found, key| {
        found | bool::from(key.as_bytes().ct_eq(given.trim().as_bytes()))
    });
    match is_right {
        true => next.run(request).await,
        false => ApiError::unauthorized("the key is not one of this server's").into_response(),
    }
}

/// Refuses requests for another host than this machine, where no key is asked for: a page of the internet may have
/// its own name lead here, and then ask what it wants.
async fn check_host(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).map(|host| host.to_str().unwrap_or("?"));
    match host {
        Some(host) if state.is_local && !is_this_machine(host) => {
            let what = format!(
                "this server answers for this machine alone, not for {host:?}; to have it answer for \
                 others, start it with a key"
            );
            ApiError::with_status(StatusCode::FORBIDDEN, what).into_response()
        }
        _ => next.run(request).await,
    }
}

/// Whether a host, perhaps with a port, is a name of this machine that nobody else can give.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let is_loopback = name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    is_loopback || name.eq_ignore_ascii_case("localhost")
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let what = crate::error::words_of(&*panic).to_owned();
    tracing::error!(what, "a handler panicked");
    let what = "this server made a mistake; its log says more";
    ApiError::with_status(StatusCode::INTERNAL_SERVER_ERROR, what).into_response()
}

async fn nowhere(request: Request) -> ApiError {
    let what = format!("there is no {}; /openapi.json says what there is", request.uri().path());
    ApiError::not_found("not_found", what)
}

async fn not_so(request: Request) -> ApiError {
    let what = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, what)
}

/// A body that is JSON.
async fn body(state: &State, request: Request) -> Result<Vec<u8>, ApiError> {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_json = kind.is_some_and(|kind| {
        let kind = kind.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("application/json")
    });
    // (What a page can send without asking has another type.)
    if !is_json {
        let what = format!(
            "the body must be JSON, with the header `Content-Type: application/json`, not {}",
            kind.unwrap_or("without a type")
        );
        return Err(ApiError::with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, what));
    }
    let too_large = || {
        let what = format!("the body is larger than {} bytes", state.body_limit);
        ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, what)
    };
    if let Some(length) = request.headers().get(axum::http::header::CONTENT_LENGTH)
        && length
            .to_str()
            .ok()
            .and_then(|n| n.parse::<u64>().ok())
            .is_some_and(|n| n > state.body_limit as u64)
    {
        return Err(too_large());
    }
    match timeout(BODY_TIMEOUT, to_bytes(request.into_body(), state.body_limit)).await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(error)) => {
            let text = error.to_string();
            // (The limit's error has no type of its own here.)
            Err(match text.contains("limit") {
                true => too_large(),
                false => ApiError::invalid(None, format!("the body did not come: {text}")),
            })
        }
        Err(_) => {
            let what = format!("the body took longer than {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::with_status(StatusCode::REQUEST_TIMEOUT, what))
        }
    }
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // A structure may also be read from an array of its members, in their order, which nobody is told.
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        let what =
            "the body is not what was expected: invalid type: an array, where an object is needed";
        return Err(ApiError::invalid(None, what));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let read = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let what = error.into_inner();
        let named = path.chars().any(char::is_alphanumeric);
        let message = match named {
            true => format!("{path}: {what}"),
            false => format!("the body is not what was expected: {what}"),
        };
        ApiError { param: named.then_some(path), ..ApiError::invalid(None, message) }
    })?;
    deserializer.end().map_err(|error| {
        ApiError::invalid(None, format!("the body goes on after its end: {error}"))
    })?;
    Ok(read)
}

/// Work that takes its time, where nobody else waits for it.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(ApiError::stopping()))
}

impl State {
    fn terms(&self) -> Terms<'_> {
        Terms {
            pair: &self.pair,
            defaults: &self.defaults,
            context: self.context,
            most_jobs: self.pool.most_jobs(),
        }
    }

    fn entry(&self) -> ModelEntry {
        let knob = |knob: &Knob| match knob {
            Knob::Tau => Some("tau"),
            Knob::Gamma => Some("gamma"),
            Knob::BeamWidth => Some("beam_width"),
            _ => None,
        };
        let strategies = Strategy::ALL.iter().map(|(strategy, name)| {
            let descriptor = strategy.descriptor();
            StrategyEntry {
                name,
                summary: descriptor.summary,
                needs_draft: descriptor.needs_draft,
                knobs: descriptor.knobs.iter().filter_map(knob).collect(),
            }
        });
        let has_draft = self.pair.draft().is_some();
        ModelEntry {
            id: self.name.clone(),
            object: "model",
            created: self.created,
            owned_by: "mtad",
            mtad: PairEntry {
                draft: self.pair.draft().map(|draft| super::model_name(draft.file().name())),
                chat: self.is_tuned,
                context: self.context,
                default_strategy: self.defaults.strategy.to_string(),
                strategies: strategies.filter(|s| has_draft || !s.needs_draft).collect(),
            },
        }
    }
}

/// Has sequences answer, and answers.
async fn answer(
    state: Arc<State>,
    shape: Shape,
    wanted: Wanted,
    echo: Vec<String>,
) -> Result<Response, ApiError> {
    let Wanted { prompts, request, answers, stream, include_usage, log_probs, origins, calls } =
        wanted;
    let (events, received) = unbounded_channel();
    let mut jobs = Vec::new();
    let mut before = Vec::new();
    for (which, prompt) in prompts.into_iter().enumerate() {
        for i in 0..answers {
            let mut request = request.clone();
            request.settings.seed = request.settings.seed.wrapping_add(i as u64);
            // Each has its own flag, as one that has ended does not stop the others.
            request.cancel = Arc::default();
            let index = jobs.len();
            jobs.push(Job { prompt: prompt.clone(), request, index, events: events.clone() });
            before.push(echo.get(which).cloned().unwrap_or_default());
        }
    }
    drop(events);
    let flags = jobs.iter().map(|job| job.request.cancel.clone()).collect();
    let mut waiting = Waiting { events: received, cancel: flags };
    state.pool.submit(jobs).map_err(|refused| match refused {
        Refused::Full { retry_after } => ApiError::busy(retry_after),
        Refused::Stopping => ApiError::stopping(),
    })?;
    let prefix = match shape {
        Shape::Chat => "chatcmpl",
        Shape::Completion => "cmpl",
    };
    let head = Head {
        id: format!("{prefix}-{:016x}{:016x}", random(), random()),
        created: now(),
        model: state.name.clone(),
        fingerprint: state.fingerprint.clone(),
    };
    let look = Look {
        shape,
        strategy: request.settings.strategy,
        log_probs,
        origins,
        include_usage,
        per_prompt: answers,
        calls,
        before,
    };
    let answers = Answers::new(head, state.pair.tokenizer().clone(), look);
    if !stream {
        return answers.whole(waiting).await;
    }
    // What fails before anything was told is told by the status.
    let first = timeout(STREAM_BEGINS, waiting.events.recv()).await;
    let first = match first {
        Ok(Some((_, super::pool::Event::Failed(error)))) => return Err(error.into()),
        Ok(None) => return Err(ApiError::stopping()),
        Ok(Some(event)) => Some(event),
        Err(_) => None,
    };
    let events = answers.stream(first, waiting);
    let keep_alive = sse::KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // Proxies are not to gather what is read along.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Answer a conversation
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, responses(
    (status = 200, description = "The answer, or with stream: true server-sent events of chunks", content(
        (Answer<ChatChoice> = "application/json"), (String = "text/event-stream"))),
    (status = "4XX", description = "What is wrong with the request", body = ErrorBody),
    (status = 503, description = "The server is stopping", body = ErrorBody),
))]
async fn chat(Shared(state): Shared<Arc<State>>, request: Request) -> Result<Response, ApiError> {
    let bytes = body(&state, request).await?;
    let with = state.clone();
    let wanted = apart(move || {
        let own: ChatOwn = read(&bytes)?;
        let options: Options = read(&bytes)?;
        with.terms().chat(&own, &options, &with.chat)
    });
    answer(state, Shape::Chat, wanted.await?, Vec::new()).await
}

/// Go on with a text
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, responses(
    (status = 200, description = "What follows, or with stream: true server-sent events of chunks", content(
        (Answer<CompletionChoice> = "application/json"), (String = "text/event-stream"))),
    (status = "4XX", description = "What is wrong with the request", body = ErrorBody),
    (status = 503, description = "The server is stopping", body = ErrorBody),
))]
async fn completions(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Response, ApiError> {
    let bytes = body(&state, request).await?;
    let with = state.clone();
    let wanted = apart(move || {
        let own: CompletionOwn = read(&bytes)?;
        let wanted = with.terms().completion(&own, &read(&bytes)?)?;
        let echo = match own.echo {
            Some(true) => wanted.prompts.iter().map(|p| with.pair.tokenizer().decode(p)).collect(),
            _ => Vec::new(),
        };
        Ok((wanted, echo))
    });
    let (wanted, echo) = wanted.await?;
    answer(state, Shape::Completion, wanted, echo).await
}

/// Embeddings, which a model that writes text does not have
#[utoipa::path(post, path = "/v1/embeddings", request_body = EmbeddingRequest, responses(
    (status = "4XX", description = "Why there are none", body = ErrorBody),
))]
async fn embeddings(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Response, ApiError> {
    let _: EmbeddingRequest = read(&body(&state, request).await?)?;
    let what = format!(
        "{} was trained to write text, not to embed it; ask a server with a model for embeddings",
        state.name
    );
    Err(ApiError::not_found("no_embeddings", what))
}

/// Text to tokens
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = Tokenized),
    (status = "4XX", description = "What is wrong with the request", body = ErrorBody),
))]
async fn tokenize(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Json<Tokenized>, ApiError> {
    let asked: TokenizeRequest = read(&body(&state, request).await?)?;
    let with = state.clone();
    let tokenized = apart(move || {
        let tokenizer = with.pair.tokenizer();
        let options = EncodeOptions {
            bos: asked.add_special.unwrap_or(false) && tokenizer.add_bos(),
            special: asked.parse_special.unwrap_or(false),
        };
        let tokens = tokenizer.encode(&asked.content, options);
        let piece = |&id: &u32| String::from_utf8_lossy(&tokenizer.piece(id)).into_owned();
        let pieces = asked.with_pieces.unwrap_or(false).then(|| tokens.iter().map(piece).collect());
        Ok(Tokenized { tokens, pieces })
    });
    tokenized.await.map(Json)
}

/// Tokens to text
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = Detokenized),
    (status = "4XX", description = "What is wrong with the request", body = ErrorBody),
))]
async fn detokenize(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Json<Detokenized>, ApiError> {
    let asked: DetokenizeRequest = read(&body(&state, request).await?)?;
    state.terms().check_tokens(&asked.tokens, "tokens")?;
    let with = state.clone();
    apart(move || Ok(Detokenized { content: with.pair.tokenizer().decode(&asked.tokens) }))
        .await
        .map(Json)
}

/// The pair that answers
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, description = "The one pair", body = ModelList),
    (status = "4XX", description = "Why not", body = ErrorBody),
))]
async fn models(Shared(state): Shared<Arc<State>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![state.entry()] })
}

/// The pair that answers, by its name
#[utoipa::path(get, path = "/v1/models/{model}",
    params(("model" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The pair", body = ModelEntry),
        (status = "4XX", description = "There is no such pair, or why not", body = ErrorBody),
    ))]
async fn model(
    Shared(state): Shared<Arc<State>>,
    axum::extract::Path(model): axum::extract::Path<String>,
) -> Result<Json<ModelEntry>, ApiError> {
    match model == state.name {
        true => Ok(Json(state.entry())),
        false => {
            let what = format!("there is no model {model:?} here; there is {:?}", state.name);
            Err(ApiError::not_found("model_not_found", what))
        }
    }
}

/// Whether the server is up
#[utoipa::path(get, path = "/health", responses(
    (status = 200, description = "It is", body = Health),
    (status = "4XX", description = "Who asks means another host", body = ErrorBody),
))]
async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// What the server counts, for Prometheus
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, description = "Metrics in OpenMetrics' text form", body = String,
        content_type = "application/openmetrics-text"),
    (status = "4XX", description = "Why not", body = ErrorBody),
))]
async fn metrics(Shared(state): Shared<Arc<State>>) -> Response {
    let mut passes = vec![("target", state.pair.target().pass_counts())];
    passes.extend(state.pair.draft().map(|draft| ("draft", draft.pass_counts())));
    let text = state.metrics.text(state.pool.load(), &passes, state.pool.joules());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], text).into_response()
}

async fn document() -> Response {
    ([(CONTENT_TYPE, "application/json")], openapi()).into_response()
}

/// Local pairs of models over HTTP, decoded jointly
#[derive(OpenApi)]
#[openapi(
    paths(chat, completions, embeddings, tokenize, detokenize, models, model, health, metrics),
    info(title = "mtad", license(name = "MIT", identifier = "MIT"))
)]
struct Document;

/// The document of the interface.
pub(super) fn openapi() -> String {
    Document::openapi().to_json().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        for name in
            ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "[::1]:8080", "[::1]"]
        {
            assert!(is_this_machine(name), "{name}");
        }
        for name in
            ["example.com", "example.com:80", "localhost.example.com", "10.0.0.1", "", "[::2]"]
        {
            assert!(!is_this_machine(name), "{name}");
        }
    }
}
