//! The driver of a session's decoding: it owns the text and commits what rounds decide.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::pieces::{Pieces, fill};
use super::{Algorithm, Autoregressive, Block, CostTable, Decisions, Models, Phase, Round};
use super::{Settings, Statistics, Strategy, Timeline, draft_of};
use crate::error::{Error, Result, TARGET};
use crate::lm::{KeptRows, Lm, MAX_TREE, Token};
use crate::sampling::{Guide, Rng, RngState};

/// A text that grows by blocks.
///
/// The models are lent to each call, and always the same ones; between calls each model's line is
/// a prefix of the text and shorter than it. A prompt is given to [`Decoding::start`], after that
/// each [`Decoding::next_block`] adds tokens. Whoever wants fewer than a block holds calls
/// [`Decoding::truncate_text`]. Another `start` begins another text and keeps what both share.
pub struct Decoding {
    settings: Settings,
    algorithm: Box<dyn Algorithm>,
    /// For rounds for whose draft the context has no room.
    plain: Autoregressive,
    text: Vec<Token>,
    prompt_len: usize,
    scores: Vec<f64>,
    rng: Rng,
    /// What holds the generated tokens to the settings' constraint.
    guide: Option<Guide>,
    statistics: Statistics,
    timeline: Timeline,
    block: Block,
    /// What was measured of the models that are lent.
    costs: Option<Arc<CostTable>>,
    /// What evaluating the last prompt took.
    prefill: Prefill,
    /// Set by whoever wants it to stop.
    stop: Arc<AtomicBool>,
    /// How prompts are cut for target and draft.
    pieces: [Pieces; 2],
}

/// What evaluating a prompt took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens that the target had evaluated before.
    pub reused: usize,
    /// Tokens that the target evaluated now. The prompt's last token waits for the first round.
    pub evaluated: usize,
}

impl Decoding {
    /// A decoding with no text.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings outside their ranges.
    pub fn new(settings: Settings) -> Result<Self> {
        let settings = checked(settings)?;
        Ok(Decoding {
            algorithm: settings.strategy.algorithm(),
            plain: Autoregressive::default(),
            text: Vec::new(),
            prompt_len: 0,
            scores: Vec::new(),
            rng: Rng::new(settings.seed),
            guide: None,
            statistics: Statistics::default(),
            timeline: Timeline::default(),
            block: Block::default(),
            costs: None,
            prefill: Prefill::default(),
            stop: Arc::default(),
            pieces: [Pieces::new(MAX_TREE); 2],
            settings,
        })
    }

    /// Changes the settings and begins the seed's numbers anew. The text stays, so that the next
    /// prompt can share its beginning.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings outside their ranges; nothing has changed then.
    pub fn configure(&mut self, settings: Settings) -> Result<()> {
        self.adjust(settings)?;
        self.rng = Rng::new(self.settings.seed);
        Ok(())
    }

    /// Changes the settings, but the generator goes on: their seed is not used.
    ///
    /// # Errors
    /// As [`Decoding::configure`].
    pub fn adjust(&mut self, settings: Settings) -> Result<()> {
        self.settings = checked(settings)?;
        self.algorithm = self.settings.strategy.algorithm();
        Ok(())
    }

    /// A decoding whose text and generator come from elsewhere, with default settings: for models
    /// whose lines are prefixes of the text and shorter than it.
    pub fn restored(text: &[Token], rng: RngState) -> Self {
        let mut decoding = Decoding::default();
        decoding.take_text(text);
        decoding.rng = Rng::at(rng);
        decoding
    }

    /// Where in the text the constraint began that it is held to.
    pub(crate) fn constrained_from(&self) -> Option<usize> {
        self.guide.as_ref().map(Guide::start)
    }

    /// Has [`Decoding::resume`] go on with the settings' constraint as if it had begun at `start`, if
    /// the text follows it from there on; otherwise it begins at the end of the text, as another one
    /// would. Returns whether it goes on.
    pub(crate) fn constrain_from(&mut self, start: Option<usize>) -> bool {
        let Some(constraint) = &self.settings.constraint else { return false };
        let start = start.filter(|&start| start <= self.text.len());
        let guide = start.map(|start| Guide::new(constraint.clone(), start));
        self.guide = guide.filter(|guide| guide.follows(&self.text));
        self.guide.is_some()
    }

    /// Has the evaluation of prompts stop when `stop` is set. `pieces` are how prompts are cut at
    /// first, for target and draft.
    pub(crate) fn stop_when(&mut self, stop: Arc<AtomicBool>, pieces: [Pieces; 2]) {
        self.stop = stop;
        self.pieces = pieces;
    }

    /// What evaluating the last prompt took; of one that was stopped, what was done of it.
    pub fn prefill(&self) -> Prefill {
        self.prefill
    }

    /// Where the generator is.
    pub fn random_state(&self) -> RngState {
        self.rng.state()
    }

    /// The settings. Those of `greedy` have temperature 0, whatever was asked for.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Prompt and generated tokens.
    pub fn text(&self) -> &[Token] {
        &self.text
    }

    /// The generated tokens.
    pub fn generated(&self) -> &[Token] {
        &self.text[self.prompt_len..]
    }

    /// ln p under the unwarped target of each generated token; empty unless scores are wanted.
    pub fn scores(&self) -> &[f64] {
        &self.scores
    }

    /// Counts since the last [`Decoding::start`].
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Times since the last [`Decoding::start`].
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// What the controller decided since the settings were given, if they have one.
    pub fn decisions(&self) -> Option<Decisions> {
        self.algorithm.decisions(&self.settings)
    }

    /// The timeline, to listen to it.
    pub fn timeline_mut(&mut self) -> &mut Timeline {
        &mut self.timeline
    }

    /// Begins a text: evaluates all but the last token of the prompt, except what the models hold
    /// of it already. Statistics and times begin anew, the generator goes on.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an empty prompt or a missing draft, [`Error::ContextFull`] for a
    /// prompt that the target has no room for (a draft that has none is not used); nothing has
    /// changed then. What the models report. [`Error::Cancelled`] if it was told to stop: the
    /// prompt is the text then, and what is missing is evaluated before the next round.
    ///
    /// The controller's first start measures what passes cost, unless it was given a table; that
    /// time is in no phase.
    pub fn start(&mut self, models: &mut Models<'_>, prompt: &[Token]) -> Result<Prefill> {
        let drafts = self.settings.strategy.needs_draft();
        if drafts {
            draft_of(models, self.settings.strategy)?;
        }
        let Some(last) = prompt.len().checked_sub(1) else {
            return Err(Error::invalid("the prompt is empty; give it at least one token"));
        };
        let capacity = models.target.capacity();
        if prompt.len() > capacity {
            return Err(Error::ContextFull { wanted: prompt.len(), capacity });
        }
        self.timeline.reset();
        self.timeline.enter(Phase::Prefill);
        let shared = self.text.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // A draft that is not used now keeps what it has, so both are cut before either grows.
        shorten(models, shared.min(last))?;
        self.take_text(prompt);
        let constraint = self.settings.constraint.clone();
        self.guide = constraint.map(|constraint| Guide::new(constraint, prompt.len()));

        let reused = models.target.committed();
        let [target_pieces, draft_pieces] = self.pieces;
        let reader = models.draft_reader();
        let seen = &prompt[..last];
        let mut filled = fill(models.target, seen, target_pieces, &self.stop);
        self.prefill = Prefill { reused, evaluated: models.target.committed() - reused };
        if let Some(draft) = &mut models.draft
            && filled.is_ok()
            && drafts
            && prompt.len() <= draft.capacity()
        {
            filled = fill(&mut **draft, &reader.read(seen), draft_pieces, &self.stop);
        }
        self.timeline.stop();
        filled?;
        self.measure_costs(models, prompt[last])?;
        Ok(self.prefill)
    }

    /// Goes on with the text as if all of it were the prompt: what comes is counted, timed and
    /// scored anew. The generator goes on, and so does a constraint, if it is the one that the text
    /// was left with; another one begins here.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no text or the draft is missing; what the models report.
    pub fn resume(&mut self, models: &mut Models<'_>) -> Result<()> {
        if self.settings.strategy.needs_draft() {
            draft_of(models, self.settings.strategy)?;
        }
        let Some(&last) = self.text.last() else { return Err(no_text()) };
        self.timeline.reset();
        self.prompt_len = self.text.len();
        self.scores.clear();
        self.statistics = Statistics::default();
        let constraint = self.settings.constraint.clone();
        let before = self.guide.take();
        self.guide = constraint.map(|constraint| match before {
            Some(guide) if **guide.constraint() == *constraint => guide,
            _ => Guide::new(constraint, self.text.len()),
        });
        self.measure_costs(models, last)
    }

    /// Evaluates what a prompt that was stopped has left to do, as [`Decoding::start`] does it. (A
    /// round evaluates the few tokens that it finds missing by itself. The controller weighs what
    /// it costs to have the draft catch up.)
    fn catch_up(&mut self, models: &mut Models<'_>, with_draft: bool) -> Result<()> {
        let before = &self.text[..self.text.len() - 1];
        let behind = |lm: &dyn Lm, pieces: Pieces| {
            let missing = before.len().saturating_sub(lm.committed());
            missing > pieces.next(missing)
        };
        let [target_pieces, draft_pieces] = self.pieces;
        if behind(models.target, target_pieces) {
            self.timeline.enter(Phase::Prefill);
            fill(models.target, before, target_pieces, &self.stop)?;
        }
        let reader = models.draft_reader();
        if let Some(draft) = models.draft.as_mut().filter(|_| with_draft)
            && behind(&**draft, draft_pieces)
        {
            self.timeline.enter(Phase::Prefill);
            fill(&mut **draft, &reader.read(before), draft_pieces, &self.stop)?;
        }
        Ok(())
    }

    /// Adds tokens to the text that were decided before; the models catch up in the next round.
    pub fn extend_text(&mut self, tokens: &[Token], scores: &[f64]) {
        self.text.extend_from_slice(tokens);
        self.scores.extend_from_slice(scores);
        self.statistics.emitted += tokens.len() as u64;
    }

    /// Begins a text, as [`Decoding::start`] does, with what was kept of models that had evaluated it
    /// or some of it: rows of the target, and of the draft. What is missing is evaluated before the
    /// next round.
    ///
    /// # Errors
    /// As [`Lm::adopt_rows`]; there is no text then.
    pub fn adopt(
        &mut self,
        models: &mut Models<'_>,
        text: &[Token],
        target: &KeptRows,
        draft: Option<&KeptRows>,
    ) -> Result<()> {
        self.clear(models)?;
        let before = &text[..text.len().saturating_sub(1)];
        let reader = models.draft_reader();
        let known = |kept: &KeptRows, lm: &dyn Lm| {
            &before[..before.len().min(kept.count()).min(lm.capacity())]
        };
        let tokens = known(target, models.target);
        let mut adopted = models.target.adopt_rows(target, tokens);
        if let (Some(lm), Some(draft)) = (&mut models.draft, draft)
            && adopted.is_ok()
        {
            let tokens = known(draft, &**lm);
            adopted = lm.adopt_rows(draft, &reader.read(tokens));
        }
        if let Err(error) = adopted {
            // The first error says more than one on the way back would.
            let _ = shorten(models, 0);
            return Err(error);
        }
        self.take_text(text);
        Ok(())
    }

    /// Makes another text a prompt of the models, whose lines are prefixes of it and shorter than it.
    fn take_text(&mut self, text: &[Token]) {
        self.text.clear();
        self.text.extend_from_slice(text);
        self.prompt_len = text.len();
        self.guide = None;
        self.scores.clear();
        self.statistics = Statistics::default();
    }

    /// Forgets the text, in the models too.
    ///
    /// # Errors
    /// What the models report.
    pub fn clear(&mut self, models: &mut Models<'_>) -> Result<()> {
        shorten(models, 0)?;
        self.take_text(&[]);
        Ok(())
    }

    /// Measures what the controller decides by, if it has nothing yet.
    fn measure_costs(&mut self, models: &mut Models<'_>, token: Token) -> Result<()> {
        if self.settings.strategy == Strategy::Auto && self.settings.costs.is_none() {
            if self.costs.is_none() {
                let table = CostTable::measure(models, token, &self.settings.warp)?;
                self.costs = Some(Arc::new(table));
            }
            self.settings.costs.clone_from(&self.costs);
        }
        Ok(())
    }

    /// Seconds that a plain pass of the target takes at the end of the text, with making
    /// probabilities of it: what one token would cost without a draft. `None` before a start and in
    /// a full context.
    ///
    /// # Errors
    /// What the target reports.
    pub fn plain_seconds(&mut self, models: &mut Models<'_>) -> Result<Option<f64>> {
        let Some(&last) = self.text.last() else { return Ok(None) };
        if models.target.committed() >= models.target.capacity() {
            return Ok(None);
        }
        CostTable::plain(models, last, &self.settings.warp).map(Some)
    }

    /// Does one round and adds its tokens to the text, or adds those that are [forced](Block::forced)
    /// without one: where the constraint leaves one token, it has probability 1 under the target as
    /// it is held to it, and the next round evaluates it along with the pending one. (Beams of
    /// `beam` are ahead of the text, and scores need a pass: there nothing is forced.) `None`: the
    /// context is full.
    ///
    /// # Errors
    /// [`Error::Invalid`] before a start or without the draft that the strategy needs;
    /// [`Error::Grammar`] if no token of the target may follow; what the models report;
    /// [`Error::Cancelled`] if it was told to stop while it evaluated what a prompt
    /// had left to do. The text is as before then, and the models' lines are prefixes of it.
    pub fn next_block(&mut self, models: &mut Models<'_>) -> Result<Option<&Block>> {
        let len = self.text.len();
        if len == 0 {
            return Err(no_text());
        }
        // The pending token is evaluated in any case, at position len - 1.
        let Some(room) = models.target.capacity().checked_sub(len) else {
            return Ok(None);
        };
        let length = self.settings.draft_length();
        let gamma = if self.settings.strategy.needs_draft() {
            // The draft does not evaluate the last token it drafts.
            let draft = draft_of(models, self.settings.strategy)?;
            let draft_room = draft.capacity().saturating_add(1).saturating_sub(len);
            length.min(room).min(draft_room)
        } else {
            // Nor does a target that goes on alone.
            length.min(room.saturating_add(1))
        };
        self.block.clear();
        self.force(models.vocab(), room);
        if !self.block.tokens.is_empty() {
            self.statistics.record(&self.block);
            return Ok(Some(&self.block));
        }
        let with_draft = gamma > 0
            && self.settings.strategy.needs_draft()
            && self.settings.strategy != Strategy::Auto;
        let caught_up = self.catch_up(models, with_draft);
        self.timeline.stop();
        caught_up?;
        let algorithm = if gamma == 0 { &mut self.plain } else { &mut *self.algorithm };
        let mut round = Round {
            models: models.reborrow(),
            text: &self.text,
            guide: self.guide.as_ref(),
            settings: &self.settings,
            gamma,
            rng: &mut self.rng,
            timeline: &mut self.timeline,
        };
        let done = algorithm.round(&mut round, &mut self.block).and_then(|kept| {
            if self.block.scores.iter().any(|score| !score.log_prob.is_finite()) {
                return Err(Error::NotFinite { model: TARGET.to_owned() });
            }
            round.models.target.commit(kept.target)?;
            match &mut round.models.draft {
                Some(draft) => draft.commit(kept.draft),
                None => Ok(()),
            }
        });
        self.timeline.stop();
        if let Err(error) = done {
            // The first error says more than one on the way back would.
            let _ = shorten(models, len - 1);
            return Err(error);
        }
        self.text.extend_from_slice(&self.block.tokens);
        self.scores.extend(self.block.scores.iter().map(|score| score.log_prob));
        self.statistics.record(&self.block);
        Ok(Some(&self.block))
    }

    /// Adds the tokens that come next because no other may, to the text and to the block.
    fn force(&mut self, vocab: usize, room: usize) {
        /// More come in the next block: a grammar may force tokens without an end.
        const MOST: usize = 64;
        let Some(guide) = &self.guide else { return };
        if self.settings.score || self.settings.strategy == Strategy::Beam {
            return;
        }
        // The last token of a text is not evaluated, so one more than has room.
        while self.block.tokens.len() < MOST.min(room + 1) {
            match guide.forced(&self.text) {
                Some(token) if (token as usize) < vocab => {
                    self.text.push(token);
                    self.block.tokens.push(token);
                    self.block.forced += 1;
                }
                _ => break,
            }
        }
    }

    /// Forgets all but the first `len` tokens of the text, in the models too: the end of a block
    /// that was cut short by a stop.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text is shorter or nothing would be left.
    pub fn truncate_text(&mut self, models: &mut Models<'_>, len: usize) -> Result<()> {
        if !(1..=self.text.len()).contains(&len) {
            return Err(Error::invalid(format!(
                "a text of {} tokens cannot be cut to {len}",
                self.text.len()
            )));
        }
        shorten(models, len - 1)?;
        self.text.truncate(len);
        self.prompt_len = self.prompt_len.min(len);
        if let Some(guide) = self.guide.take() {
            let start = guide.start().min(len);
            let goes_on = start == guide.start();
            let again = |guide: Guide| Guide::new(guide.constraint().clone(), start);
            self.guide = Some(if goes_on { guide } else { again(guide) });
        }
        self.scores.truncate(len - self.prompt_len);
        self.statistics.emitted = self.statistics.emitted.min((len - self.prompt_len) as u64);
        Ok(())
    }
}

impl Default for Decoding {
    /// With no text, and settings that need no draft.
    fn default() -> Self {
        let settings = Settings { strategy: Strategy::Sample, ..Settings::default() };
        Decoding::new(settings).expect("default settings are within their ranges")
    }
}

impl fmt::Debug for Decoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoding")
            .field("settings", &self.settings)
            .field("text", &self.text)
            .field("prompt_len", &self.prompt_len)
            .field("guide", &self.guide)
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}

/// The settings, if they are within their ranges, with what the strategy implies.
fn checked(mut settings: Settings) -> Result<Settings> {
    settings.validate()?;
    if settings.strategy == Strategy::Greedy {
        settings.warp.temperature = 0.0;
    }
    Ok(settings)
}

fn no_text() -> Error {
    Error::invalid("there is no text to go on with; start with a prompt")
}

/// Cuts the models' lines to at most `len` rows and empties their trees.
fn shorten(models: &mut Models<'_>, len: usize) -> Result<()> {
    let target = models.target.truncate(models.target.committed().min(len));
    if let Some(draft) = &mut models.draft {
        draft.truncate(draft.committed().min(len))?;
    }
    target
}
