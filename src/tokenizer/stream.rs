//! From tokens back to text, one token at a time.

use std::sync::Arc;

use super::vocab::{TokenType, Vocab};

/// Turns tokens into text as they come.
///
/// A character whose bytes are spread over several tokens appears with its last byte; what can
/// no longer become a character is replaced by U+FFFD, as [`String::from_utf8_lossy`] does. The
/// pieces of text that come out are the same as if all tokens had been decoded at once.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    vocab: Arc<Vocab>,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    /// Whether the next text begins with a space that encoding put there.
    strips_space: bool,
    shows_special: bool,
}

impl StreamDecoder {
    pub(super) fn new(vocab: Arc<Vocab>, is_start: bool) -> Self {
        let strips_space = is_start && vocab.space_prefix;
        StreamDecoder { vocab, pending: Vec::new(), strips_space, shows_special: false }
    }

    /// Whether control tokens appear as text, by their name. They do not unless this is set.
    pub fn show_special(mut self, show: bool) -> Self {
        self.shows_special = show;
        self
    }

    /// Takes a token and returns the text that is complete with it, which may be empty.
    /// An id outside the vocabulary is no text.
    pub fn push(&mut self, id: u32) -> String {
        let Some(kind) = self.vocab.kind(id) else { return String::new() };
        if kind.is_special() && !self.shows_special {
            return String::new();
        }
        let start = self.pending.len();
        self.vocab.put_piece(id, &mut self.pending);
        if self.strips_space && kind != TokenType::Control {
            if self.vocab.starts_with_space(id) {
                self.pending.remove(start);
            }
            self.strips_space = false;
        }
        self.take_complete()
    }

    /// The text of bytes that never became a character. The decoder can go on afterwards.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::with_capacity(self.pending.len());
        let mut done = 0;
        loop {
            let rest = &self.pending[done..];
            let (valid, broken) = match std::str::from_utf8(rest) {
                Ok(_) => (rest.len(), Some(0)),
                Err(e) => (e.valid_up_to(), e.error_len()),
            };
            text.push_str(&String::from_utf8_lossy(&rest[..valid]));
            done += valid;
            match broken {
                Some(len) if len > 0 => {
                    text.push(char::REPLACEMENT_CHARACTER);
                    done += len;
                }
                // All is valid, or the rest is the start of a character.
                _ => break,
            }
        }
        self.pending.drain(..done);
        text
    }
}
