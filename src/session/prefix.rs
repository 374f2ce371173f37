//! Beginnings of texts that were evaluated once, for many sessions.

use crate::decode::Decoding;
use crate::engine::CacheType;
use crate::error::{Error, Result};
use crate::lm::{KeptRows, Lm, Token};
use crate::session::generation::Session;
use crate::session::pair::Pair;

/// The beginning of a text with what the models of a pair have evaluated of it:
/// [`Session::prefix`] keeps it, and [`Session::adopt`] begins other sessions of the same pair
/// with it.
///
/// ```
/// # #[cfg(feature = "builtin-pair")] {
/// use mtad::{LoadOptions, Pair, Request, SessionOptions};
///
/// let pair = Pair::builtin(true, &LoadOptions::default(), &mut |_, _| true)?;
/// let mut first = pair.session(&SessionOptions::default())?;
/// first.prompt("Once upon a time there was a little dog.", false)?;
/// let prefix = first.prefix()?;
/// for next in [" It barked", " He had a"] {
///     let mut session = pair.session(&SessionOptions::default())?;
///     session.adopt(&prefix, prefix.tokens().len())?;
///     let prompt = format!("Once upon a time there was a little dog.{next}");
///     let generation = session.generate(&prompt, &Request::default())?;
///     assert!(generation.prefill().reused > 5);
/// }
/// # }
/// # Ok::<(), mtad::Error>(())
/// ```
///
/// On the CPU sessions and prefixes share the rows that they have in common, and whoever goes on
/// from there copies no more than the few rows in whose midst it begins to write. A GPU copies the
/// rows, on the device: once when they are kept, once for each session that takes them up.
pub struct Prefix {
    pair: Pair,
    cache_type: CacheType,
    tokens: Vec<Token>,
    target: KeptRows,
    draft: Option<KeptRows>,
}

impl Prefix {
    /// The text. As in a session, its last token is pending: no model has evaluated it.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// Bytes of its rows, which are taken from the memory that the pair may have
    /// ([`crate::LoadOptions::memory`]). Rows that it shares with sessions and other prefixes are
    /// counted in each, so all together take less than is counted.
    pub fn bytes(&self) -> u64 {
        self.target.bytes() + self.draft.as_ref().map_or(0, KeptRows::bytes)
    }
}

/// Committed rows of a model that are rows of the text and leave its last token pending.
pub(super) fn rows_of(lm: &dyn Lm, text: usize) -> usize {
    lm.committed().min(text.saturating_sub(1))
}

impl Session {
    /// Keeps what the models have evaluated of the text, as far as it was handed out, for other
    /// sessions to begin with. It stays what it is, whatever becomes of this one. Of a text that
    /// the target has not evaluated to its end, the prefix is what it has.
    ///
    /// # Errors
    /// [`Error::Memory`]; what the device reports.
    pub fn prefix(&self) -> Result<Prefix> {
        let text = self.tokens();
        let rows = rows_of(&*self.target, text.len());
        let tokens = text[..text.len().min(rows + 1)].to_vec();
        let draft = self.draft.as_ref();
        let draft = draft.map(|draft| draft.keep_rows(rows_of(&**draft, tokens.len())));
        Ok(Prefix {
            pair: self.pair.clone(),
            cache_type: self.options.cache_type,
            target: self.target.keep_rows(rows)?,
            draft: draft.transpose()?,
            tokens,
        })
    }

    /// Makes the first `tokens` tokens of a prefix the session's text, as a prompt whose evaluation
    /// was done elsewhere. [`Session::resume`] goes on with it, and a prompt that begins like it
    /// is evaluated only from where it differs.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a prefix of other models than the session's, of another cache type,
    /// or of fewer tokens, and [`Error::ContextFull`] for one that the session has no room for;
    /// nothing has changed then. What the device reports; there is no text then.
    pub fn adopt(&mut self, prefix: &Prefix, tokens: usize) -> Result<()> {
        if !self.pair.has_models_of(&prefix.pair) {
            return Err(Error::invalid(
                "the prefix is one of other models; a session begins with those of its own pair",
            ));
        }
        let (kept, wanted) = (prefix.cache_type, self.options.cache_type);
        if kept != wanted {
            return Err(Error::invalid(format!(
                "the prefix is kept in a cache of type {}, and the session's is {}; \
                 both are to have one type",
                kept.name(),
                wanted.name()
            )));
        }
        let Some(text) = prefix.tokens.get(..tokens) else {
            return Err(Error::invalid(format!(
                "{tokens} tokens of a prefix wanted, which has {}",
                prefix.tokens.len()
            )));
        };
        let capacity = self.capacity();
        if tokens > capacity {
            return Err(Error::ContextFull { wanted: tokens, capacity });
        }
        self.ready.clear();
        self.ahead.clear();
        self.decoding.get_or_insert_with(Decoding::default);
        let (target, draft) = (&prefix.target, prefix.draft.as_ref());
        let adopted = self.with(|decoding, models| decoding.adopt(models, text, target, draft));
        (self.spoken, self.fresh, self.constrained_from) = (self.tokens().len(), true, None);
        adopted
    }

    /// A session of its own with the same text, caches and random numbers. What it has in common
    /// with this one is shared or copied as a [`Prefix`] is.
    ///
    /// # Errors
    /// [`Error::Memory`]; what the device reports.
    pub fn try_clone(&self) -> Result<Session> {
        let mut twin = Session::new(&self.pair, &self.options)?;
        let prefix = self.prefix()?;
        twin.adopt(&prefix, prefix.tokens.len())?;
        twin.restore(self.snapshot());
        Ok(twin)
    }
}
