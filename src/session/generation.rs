//! Sessions and generations: text in, text out, token by token.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::decode::{Decisions, Decoding, Listener, Models, Phase, Pieces, Prefill};
use crate::decode::{Origin, Settings, Statistics, Strategy};
use crate::engine::{Model, SessionOptions};
use crate::error::{DRAFT, Error, Result};
use crate::lm::{Batch, Lm, Output, Row, Token, Want, extend};
use crate::sampling::RngState;
use crate::session::pair::Pair;
use crate::tokenizer::{EncodeOptions, StreamDecoder};

/// One conversation with a pair: caches, the text that they hold, and the random numbers that come
/// next.
///
/// [`Session::generate`] begins a text with a prompt, and keeps what the prompt shares with the
/// last text. [`Session::resume`] goes on where a text was left: after [`Session::prompt`], after a
/// generation that was dropped or had its tokens, after [`Session::save`] and
/// [`Pair::load_session`]. However often a text is left and resumed, it is the same text, as long
/// as the settings are the same and their strategy remembers nothing from round to round (`beam`,
/// `dsbd` and `auto` do: they begin anew with what the text says).
pub struct Session {
    pub(crate) pair: Pair,
    pub(crate) options: SessionOptions,
    pub(crate) target: Box<dyn Lm>,
    pub(crate) draft: Option<Box<dyn Lm>>,
    pub(super) decoding: Option<Decoding>,
    /// For the decoding that the first prompt makes.
    listener: Option<Listener>,
    /// Tokens of the last block, at the end of the text, that were not handed out yet.
    pub(super) ready: VecDeque<Piece>,
    /// Tokens that were decided beyond the text: what a limit cut off.
    pub(super) ahead: Vec<Ahead>,
    /// The part of the text whose characters were all handed out.
    pub(super) spoken: usize,
    /// Whether the next generation begins the numbers of its seed.
    pub(super) fresh: bool,
    /// Of a session that was restored: where the constraint began that its text was held to.
    pub(super) constrained_from: Option<usize>,
    /// Stops prompts that are evaluated without a request.
    cancel: Arc<AtomicBool>,
    /// How long a piece of a prompt should take.
    prompt_pace: Duration,
}

/// A token that was decided but not handed out. What is kept of it is what a saved session has; the rest is known
/// while its round is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ahead {
    pub token: Token,
    pub origin: Origin,
    pub log_prob: Option<f64>,
}

/// All of a session but its caches.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Snapshot {
    pub text: Vec<Token>,
    pub ahead: Vec<Ahead>,
    pub spoken: usize,
    pub fresh: bool,
    pub constrained_from: Option<usize>,
    pub rng: RngState,
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
    /// Set it from anywhere to stop: while the prompt is evaluated or after a round.
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

/// A seed for who names none, which differs from time to time. Small enough that every program can say it again.
#[cfg_attr(not(feature = "cli"), allow(dead_code))]
pub(crate) fn clock_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64 % 1_000_000_000
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
    /// Where it is from; text without a token has the target's.
    pub origin: Origin,
    /// Its log-probability under the unwarped target, if scores were asked for.
    pub log_prob: Option<f64>,
    /// The most probable tokens in its place with their log-probabilities, likewise: as many as
    /// [`Settings::alternatives`], and none of a token that was decided before the generation began.
    pub alternatives: Vec<(Token, f64)>,
    /// ln (joint p / joint q) of the accepted block that it belongs to; `None` for a token of the target's own.
    pub log_ratio: Option<f64>,
}

impl Piece {
    /// A token whose text is not known yet.
    fn of(ahead: &Ahead) -> Self {
        let &Ahead { token, origin, log_prob } = ahead;
        Piece { token: Some(token), origin, log_prob, ..Piece::rest(String::new()) }
    }

    /// Text that was held back.
    fn rest(text: String) -> Self {
        Piece {
            text,
            token: None,
            origin: Origin::Target,
            log_prob: None,
            alternatives: Vec::new(),
            log_ratio: None,
        }
    }
}

impl Session {
    pub(crate) fn new(pair: &Pair, options: &SessionOptions) -> Result<Self> {
        Ok(Session {
            pair: pair.clone(),
            options: *options,
            target: pair.target().session(options)?,
            draft: pair.draft().map(|draft| draft.session(options)).transpose()?,
            decoding: None,
            listener: None,
            ready: VecDeque::new(),
            ahead: Vec::new(),
            spoken: 0,
            fresh: true,
            constrained_from: None,
            cancel: Arc::default(),
            prompt_pace: Pieces::LONGEST,
        })
    }

    /// The models that it is a session of.
    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    /// The most tokens that prompt and text may have together.
    pub fn capacity(&self) -> usize {
        self.target.capacity()
    }

    /// Prompt and generated tokens, as far as they were handed out.
    pub fn tokens(&self) -> &[Token] {
        let Some(decoding) = &self.decoding else { return &[] };
        let undelivered = self.ready.iter().filter(|piece| piece.token.is_some()).count();
        &decoding.text()[..decoding.text().len() - undelivered]
    }

    /// Has each change of phase told to `listener`, from the next prompt or generation on.
    pub fn listen(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    /// Has [`Session::prompt`] and [`Session::prompt_tokens`] stop with [`Error::Cancelled`] when
    /// `flag` is set. The prompt is the session's text then, and what is missing is evaluated when
    /// a generation goes on with it.
    pub fn cancel_prompts(&mut self, flag: Arc<AtomicBool>) {
        self.cancel = flag;
    }

    /// Has prompts evaluated in pieces that take about so long each. Others who share passes with this session wait
    /// for a piece at most; smaller ones take longer altogether. What is computed does not depend on it.
    pub fn pace_prompts(&mut self, longest: Duration) {
        self.prompt_pace = longest;
    }

    /// Starts to generate after a prompt. If [`Request::cancel`] is set before the prompt is
    /// evaluated, the generation has ended ([`StopReason::Interrupt`]) without a token, and
    /// [`Session::resume`] goes on.
    ///
    /// # Errors
    /// Settings outside their ranges; a prompt that is empty or longer than the context; what
    /// the models report.
    pub fn generate(&mut self, prompt: &str, request: &Request) -> Result<Generation<'_>> {
        let tokens = self.encode(prompt, request.special);
        self.generate_from(&tokens, request)
    }

    /// Starts to generate after tokens, which are taken as they are.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn generate_from(&mut self, prompt: &[Token], request: &Request) -> Result<Generation<'_>> {
        self.configure(request.settings.clone(), true, &request.cancel)?;
        let stopped = match self.start(prompt) {
            Ok(_) => None,
            Err(Error::Cancelled) => Some(StopReason::Interrupt),
            Err(error) => return Err(error),
        };
        self.fresh = stopped.is_some();
        let prefill = self.decoding.as_ref().map(Decoding::prefill).unwrap_or_default();
        let generation = Generation::new(Owner::Lent(self), request, prefill);
        Ok(Generation { stopped, ..generation })
    }

    /// Begins a text without generating: evaluates a prompt, for [`Session::resume`] to go on.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn prompt(&mut self, prompt: &str, special: bool) -> Result<Prefill> {
        let tokens = self.encode(prompt, special);
        self.prompt_tokens(&tokens)
    }

    /// The same with tokens, which are taken as they are.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn prompt_tokens(&mut self, prompt: &[Token]) -> Result<Prefill> {
        // What evaluates the prompt with all models that are there.
        let strategy = Strategy::default_for(self.draft.is_some());
        let cancel = self.cancel.clone();
        self.configure(Settings { strategy, ..Settings::default() }, true, &cancel)?;
        let started = self.start(prompt);
        if matches!(started, Ok(_) | Err(Error::Cancelled)) {
            self.fresh = true;
        }
        started
    }

    /// Goes on where the text was left. Limits and statistics count from here. The first
    /// generation after [`Session::prompt`] begins the numbers of the request's seed, later ones
    /// go on with them. A text that the model had ended stays ended.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no text; otherwise as [`Session::generate`].
    pub fn resume(&mut self, request: &Request) -> Result<Generation<'_>> {
        let ended = self.go_on(request)?;
        Ok(Generation::resumed(Owner::Lent(self), request, ended))
    }

    /// [`Session::resume`] with a generation that owns the session, so that it can be kept beside
    /// other things; [`Generation::into_session`] gives it back.
    ///
    /// # Errors
    /// As [`Session::resume`], with the session.
    pub fn into_generation(
        mut self: Box<Self>,
        request: &Request,
    ) -> Result<Generation<'static>, (Box<Self>, Error)> {
        match self.go_on(request) {
            Ok(ended) => Ok(Generation::resumed(Owner::Own(self), request, ended)),
            Err(error) => Err((self, error)),
        }
    }

    /// Forgets the text.
    ///
    /// # Errors
    /// What the models report.
    pub fn reset(&mut self) -> Result<()> {
        self.ready.clear();
        self.ahead.clear();
        (self.spoken, self.fresh, self.constrained_from) = (0, true, None);
        match self.decoding {
            Some(_) => self.with(|decoding, models| decoding.clear(models)),
            None => Ok(()),
        }
    }

    /// The target's logits for the token that follows the text, unwarped. One pass.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no text; what the target reports.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        self.settle()?;
        let target = &mut *self.target;
        let text = self.decoding.as_ref().map_or(&[][..], Decoding::text);
        let Some((&last, before)) = text.split_last() else { return Err(no_text()) };
        let done = target.committed();
        extend(target, &before[done..])?;
        let outputs = target.eval(&Batch::chain(&[last], None, Row(0), Want::Logits))?;
        let Output::Logits(logits) = outputs.get(0) else {
            unreachable!("a row returns what it was asked for")
        };
        let logits = logits.to_vec();
        target.commit(None)?;
        Ok(logits)
    }

    fn encode(&self, prompt: &str, special: bool) -> Vec<Token> {
        let tokenizer = self.pair.tokenizer();
        tokenizer.encode(prompt, EncodeOptions { bos: tokenizer.add_bos(), special })
    }

    /// Takes settings; `anew` also begins the numbers of their seed. `cancel` stops what comes.
    fn configure(
        &mut self,
        settings: Settings,
        anew: bool,
        cancel: &Arc<AtomicBool>,
    ) -> Result<()> {
        let pieces = |model: &Model| Pieces::of_model(model.shape().macs, self.prompt_pace);
        let target = pieces(self.pair.target());
        let draft = self.pair.draft().map_or(target, pieces);
        let decoding = match &mut self.decoding {
            Some(decoding) => {
                match anew {
                    true => decoding.configure(settings)?,
                    false => decoding.adjust(settings)?,
                }
                decoding
            }
            None => self.decoding.insert(Decoding::new(settings)?),
        };
        decoding.stop_when(cancel.clone(), [target, draft]);
        if let Some(listener) = self.listener.take() {
            decoding.timeline_mut().listen(Some(listener));
        }
        Ok(())
    }

    fn start(&mut self, prompt: &[Token]) -> Result<Prefill> {
        self.settle()?;
        let started = self.with(|decoding, models| decoding.start(models, prompt));
        // A prompt that was refused has changed nothing.
        if self.decoding.as_ref().is_some_and(|decoding| decoding.text() == prompt) {
            self.ahead.clear();
            self.constrained_from = None;
            self.spoken = prompt.len();
        }
        started
    }

    /// Makes ready to go on; says whether the text has ended.
    fn go_on(&mut self, request: &Request) -> Result<bool> {
        let Some(&last) = self.tokens().last() else { return Err(no_text()) };
        let before = self.decoding.as_ref().and_then(|d| d.settings().constraint.clone());
        self.configure(request.settings.clone(), self.fresh, &request.cancel)?;
        self.settle()?;
        if request.settings.constraint.is_none() {
            self.constrained_from = None;
        } else if request.settings.constraint != before {
            let start = self.constrained_from.take();
            let goes_on = self.decoding.as_mut().is_some_and(|d| d.constrain_from(start));
            // What was decided under another constraint, or none, may not follow under this one.
            if !goes_on {
                self.ahead.clear();
            }
        }
        self.with(|decoding, models| decoding.resume(models))?;
        Ok(!std::mem::replace(&mut self.fresh, false) && self.pair.tokenizer().is_end(last))
    }

    /// Takes tokens that were not handed out from the text, to be handed out later.
    fn settle(&mut self) -> Result<()> {
        let len = self.tokens().len();
        let undelivered: Vec<_> = self.ready.drain(..).filter_map(Ahead::of).collect();
        if !undelivered.is_empty() {
            self.ahead.splice(..0, undelivered);
            self.with(|decoding, models| decoding.truncate_text(models, len))?;
        }
        Ok(())
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let undelivered = self.ready.iter().cloned().filter_map(Ahead::of);
        Snapshot {
            text: self.tokens().to_vec(),
            ahead: undelivered.chain(self.ahead.iter().cloned()).collect(),
            spoken: self.spoken,
            fresh: self.fresh,
            constrained_from: self
                .decoding
                .as_ref()
                .and_then(Decoding::constrained_from)
                .or(self.constrained_from),
            rng: self.decoding.as_ref().map_or(RngState::default(), Decoding::random_state),
        }
    }

    /// Takes all but the caches, which the models have already.
    pub(crate) fn restore(&mut self, snapshot: Snapshot) {
        let Snapshot { text, ahead, spoken, fresh, constrained_from, rng } = snapshot;
        self.decoding = Some(Decoding::restored(&text, rng));
        (self.ahead, self.spoken, self.fresh) = (ahead, spoken, fresh);
        self.constrained_from = constrained_from;
    }

    pub(super) fn with<R>(
        &mut self,
        f: impl FnOnce(&mut Decoding, &mut Models<'_>) -> Result<R>,
    ) -> Result<R> {
        let decoding = self.decoding.as_mut().expect("who asks has made a decoding");
        let mut models = match &mut self.draft {
            Some(draft) => Models::pair(&mut *self.target, &mut **draft),
            None => Models::alone(&mut *self.target),
        }
        .with_vocabulary(self.pair.vocabulary());
        // Decoders know their models by their parts only.
        f(decoding, &mut models).map_err(|error| match (error, self.pair.draft()) {
            (Error::NotFinite { model }, Some(draft)) if model == DRAFT => {
                Error::NotFinite { model: draft.file().name().to_owned() }
            }
            (Error::NotFinite { .. }, _) => {
                Error::NotFinite { model: self.pair.target().file().name().to_owned() }
            }
            (error, _) => error,
        })
    }
}

impl Ahead {
    fn of(piece: Piece) -> Option<Self> {
        let Piece { token, origin, log_prob, .. } = piece;
        Some(Ahead { token: token?, origin, log_prob })
    }
}

fn no_text() -> Error {
    Error::invalid("there is no text to go on with; give a prompt first")
}

/// Whose session a generation runs on.
enum Owner<'s> {
    Lent(&'s mut Session),
    Own(Box<Session>),
}

impl Deref for Owner<'_> {
    type Target = Session;

    fn deref(&self) -> &Session {
        match self {
            Owner::Lent(session) => session,
            Owner::Own(session) => session,
        }
    }
}

impl DerefMut for Owner<'_> {
    fn deref_mut(&mut self) -> &mut Session {
        match self {
            Owner::Lent(session) => session,
            Owner::Own(session) => session,
        }
    }
}

/// A generation under way: an iterator over its tokens.
///
/// Dropping it stops it; the session stays usable, and [`Session::resume`] goes on after the last
/// token that was handed out.
pub struct Generation<'s> {
    session: Owner<'s>,
    request: Request,
    decoder: StreamDecoder,
    prefill: Prefill,
    prompt_tokens: usize,
    /// Text that might be the start of a stop text.
    held: String,
    stopped: Option<StopReason>,
    failed: bool,
}

impl<'s> Generation<'s> {
    fn new(session: Owner<'s>, request: &Request, prefill: Prefill) -> Self {
        Generation {
            decoder: session.pair.tokenizer().continuation(),
            request: request.clone(),
            prefill,
            prompt_tokens: session.tokens().len(),
            held: String::new(),
            stopped: None,
            failed: false,
            session,
        }
    }

    /// A generation that goes on with a text.
    fn resumed(session: Owner<'s>, request: &Request, ended: bool) -> Self {
        let mut generation = Self::new(session, request, Prefill { reused: 0, evaluated: 0 });
        generation.replay();
        if ended {
            generation.end(StopReason::Eos);
        }
        generation
    }

    /// Brings the decoder to where it was after the tokens that were handed out last.
    fn replay(&mut self) {
        let unspoken = self.decoding().text()[self.session.spoken..].to_vec();
        for token in unspoken {
            if !self.session.pair.tokenizer().is_end(token) {
                self.held.push_str(&self.decoder.push(token));
            }
            match self.request.stop.iter().any(|stop| self.held.contains(stop)) {
                true => self.held.clear(),
                false => drop(self.release()),
            }
        }
    }

    /// The session, for a generation that owns it; `None` if it was lent.
    pub fn into_session(self) -> Option<Box<Session>> {
        match self.session {
            Owner::Own(session) => Some(session),
            Owner::Lent(_) => None,
        }
    }

    fn decoding(&self) -> &Decoding {
        self.session.decoding.as_ref().expect("a generation has a decoding")
    }

    /// Why it ended; `None` while it goes on.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.stopped.filter(|_| self.session.ready.is_empty())
    }

    /// The text before the generated tokens.
    pub fn prompt(&self) -> &[Token] {
        &self.decoding().text()[..self.prompt_tokens]
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
            None => self.session.with(|decoding, models| decoding.plain_seconds(models))?,
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

    /// The session that it runs on, with the text as far as it goes.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// What the next round decides, all of it: one piece or more. `None` once the generation has ended.
    ///
    /// # Errors
    /// What the models report, once.
    pub fn next_round(&mut self) -> Option<Result<Vec<Piece>>> {
        let first = match self.next()? {
            Ok(first) => first,
            Err(error) => return Some(Err(error)),
        };
        let mut pieces = vec![first];
        while !self.session.ready.is_empty() {
            match self.next()? {
                Ok(piece) => pieces.push(piece),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(pieces))
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
        if !self.session.ahead.is_empty() {
            let ahead = std::mem::take(&mut self.session.ahead);
            return self.catch_up(&ahead);
        }
        let block = self.session.with(|decoding, models| Ok(decoding.next_block(models)?.cloned()));
        let block = match block {
            Ok(Some(block)) => block,
            Ok(None) => {
                self.end(StopReason::Context);
                return Ok(());
            }
            Err(Error::Cancelled) => {
                self.end(StopReason::Interrupt);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let pieces = block.tokens.iter().enumerate().map(|(i, &token)| {
            let origin = block.origin(i);
            let score = block.scores.get(i);
            let log_prob = score.map(|score| score.log_prob);
            Piece {
                alternatives: score.map_or(Vec::new(), |score| score.alternatives.clone()),
                log_ratio: block.log_ratio().filter(|_| origin == Origin::Draft),
                ..Piece::of(&Ahead { token, origin, log_prob })
            }
        });
        let pieces = pieces.collect();
        self.hand_out(before, pieces)
    }

    /// Hands out tokens that were decided before the text was left.
    fn catch_up(&mut self, ahead: &[Ahead]) -> Result<()> {
        let tokens: Vec<_> = ahead.iter().map(|ahead| ahead.token).collect();
        let scores: Option<Vec<f64>> = ahead.iter().map(|ahead| ahead.log_prob).collect();
        let scores = scores.filter(|_| self.request.settings.score).unwrap_or_default();
        let decoding = self.session.decoding.as_mut().expect("a generation has a decoding");
        decoding.extend_text(&tokens, &scores);
        self.hand_out(0, ahead.iter().map(Piece::of).collect())
    }

    /// Hands out the tokens at the end of the text, up to a stop; `before` tokens were generated before them.
    fn hand_out(&mut self, before: usize, tokens: Vec<Piece>) -> Result<()> {
        let (mut used, all) = (0, tokens.len());
        let mut tokens = tokens.into_iter();
        for mut piece in tokens.by_ref() {
            let token = piece.token.expect("a token is handed out");
            used += 1;
            if self.session.pair.tokenizer().is_end(token) {
                self.session.ready.push_back(piece);
                self.end(StopReason::Eos);
                break;
            }
            self.held.push_str(&self.decoder.push(token));
            let found =
                self.request.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
            if let Some(at) = found {
                self.held.truncate(at);
                piece.text = std::mem::take(&mut self.held);
                self.session.ready.push_back(piece);
                // What the decoder still holds comes after the stop text.
                self.stopped = Some(StopReason::Stop);
                break;
            }
            piece.text = self.release();
            self.session.ready.push_back(piece);
            if self.request.max_tokens.is_some_and(|most| before + used >= most) {
                self.end(StopReason::MaxTokens);
                break;
            }
        }
        if used < all {
            let text = self.decoding().text().len() - (all - used);
            self.session.with(|decoding, models| decoding.truncate_text(models, text))?;
            // What comes after the end of a text is not part of it.
            if self.stopped == Some(StopReason::MaxTokens) {
                self.session.ahead = tokens.filter_map(Ahead::of).collect();
            }
        }
        Ok(())
    }

    /// The held text that cannot be part of a stop text any more.
    fn release(&mut self) -> String {
        let safe = self.held.len() - self.undecided();
        self.held.drain(..safe).collect()
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
            self.session.ready.push_back(Piece::rest(rest));
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        while self.session.ready.is_empty() {
            if self.stopped.is_some() || self.failed {
                return None;
            }
            if let Err(error) = self.round() {
                self.failed = true;
                return Some(Err(error));
            }
        }
        let piece = self.session.ready.pop_front();
        if self.stopped.is_some() && self.session.ready.is_empty() {
            self.session.spoken = self.decoding().text().len();
        }
        piece.map(Ok)
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
