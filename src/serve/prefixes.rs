//! Beginnings of texts that were evaluated for earlier requests: a system's prompt, a conversation so far.
//!
//! They are found again by content, whoever asks, and shared by reference with the sequences that go on from them.
//! Nothing is told of them but time: who asks for a text that somebody else asked for is answered sooner.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::lm::Token;
use crate::session::generation::Session;
use crate::session::prefix::Prefix;

/// What is kept, within a number of bytes.
pub(super) struct Prefixes {
    most_bytes: u64,
    kept: Mutex<Vec<Arc<Prefix>>>,
}

impl Prefixes {
    /// Nothing yet.
    pub fn new(most_bytes: u64) -> Self {
        Prefixes { most_bytes, kept: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Prefix>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a session begin with what is kept of a prompt, if that is more than it has itself.
    pub fn lend(&self, session: &mut Session, prompt: &[Token]) {
        let own = shared(session.tokens(), prompt);
        let found = {
            let mut kept = self.lock();
            let lengths = kept.iter().map(|prefix| shared(prefix.tokens(), prompt));
            let longest = lengths.enumerate().max_by_key(|&(_, length)| length);
            longest.filter(|&(_, length)| length > own).map(|(at, length)| {
                // The one that was used last stands last.
                let prefix = kept.remove(at);
                kept.push(prefix.clone());
                (prefix, length)
            })
        };
        if let Some((prefix, length)) = found
            && let Err(error) = session.adopt(&prefix, length)
        {
            // Then the prompt is evaluated.
            tracing::warn!(%error, "a kept beginning was not taken up");
        }
    }

    /// Keeps what a session has evaluated of its text; what was used longest ago makes room for it.
    pub fn keep(&self, session: &Session) {
        let text = session.tokens();
        {
            let kept = self.lock();
            if self.most_bytes == 0 || kept.iter().any(|prefix| prefix.tokens().starts_with(text)) {
                return;
            }
        }
        let prefix = loop {
            match session.prefix() {
                Ok(prefix) => break Arc::new(prefix),
                Err(Error::Memory { .. }) if !self.lock().is_empty() => drop(self.lock().remove(0)),
                Err(error) => {
                    tracing::debug!(%error, "a beginning was not kept");
                    return;
                }
            }
        };
        if prefix.bytes() > self.most_bytes {
            return;
        }
        let mut kept = self.lock();
        // What it continues is part of it.
        kept.retain(|older| !prefix.tokens().starts_with(older.tokens()));
        kept.push(prefix);
        while kept.iter().map(|prefix| prefix.bytes()).sum::<u64>() > self.most_bytes {
            kept.remove(0);
        }
    }
}

/// Tokens that two texts have in common at their beginnings.
fn shared(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
