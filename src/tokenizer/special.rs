//! Finding the tokens in a text that are taken whole, before anything else is done with it.

use std::ops::Range;

use ahash::AHashMap;

use super::vocab::{TokenType, Vocab};

/// A part of a text.
#[derive(Debug, PartialEq)]
pub(super) enum Part {
    Text(Range<usize>),
    Token(u32),
}

/// Tokens that are taken whole: user-defined ones always, control and unknown ones on demand.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// By length in bytes, longest first.
    by_length: Vec<SameLength>,
}

#[derive(Debug)]
struct SameLength {
    len: usize,
    /// Ids, and whether the token is user-defined.
    ids: AHashMap<Box<[u8]>, (u32, bool)>,
    /// Bytes that one of them begins with.
    first: [bool; 256],
    has_user_defined: bool,
}

impl SpecialTokens {
    pub fn new(vocab: &Vocab) -> Self {
        let mut by_length: AHashMap<usize, SameLength> = AHashMap::new();
        for (id, text, kind) in vocab.iter() {
            let is_user_defined = kind == TokenType::UserDefined;
            let Some(&first) = text.as_bytes().first() else { continue };
            if (!is_user_defined && !kind.is_special()) || vocab.is_bytes(id) {
                continue;
            }
            let group = by_length.entry(text.len()).or_insert_with(|| SameLength {
                len: text.len(),
                ids: AHashMap::new(),
                first: [false; 256],
                has_user_defined: false,
            });
            group.ids.entry(text.as_bytes().into()).or_insert((id, is_user_defined));
            group.first[first as usize] = true;
            group.has_user_defined |= is_user_defined;
        }
        let mut by_length: Vec<_> = by_length.into_values().collect();
        by_length.sort_unstable_by_key(|group| std::cmp::Reverse(group.len));
        SpecialTokens { by_length }
    }

    /// Cuts `text` into tokens and the text between them. A longer token goes before a shorter
    /// one even if that begins further left, as in llama.cpp; of one length the leftmost does.
    pub fn split(&self, text: &str, special: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        if !text.is_empty() {
            parts.push(Part::Text(0..text.len()));
        }
        for group in &self.by_length {
            if special || group.has_user_defined {
                group.split(text.as_bytes(), special, &mut parts);
            }
        }
        parts
    }
}

impl SameLength {
    fn find(&self, text: &[u8], within: Range<usize>, special: bool) -> Option<(usize, u32)> {
        let last = (within.end + 1).checked_sub(self.len)?;
        (within.start..last).find_map(|at| {
            if !self.first[text[at] as usize] {
                return None;
            }
            let &(id, is_user_defined) = self.ids.get(&text[at..at + self.len])?;
            (special || is_user_defined).then_some((at, id))
        })
    }

    fn split(&self, text: &[u8], special: bool, parts: &mut Vec<Part>) {
        let mut i = 0;
        while i < parts.len() {
            let Part::Text(range) = &parts[i] else {
                i += 1;
                continue;
            };
            let Range { mut start, end } = *range;
            let Some(mut found) = self.find(text, start..end, special) else {
                i += 1;
                continue;
            };
            let mut cut = Vec::new();
            loop {
                let (at, id) = found;
                if start < at {
                    cut.push(Part::Text(start..at));
                }
                cut.push(Part::Token(id));
                start = at + self.len;
                match self.find(text, start..end, special) {
                    Some(next) => found = next,
                    None => break,
                }
            }
            if start < end {
                cut.push(Part::Text(start..end));
            }
            let added = cut.len();
            parts.splice(i..=i, cut);
            i += added;
        }
    }
}
