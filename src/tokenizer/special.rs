//! Finding the tokens in a text that are taken whole, before anything else is done with it.
//!
//! One walk over the text finds the longest token that ends at each place (Aho-Corasick; the crate
//! `daachorse`, whose automata stay small on any vocabulary). What they end in is known beforehand,
//! so that a token that does not fit gives way to a shorter one without another look at the text.

use std::fmt;
use std::ops::Range;

use ahash::AHashSet;
use daachorse::DoubleArrayAhoCorasick;

use super::vocab::{TokenType, Vocab};
use crate::error::{Error, Result};

/// The most bytes of all tokens together that are taken whole: many times those of published
/// vocabularies. The automaton takes some ten times as much while it is built.
const MOST_BYTES: usize = 1 << 24;

/// A part of a text.
#[derive(Debug, PartialEq)]
pub(super) enum Part {
    Text(Range<usize>),
    Token(u32),
}

/// Tokens that are taken whole: user-defined ones always, control and unknown ones on demand.
pub(super) struct SpecialTokens {
    /// By number. Of tokens with one text the first counts.
    tokens: Vec<Special>,
    /// Finds them by number; none if there are none.
    automaton: Option<DoubleArrayAhoCorasick<u32>>,
    has_user_defined: bool,
}

impl fmt::Debug for SpecialTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpecialTokens").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Special {
    id: u32,
    /// In bytes.
    len: usize,
    is_user_defined: bool,
    /// The longest of the others that it ends in.
    shorter: Option<u32>,
    /// The longest user-defined one that it ends in, which may be itself.
    user_defined: Option<u32>,
}

impl SpecialTokens {
    /// Those of a vocabulary; `file` is its name for messages.
    ///
    /// # Errors
    /// They are too long together.
    pub fn new(file: &str, vocab: &Vocab) -> Result<Self> {
        let mut seen = AHashSet::new();
        let whole = vocab.iter().filter(|&(id, text, kind)| {
            let is_whole = kind == TokenType::UserDefined || kind.is_special();
            is_whole && !text.is_empty() && !vocab.is_bytes(id) && seen.insert(text)
        });
        let found: Vec<_> = whole.map(|(id, text, kind)| (id, text.as_bytes(), kind)).collect();
        let bytes: usize = found.iter().map(|(_, text, _)| text.len()).sum();
        if bytes > MOST_BYTES {
            let what = format!(
                "`tokenizer.ggml.tokens`: control and user-defined tokens have {bytes} bytes \
                 together; at most {MOST_BYTES} are allowed"
            );
            return Err(Error::format(file, what));
        }
        let mut tokens: Vec<_> = found
            .iter()
            .map(|&(id, text, kind)| Special {
                id,
                len: text.len(),
                is_user_defined: kind == TokenType::UserDefined,
                shorter: None,
                user_defined: None,
            })
            .collect();
        let has_user_defined = tokens.iter().any(|token| token.is_user_defined);
        if tokens.is_empty() {
            return Ok(SpecialTokens { tokens, automaton: None, has_user_defined });
        }
        let patterns = (0u32..).zip(&found).map(|(number, (_, text, _))| (text, number));
        let automaton = DoubleArrayAhoCorasick::with_values(patterns)
            .map_err(|e| Error::format(file, format!("`tokenizer.ggml.tokens`: {e}")))?;
        let mut by_length: Vec<usize> = (0..tokens.len()).collect();
        by_length.sort_by_key(|&number| tokens[number].len);
        for number in by_length {
            let mut stepper = automaton.find_overlapping_stepper();
            found[number].1.iter().for_each(|&byte| stepper.consume(byte));
            // The longest comes first, and is the token itself.
            let shorter = stepper.matches().nth(1).map(|other| other.value());
            let user_defined = match tokens[number].is_user_defined {
                true => Some(number as u32),
                false => shorter.and_then(|shorter| tokens[shorter as usize].user_defined),
            };
            (tokens[number].shorter, tokens[number].user_defined) = (shorter, user_defined);
        }
        Ok(SpecialTokens { tokens, automaton: Some(automaton), has_user_defined })
    }

    /// Cuts `text` into tokens and the text between them. A longer token goes before a shorter
    /// one even if that begins further left, as in llama.cpp; of one length the leftmost does.
    ///
    /// The time grows with the text, however many tokens there are; what grows with the longest
    /// token is a number of look-ups in a small table.
    pub fn split(&self, text: &str, special: bool) -> Vec<Part> {
        let mut taken = match &self.automaton {
            Some(automaton) if special || self.has_user_defined => {
                self.find(automaton, text.as_bytes(), special)
            }
            _ => Vec::new(),
        };
        taken.sort_unstable_by_key(|(start, _)| *start);
        let mut parts = Vec::with_capacity(2 * taken.len() + 1);
        let mut done = 0;
        for (start, number) in taken {
            if done < start {
                parts.push(Part::Text(done..start));
            }
            let token = &self.tokens[number as usize];
            parts.push(Part::Token(token.id));
            done = start + token.len;
        }
        if done < text.len() {
            parts.push(Part::Text(done..text.len()));
        }
        parts
    }

    /// Where tokens are taken, in no order: (start, number).
    fn find(
        &self,
        automaton: &DoubleArrayAhoCorasick<u32>,
        text: &[u8],
        special: bool,
    ) -> Vec<(usize, u32)> {
        // A token, or else the longest allowed one that it ends in.
        let allowed = |number: u32| match special {
            true => Some(number),
            false => self.tokens[number as usize].user_defined,
        };
        // The longest token that ends at a place, by length: (end, number).
        let mut waiting: Vec<Vec<(usize, u32)>> = Vec::new();
        let wait = |waiting: &mut Vec<Vec<_>>, end: usize, number: u32| {
            let len = self.tokens[number as usize].len;
            if waiting.len() <= len {
                waiting.resize_with(len + 1, Vec::new);
            }
            waiting[len].push((end, number));
        };
        for found in automaton.find_overlapping_no_suffix_iter(text) {
            if let Some(number) = allowed(found.value()) {
                wait(&mut waiting, found.end(), number);
            }
        }
        if waiting.is_empty() {
            return Vec::new();
        }
        // Bytes from each byte to the end of the token that has it; 0 where none has.
        let mut held = vec![0u16; text.len()];
        let mut taken = Vec::new();
        while let Some(mut same) = waiting.pop() {
            same.sort_unstable();
            for (end, number) in same {
                let start = end - self.tokens[number as usize].len;
                // What was taken is at least as long: it has one of the ends, or nothing of this.
                if held[end - 1] != 0 {
                    continue;
                }
                if held[start] == 0 {
                    for (byte, left) in held[start..end].iter_mut().rev().zip(1..) {
                        *byte = left;
                    }
                    taken.push((start, number));
                    continue;
                }
                // The longest that fits between what was taken and the end.
                let room = end - (start + usize::from(held[start]));
                let mut shorter = Some(number);
                while let Some(number) = shorter
                    && self.tokens[number as usize].len > room
                {
                    shorter = self.tokens[number as usize].shorter.and_then(allowed);
                }
                if let Some(number) = shorter {
                    wait(&mut waiting, end, number);
                }
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Gguf, OwnedValue, Writer};
    use crate::tokenizer::Family;

    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const USER_DEFINED: i32 = 4;

    fn special(tokens: &[(&str, i32)]) -> Result<SpecialTokens> {
        let mut writer = Writer::new();
        let texts = tokens.iter().map(|(text, _)| (*text).to_owned()).collect();
        let kinds = tokens.iter().map(|(_, kind)| *kind).collect();
        writer.set("tokenizer.ggml.tokens", OwnedValue::Strings(texts));
        writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(kinds));
        let file = Gguf::from_vec("test.gguf", writer.to_vec()).unwrap();
        SpecialTokens::new(
            "test.gguf",
            &Vocab::read(&file, Family::SentencePiece, true, &mut Vec::new()).unwrap(),
        )
    }

    /// The rule in its plainest form: all tokens of a length, the longest first, each from the left
    /// in the text that is still left.
    fn by_the_rule(tokens: &[(&str, i32)], text: &str, special: bool) -> Vec<Part> {
        let mut seen = std::collections::HashSet::new();
        let mut tokens: Vec<(usize, &str, i32)> = (0..)
            .zip(tokens)
            .map(|(id, &(text, kind))| (id, text, kind))
            .filter(|(_, text, kind)| *kind != NORMAL && !text.is_empty() && seen.insert(*text))
            .filter(|(_, _, kind)| special || *kind == USER_DEFINED)
            .collect();
        tokens.sort_by_key(|(_, text, _)| std::cmp::Reverse(text.len()));
        let mut owner: Vec<Option<usize>> = vec![None; text.len()];
        for same in tokens.chunk_by(|a, b| a.1.len() == b.1.len()) {
            let len = same[0].1.len();
            for start in 0..(text.len() + 1).saturating_sub(len) {
                let bytes = &text.as_bytes()[start..start + len];
                let found = same.iter().find(|(_, text, _)| text.as_bytes() == bytes);
                if let (Some(found), true) =
                    (found, owner[start..start + len].iter().all(Option::is_none))
                {
                    // (The number tells neighbours apart.)
                    owner[start..start + len].fill(Some(start << 8 | found.0));
                }
            }
        }
        let mut parts = Vec::new();
        let mut at = 0;
        for same in owner.chunk_by(|a, b| a == b) {
            parts.push(match same[0] {
                Some(owner) => Part::Token((owner & 0xff) as u32),
                None => Part::Text(at..at + same.len()),
            });
            at += same.len();
        }
        parts
    }

    #[test]
    fn longer_tokens_go_first_and_then_those_further_left() {
        let tokens = [("ab", USER_DEFINED), ("bcd", CONTROL), ("cd", USER_DEFINED), ("x", NORMAL)];
        let special = special(&tokens).unwrap();
        use Part::{Text, Token};
        assert_eq!(special.split("abcdx", true), [Text(0..1), Token(1), Text(4..5)]);
        assert_eq!(special.split("abcdx", false), [Token(0), Token(2), Text(4..5)]);
        assert_eq!(special.split("", true), []);
        assert_eq!(special.split("xyz", true), [Text(0..3)]);
        assert_eq!(special.split("ababab", false), [Token(0), Token(0), Token(0)]);
    }

    #[test]
    fn texts_are_cut_by_the_rule() {
        let mut state = 7u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let (mut cut, mut whole) = (0, 0);
        for round in 0..3000 {
            // Few letters and many tokens: all ways to overlap.
            let letters = ["a", "b", "c", "ö"];
            let letters = &letters[..1 + next(4)];
            let mut word = |most: usize| -> String {
                (0..=next(most)).map(|_| letters[next(letters.len())]).collect()
            };
            let texts: Vec<String> = (0..1 + round % 12).map(|_| word(7)).collect();
            let text = word(60);
            let kinds = [NORMAL, CONTROL, USER_DEFINED, USER_DEFINED];
            let tokens: Vec<_> =
                texts.iter().map(|text| (text.as_str(), kinds[next(kinds.len())])).collect();
            let special = special(&tokens).unwrap();
            for on_demand in [false, true] {
                let parts = special.split(&text, on_demand);
                assert_eq!(parts, by_the_rule(&tokens, &text, on_demand), "{tokens:?} {text:?}");
                cut += usize::from(parts.len() > 1);
                whole += usize::from(parts.len() == 1);
            }
        }
        assert!(cut > 1000 && whole > 100, "{cut} {whole}");
    }

    #[test]
    fn very_many_long_tokens_are_refused() {
        let long: Vec<String> = (0..(MOST_BYTES >> 10) + 1).map(|i| format!("{i:01024}")).collect();
        let tokens: Vec<_> = long.iter().map(|text| (text.as_str(), CONTROL)).collect();
        let error = special(&tokens).unwrap_err().to_string();
        assert!(error.contains("at most 16777216"), "{error}");
    }
}
