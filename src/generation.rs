//! Sessions and generations: text in, text out, token by token.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::decode::{Decisions, Decoding, Listener, Models, Phase, Prefill, Settings, Statistics};
use crate::error::{Error, Result};
use crate::model::SessionOptions;
use crate::model::lm::{Lm, Token};
use crate::pair::Pair;
use crate::tokenizer::{EncodeOptions, StreamDecoder, Tokenizer};

/// One conversation with a pair: caches, and the text that they hold.
///
/// A new prompt keeps what it shares with the last text.
pub struct Session {
    tokenizer: Tokenizer,
    target: Box<dyn Lm>,
    draft: Option<Box<dyn Lm>>,
    decoding: Option<Decoding>,
    /// For the decoding that the first prompt makes.
    listener: Option<Listener>,
}

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The algorithm, and how tokens are chosen.
    pub settings: Settings,
    /// The most tokens; `None` goes on until the text or the context ends.
    pub max_tokens: Option<usize>,
    /// Texts that end the generation; they are not part of it.
    pub stop: Vec<String>,
    /// Whether names of control tokens in the prompt are taken for those tokens.
    pub special: bool,
    /// Set it from anywhere to stop.
    pub cancel: Arc<AtomicBool>,
}

impl Default for Request {
    fn default() -> Self {
        Request {
            settings: Settings::default(),
            max_tokens: Some(256),
            stop: Vec::new(),
            special: false,
            cancel: Arc::default(),
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// As many tokens as were asked for.
    MaxTokens,
    /// The model ended its text.
    Eos,
    /// A stop text appeared.
    Stop,
    /// It was cancelled.
    Interrupt,
    /// The context is full.
    Context,
}

impl StopReason {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            StopReason::MaxTokens => "max_tokens",
            StopReason::Eos => "eos",
            StopReason::Stop => "stop",
            StopReason::Interrupt => "interrupt",
            StopReason::Context => "context",
        }
    }
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The text that is complete with it; empty in the middle of a character, or while it might
    /// be the start of a stop text.
    pub text: String,
    /// The token; `None` for text that was held back and is let go at the end.
    pub token: Option<Token>,
    /// Whether the draft proposed it (and the target accepted it).
    pub drafted: bool,
    /// Its log-probability under the unwarped target, if scores were asked for.
    pub log_prob: Option<f64>,
}

impl Session {
    pub(crate) fn new(pair: &Pair, options: &SessionOptions) -> Self {
        Session {
            tokenizer: pair.tokenizer().clone(),
            target: pair.target().session(options),
            draft: pair.draft().map(|draft| draft.session(options)),
            decoding: None,
            listener: None,
        }
    }

    /// The most tokens that prompt and text may have together.
    pub fn capacity(&self) -> usize {
        self.target.capacity()
    }

    /// Has each change of phase told to `listener`, from the next prompt on.
    pub fn listen(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    /// Starts to generate after a prompt.
    ///
    /// # Errors
    /// Settings outside their ranges; a prompt that is empty or longer than the context; what
    /// the models report.
    pub fn generate(&mut self, prompt: &str, request: &Request) -> Result<Generation<'_>> {
        let options = EncodeOptions { bos: self.tokenizer.add_bos(), special: request.special };
        let tokens = self.tokenizer.encode(prompt, options);
        self.generate_from(&tokens, request)
    }

    /// Starts to generate after tokens, which are taken as they are.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn generate_from(&mut self, prompt: &[Token], request: &Request) -> Result<Generation<'_>> {
        match &mut self.decoding {
            Some(decoding) => decoding.configure(request.settings.clone())?,
            None => self.decoding = Some(Decoding::new(request.settings.clone())?),
        }
        if let (Some(decoding), Some(listener)) = (&mut self.decoding, self.listener.take()) {
            decoding.timeline_mut().listen(Some(listener));
        }
        let decoder = self.tokenizer.continuation();
        let mut generation = Generation {
            decoder,
            request: request.clone(),
            prefill: Prefill { reused: 0, evaluated: 0 },
            prompt_tokens: prompt.len(),
            ready: VecDeque::new(),
            held: String::new(),
            stopped: None,
            failed: false,
            session: self,
        };
        generation.prefill = generation.with(|decoding, models| decoding.start(models, prompt))?;
        Ok(generation)
    }
}

/// A generation under way: an iterator over its tokens.
///
/// Dropping it stops it; the session stays usable.
pub struct Generation<'s> {
    session: &'s mut Session,
    request: Request,
    decoder: StreamDecoder,
    prefill: Prefill,
    prompt_tokens: usize,
    /// Tokens of the last block that were not handed out yet.
    ready: VecDeque<Piece>,
    /// Text that might be the start of a stop text.
    held: String,
    stopped: Option<StopReason>,
    failed: bool,
}

impl Generation<'_> {
    fn with<R>(
        &mut self,
        f: impl FnOnce(&mut Decoding, &mut Models<'_>) -> Result<R>,
    ) -> Result<R> {
        let Session { target, draft, decoding, .. } = &mut *self.session;
        let decoding = decoding.as_mut().expect("a generation has a decoding");
        let mut models = match draft {
            Some(draft) => Models::pair(&mut **target, &mut **draft),
            None => Models::alone(&mut **target),
        };
        f(decoding, &mut models)
    }

    fn decoding(&self) -> &Decoding {
        self.session.decoding.as_ref().expect("a generation has a decoding")
    }

    /// Why it ended; `None` while it goes on.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.stopped.filter(|_| self.ready.is_empty())
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// What evaluating the prompt took.
    pub fn prefill(&self) -> Prefill {
        self.prefill
    }

    /// The generated tokens, those included that were not handed out yet.
    pub fn tokens(&self) -> &[Token] {
        self.decoding().generated()
    }

    /// Log-probabilities of the tokens under the unwarped target, if they were asked for.
    pub fn scores(&self) -> &[f64] {
        self.decoding().scores()
    }

    /// exp(-mean log-probability) of the generated tokens under the unwarped target.
    pub fn perplexity(&self) -> Option<f64> {
        let scores = self.scores();
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        (!scores.is_empty()).then(|| (-mean).exp())
    }

    /// Counts so far.
    pub fn statistics(&self) -> &Statistics {
        self.decoding().statistics()
    }

    /// The settings as they are used: with the cost table that was measured, if one was.
    pub fn settings(&self) -> &Settings {
        self.decoding().settings()
    }

    /// What the controller decided so far, if the strategy has one.
    pub fn decisions(&self) -> Option<Decisions> {
        self.decoding().decisions()
    }

    /// Seconds that the tokens so far would have taken without a draft: by the controller's cost
    /// table, or by passes of the target that are measured now. `None` if nothing was generated or
    /// the context is full.
    ///
    /// # Errors
    /// What the target reports.
    pub fn plain_seconds(&mut self) -> Result<Option<f64>> {
        let tokens = self.tokens().len();
        let pass = match &self.settings().costs {
            Some(costs) => Some(costs.target(1)),
            None => self.with(|decoding, models| decoding.plain_seconds(models))?,
        };
        Ok(pass.filter(|_| tokens > 0).map(|seconds| seconds * tokens as f64))
    }

    /// Seconds spent in a phase so far.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.decoding().timeline().seconds(phase)
    }

    /// Seconds spent on generating: everything after the prompt.
    pub fn generating_seconds(&self) -> f64 {
        [Phase::Draft, Phase::Verify, Phase::Sample].map(|phase| self.seconds(phase)).iter().sum()
    }

    /// Does a round and fills `ready` with its tokens, up to a stop.
    fn round(&mut self) -> Result<()> {
        if self.request.cancel.load(Ordering::Relaxed) {
            self.end(StopReason::Interrupt);
            return Ok(());
        }
        let before = self.tokens().len();
        if self.request.max_tokens.is_some_and(|most| before >= most) {
            self.end(StopReason::MaxTokens);
            return Ok(());
        }
        let block = self.with(|decoding, models| Ok(decoding.next_block(models)?.cloned()))?;
        let Some(block) = block else {
            self.end(StopReason::Context);
            return Ok(());
        };
        let mut used = 0;
        for (i, &token) in block.tokens.iter().enumerate() {
            let log_prob = block.scores.get(i).copied();
            let mut piece = Piece {
                text: String::new(),
                token: Some(token),
                drafted: block.is_drafted(i),
                log_prob,
            };
            used += 1;
            if self.session.tokenizer.is_end(token) {
                self.ready.push_back(piece);
                self.end(StopReason::Eos);
                break;
            }
            self.held.push_str(&self.decoder.push(token));
            let found =
                self.request.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
            if let Some(at) = found {
                self.held.truncate(at);
                piece.text = std::mem::take(&mut self.held);
                self.ready.push_back(piece);
                // What the decoder still holds comes after the stop text.
                self.stopped = Some(StopReason::Stop);
                break;
            }
            let safe = self.held.len() - self.undecided();
            piece.text = self.held.drain(..safe).collect();
            self.ready.push_back(piece);
            if self.request.max_tokens.is_some_and(|most| before + used >= most) {
                self.end(StopReason::MaxTokens);
                break;
            }
        }
        if used < block.tokens.len() {
            let text = self.decoding().text().len() - (block.tokens.len() - used);
            self.with(|decoding, models| decoding.truncate_text(models, text))?;
        }
        Ok(())
    }

    /// Bytes at the end of `held` that might be the start of a stop text.
    fn undecided(&self) -> usize {
        let starts =
            |from: usize| self.request.stop.iter().any(|s| s.starts_with(&self.held[from..]));
        self.held
            .char_indices()
            .map(|(i, _)| i)
            .find(|&i| starts(i))
            .map_or(0, |i| self.held.len() - i)
    }

    /// Ends the generation and lets go of text that was held back.
    fn end(&mut self, reason: StopReason) {
        self.stopped = Some(reason);
        let rest = std::mem::take(&mut self.held) + &self.decoder.finish();
        if !rest.is_empty() {
            self.ready.push_back(Piece { text: rest, token: None, drafted: false, log_prob: None });
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        while self.ready.is_empty() {
            if self.stopped.is_some() || self.failed {
                return None;
            }
            if let Err(error) = self.round() {
                self.failed = true;
                return Some(Err(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

impl Request {
    /// Refuses requests that cannot be meant.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn validate(&self) -> Result<()> {
        self.settings.validate()?;
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("a stop text is empty"));
        }
        Ok(())
    }
}
