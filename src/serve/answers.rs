//! From what sequences tell to what clients read: whole answers, and streams of them.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::response::sse;
use futures_util::Stream;
use futures_util::stream::unfold;
use serde::Serialize;
use tokio::sync::mpsc::UnboundedReceiver;

use super::api::{
    Answer, ChatChoice, ChatLogProbs, CompletionChoice, CompletionLogProbs, Decoded, OriginToken,
    Origins, PromptDetails, Said, TokenLogProb, ToolCall, Usage,
};
use super::errors::ApiError;
use super::pool::{Event, Outcome};
use super::tools::{Reader, Style};
use crate::decode::{Statistics, Strategy};
use crate::lm::Token;
use crate::session::generation::{Piece, StopReason};
use crate::tokenizer::{TokenType, Tokenizer};

/// What all chunks of an answer have in common.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
}

/// Which of OpenAI's two shapes an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Completion,
}

impl Shape {
    /// What a chunk of it is called.
    fn chunk(self) -> &'static str {
        match self {
            Shape::Chat => "chat.completion.chunk",
            Shape::Completion => "text_completion",
        }
    }
}

/// Sets the cancel flag of a request's jobs when nobody waits for them any more.
pub(super) struct Waiting {
    pub events: UnboundedReceiver<(usize, Event)>,
    /// The flag of each job.
    pub cancel: Vec<Arc<AtomicBool>>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.cancel.iter().for_each(|cancel| cancel.store(true, Ordering::Relaxed));
    }
}

/// A request's answers, as far as they go.
pub(super) struct Answers {
    shape: Shape,
    head: Head,
    tokenizer: Tokenizer,
    strategy: Strategy,
    log_probs: bool,
    origins: bool,
    include_usage: bool,
    /// Answers to each prompt.
    per_prompt: usize,
    /// Names of control tokens that are part of the text, as calls are told by them.
    names: &'static [&'static str],
    choices: Vec<Choice>,
}

struct Choice {
    /// What stands before the text: a prompt that is echoed.
    before: String,
    reader: Reader,
    /// Characters that were told of it, with those before it.
    told: usize,
    outcome: Option<Outcome>,
}

/// What became known of one answer.
#[derive(Default)]
struct News {
    text: String,
    calls: Vec<ToolCall>,
    pieces: Vec<Piece>,
    finish_reason: Option<&'static str>,
}

/// What an answer is to look like.
pub(super) struct Look {
    pub shape: Shape,
    pub strategy: Strategy,
    pub log_probs: bool,
    pub origins: bool,
    pub include_usage: bool,
    pub per_prompt: usize,
    pub calls: Option<Style>,
    /// Of each answer, what stands before it.
    pub before: Vec<String>,
}

impl Answers {
    /// Nothing known yet.
    pub fn new(head: Head, tokenizer: Tokenizer, look: Look) -> Self {
        let choice = |before: String| Choice {
            told: before.chars().count(),
            before,
            reader: Reader::new(look.calls),
            outcome: None,
        };
        Answers {
            shape: look.shape,
            head,
            tokenizer,
            strategy: look.strategy,
            log_probs: look.log_probs,
            origins: look.origins,
            include_usage: look.include_usage,
            per_prompt: look.per_prompt,
            names: look.calls.map_or(&[], Style::names),
            choices: look.before.into_iter().map(choice).collect(),
        }
    }

    fn is_ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.outcome.is_some())
    }

    /// Takes an event and says what is new.
    fn take(&mut self, index: usize, event: Event) -> Result<News, ApiError> {
        let choice = &mut self.choices[index];
        match event {
            Event::Begun => Ok(News::default()),
            Event::Round(pieces) => {
                let mut text = String::new();
                for piece in &pieces {
                    text.push_str(&piece.text);
                    let name = piece.token.map_or("", |id| self.tokenizer.token(id));
                    let is_control = || {
                        let kind = piece.token.and_then(|id| self.tokenizer.token_type(id));
                        kind == Some(TokenType::Control)
                    };
                    if self.names.contains(&name) && is_control() {
                        text.push_str(name);
                    }
                }
                Ok(News { text: choice.reader.push(&text), pieces, ..News::default() })
            }
            Event::Ended(outcome) => {
                let (text, calls) = choice.reader.finish();
                let calls = calls.into_iter().enumerate().map(|(i, function)| ToolCall {
                    index: Some(i),
                    id: format!("call_{:016x}", super::random()),
                    kind: "function",
                    function,
                });
                let calls: Vec<ToolCall> = calls.collect();
                let finish_reason = match outcome.stop {
                    StopReason::Interrupt => return Err(ApiError::stopping()),
                    _ if !calls.is_empty() => "tool_calls",
                    StopReason::Eos | StopReason::Stop => "stop",
                    StopReason::MaxTokens | StopReason::Context => "length",
                };
                choice.outcome = Some(*outcome);
                Ok(News { text, calls, pieces: Vec::new(), finish_reason: Some(finish_reason) })
            }
            Event::Failed(error) => Err(error.into()),
        }
    }

    /// Waits for all of the answers.
    ///
    /// # Errors
    /// What the first that fails reports.
    pub async fn whole(
        mut self,
        mut waiting: Waiting,
    ) -> Result<axum::response::Response, ApiError> {
        let mut finished: Vec<News> = self.choices.iter().map(|_| News::default()).collect();
        while !self.is_ended() {
            let Some((index, event)) = waiting.events.recv().await else {
                return Err(ApiError::stopping());
            };
            let news = self.take(index, event)?;
            let so_far = &mut finished[index];
            so_far.text.push_str(&news.text);
            so_far.calls.extend(news.calls);
            so_far.finish_reason = so_far.finish_reason.or(news.finish_reason);
            if self.log_probs || self.origins {
                so_far.pieces.extend(news.pieces);
            }
        }
        let usage = Some(self.usage());
        let origins = self.origins.then(|| {
            let pieces = finished.iter().flat_map(|news| &news.pieces);
            Origins { tokens: pieces.filter_map(|piece| self.origin_of(piece)).collect() }
        });
        let response = match self.shape {
            Shape::Chat => {
                let choices = finished.into_iter().enumerate().map(|(index, mut news)| {
                    news.calls.iter_mut().for_each(|call| call.index = None);
                    let logprobs = self.log_probs.then(|| self.chat_log_probs(&news.pieces));
                    let said = news.text;
                    // Who calls says nothing, unless they did.
                    let content = (!said.is_empty() || news.calls.is_empty()).then_some(said);
                    let message = Said {
                        role: Some("assistant"),
                        content: Some(content),
                        tool_calls: news.calls,
                    };
                    let finish_reason = news.finish_reason;
                    ChatChoice {
                        index,
                        message: Some(message),
                        delta: None,
                        logprobs,
                        finish_reason,
                    }
                });
                json(&self.answer("chat.completion", choices.collect(), usage, origins))
            }
            Shape::Completion => {
                let choices = finished.into_iter().enumerate().map(|(index, news)| {
                    let Choice { before, told, .. } = &self.choices[index];
                    let logprobs = self.log_probs.then(|| self.log_probs_of(&news.pieces, *told));
                    let text = format!("{before}{}", news.text);
                    CompletionChoice { index, text, logprobs, finish_reason: news.finish_reason }
                });
                json(&self.answer("text_completion", choices.collect(), usage, origins))
            }
        };
        Ok(response)
    }

    /// The answers as they come: chunks, and `[DONE]`. `first` is an event that was received already.
    pub fn stream(
        self,
        first: Option<(usize, Event)>,
        waiting: Waiting,
    ) -> impl Stream<Item = Result<sse::Event, Infallible>> {
        struct State {
            answers: Answers,
            first: Option<(usize, Event)>,
            waiting: Option<Waiting>,
            ready: VecDeque<sse::Event>,
        }
        let mut ready = VecDeque::new();
        self.open(&mut ready);
        let state = State { answers: self, first, waiting: Some(waiting), ready };
        unfold(state, |mut state| async move {
            loop {
                if let Some(event) = state.ready.pop_front() {
                    return Some((Ok(event), state));
                }
                let waiting = state.waiting.as_mut()?;
                let event = match state.first.take() {
                    Some(first) => Some(first),
                    None => waiting.events.recv().await,
                };
                let told = match event {
                    Some((index, event)) => state.answers.tell(index, event, &mut state.ready),
                    None => Err(ApiError::stopping()),
                };
                let is_over = match told {
                    Ok(()) => state.answers.is_ended(),
                    Err(error) => {
                        state.ready.push_back(data(&error.body()));
                        true
                    }
                };
                if is_over {
                    state.waiting = None;
                    state.ready.push_back(sse::Event::default().data("[DONE]"));
                }
            }
        })
    }

    /// What a stream begins with.
    fn open(&self, ready: &mut VecDeque<sse::Event>) {
        for (index, choice) in self.choices.iter().enumerate() {
            match self.shape {
                Shape::Chat => {
                    let content = Some(Some(String::new()));
                    let delta = Said { role: Some("assistant"), content, ..Said::default() };
                    ready.push_back(self.chat_chunk(index, delta, &News::default()));
                }
                Shape::Completion if !choice.before.is_empty() => {
                    let news = News { text: choice.before.clone(), ..News::default() };
                    ready.push_back(self.completion_chunk(index, &news));
                }
                Shape::Completion => {}
            }
        }
    }

    fn tell(
        &mut self,
        index: usize,
        event: Event,
        ready: &mut VecDeque<sse::Event>,
    ) -> Result<(), ApiError> {
        let mut news = self.take(index, event)?;
        let has_news = !news.text.is_empty() || !news.pieces.is_empty() || !news.calls.is_empty();
        let finish = news.finish_reason.take();
        if has_news {
            ready.push_back(self.chunk(index, &mut news));
        }
        if finish.is_some() {
            let mut last = News { finish_reason: finish, ..News::default() };
            ready.push_back(self.chunk(index, &mut last));
            if self.include_usage && self.is_ended() {
                let (object, usage) = (self.shape.chunk(), Some(self.usage()));
                ready.push_back(data(&self.answer::<()>(object, Vec::new(), usage, None)));
            }
        }
        Ok(())
    }

    fn chunk(&mut self, index: usize, news: &mut News) -> sse::Event {
        let chunk = match self.shape {
            Shape::Chat => {
                let content = (!news.text.is_empty()).then(|| Some(news.text.clone()));
                let tool_calls = std::mem::take(&mut news.calls);
                let delta = Said { role: None, content, tool_calls };
                self.chat_chunk(index, delta, news)
            }
            Shape::Completion => self.completion_chunk(index, news),
        };
        self.choices[index].told += news.text.chars().count();
        chunk
    }

    fn chat_chunk(&self, index: usize, delta: Said, news: &News) -> sse::Event {
        let logprobs =
            (self.log_probs && !news.pieces.is_empty()).then(|| self.chat_log_probs(&news.pieces));
        let finish_reason = news.finish_reason;
        let choice =
            ChatChoice { index, message: None, delta: Some(delta), logprobs, finish_reason };
        data(&self.answer(self.shape.chunk(), vec![choice], None, self.origins_of(news)))
    }

    fn completion_chunk(&self, index: usize, news: &News) -> sse::Event {
        let logprobs = (self.log_probs && !news.pieces.is_empty())
            .then(|| self.log_probs_of(&news.pieces, self.choices[index].told));
        let (text, finish_reason) = (news.text.clone(), news.finish_reason);
        let choice = CompletionChoice { index, text, logprobs, finish_reason };
        data(&self.answer(self.shape.chunk(), vec![choice], None, self.origins_of(news)))
    }

    fn answer<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Usage>,
        mtad: Option<Origins>,
    ) -> Answer<C> {
        let Head { id, created, model, fingerprint } = self.head.clone();
        Answer { id, object, created, model, system_fingerprint: fingerprint, choices, usage, mtad }
    }

    fn usage(&self) -> Usage {
        let outcomes: Vec<&Outcome> =
            self.choices.iter().filter_map(|choice| choice.outcome.as_ref()).collect();
        let mut statistics = Statistics::default();
        outcomes.iter().for_each(|outcome| statistics.merge(&outcome.statistics));
        // A prompt with several answers is one.
        let prompts = || outcomes.iter().step_by(self.per_prompt);
        let prompt_tokens = prompts().map(|outcome| outcome.prompt_tokens).sum();
        let cached_tokens = prompts().map(|outcome| outcome.reused).sum();
        let completion_tokens = outcomes.iter().map(|outcome| outcome.tokens).sum();
        let seconds = outcomes.iter().map(|outcome| outcome.seconds).fold(0.0, f64::max);
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
            mtad: Decoded {
                strategy: self.strategy.to_string(),
                rounds: statistics.rounds(),
                drafted: statistics.drafted(),
                accepted: statistics.accepted(),
                block_efficiency: statistics.block_efficiency(),
                tokens_per_second: (seconds > 0.0).then(|| completion_tokens as f64 / seconds),
                joules: outcomes.iter().map(|outcome| outcome.joules).sum(),
            },
        }
    }

    fn origins_of(&self, news: &News) -> Option<Origins> {
        let tokens = || news.pieces.iter().filter_map(|piece| self.origin_of(piece)).collect();
        (self.origins && !news.pieces.is_empty()).then(|| Origins { tokens: tokens() })
    }

    fn origin_of(&self, piece: &Piece) -> Option<OriginToken> {
        let &Piece { token, log_prob, log_ratio, .. } = piece;
        let origin = piece.origin.name();
        Some(OriginToken { id: token?, text: piece.text.clone(), origin, log_prob, log_ratio })
    }

    fn text_of(&self, token: Token) -> (String, Vec<u8>) {
        let bytes = self.tokenizer.piece(token);
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }

    fn chat_log_probs(&self, pieces: &[Piece]) -> ChatLogProbs {
        let entry = |token: Token, logprob: f64, top_logprobs| {
            let (token, bytes) = self.text_of(token);
            TokenLogProb { token, logprob, bytes, top_logprobs }
        };
        let content = pieces.iter().filter_map(|piece| {
            let (token, logprob) = (piece.token?, piece.log_prob?);
            let top = piece.alternatives.iter().map(|&(token, p)| entry(token, p, None)).collect();
            Some(entry(token, logprob, Some(top)))
        });
        ChatLogProbs { content: content.collect() }
    }

    /// `offset` is where the first token's text begins.
    fn log_probs_of(&self, pieces: &[Piece], mut offset: usize) -> CompletionLogProbs {
        let mut told = CompletionLogProbs::default();
        for piece in pieces {
            if let (Some(token), Some(log_prob)) = (piece.token, piece.log_prob) {
                told.tokens.push(self.text_of(token).0);
                told.token_logprobs.push(log_prob);
                let top = piece.alternatives.iter().map(|&(token, p)| (self.text_of(token).0, p));
                told.top_logprobs.push(top.collect::<BTreeMap<_, _>>());
                told.text_offset.push(offset);
            }
            offset += piece.text.chars().count();
        }
        told
    }
}

fn json(body: &impl Serialize) -> axum::response::Response {
    axum::response::IntoResponse::into_response(axum::Json(body))
}

/// An event of a stream.
fn data(body: &impl Serialize) -> sse::Event {
    // Texts and numbers are always JSON.
    sse::Event::default().json_data(body).unwrap_or_default()
}
