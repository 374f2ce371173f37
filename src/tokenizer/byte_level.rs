//! BPE with listed merges: text is cut into words (`pre_tokenizer.rs`), the bytes of a word are
//! written as printable characters, and merges are applied in the order in which training found
//! them. A few vocabularies (Gemma 4) merge text instead of bytes, with `▁` for a space, and write
//! bytes only for what no token spells.

use ahash::{AHashMap, AHashSet};
use tokenizers::Model;
use tokenizers::models::bpe::BPE;

use super::pre_tokenizer::{PreTokenizer, Spelling};
use super::sentencepiece::{at_spaces, splits_at_spaces};
use super::vocab::{SPACE, Vocab, byte_of};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, ValueType};

/// The character that stands for each byte: itself where it is printable in Latin-1, otherwise
/// the next unused one from U+0100.
const ALPHABET: [char; 256] = alphabet();

const fn is_printable(byte: u32) -> bool {
    matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)
}

const fn alphabet() -> [char; 256] {
    let mut table = ['\0'; 256];
    let mut byte = 0;
    let mut next = 0x100;
    while byte < 256 {
        let code = if is_printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        if let Some(c) = char::from_u32(code) {
            table[byte as usize] = c;
        }
        byte += 1;
    }
    table
}

/// The byte for each code point of the alphabet, -1 where there is none.
const BYTES: [i16; 0x144] = {
    let mut table = [-1; 0x144];
    let mut byte = 0;
    while byte < 256 {
        table[ALPHABET[byte] as usize] = byte as i16;
        byte += 1;
    }
    table
};

/// Appends the bytes that a token's text stands for. Characters outside the alphabet, which only
/// odd vocabularies have, stand for themselves.
pub(super) fn put_bytes(text: &str, out: &mut Vec<u8>) {
    let mut utf8 = [0; 4];
    for c in text.chars() {
        match BYTES.get(c as usize) {
            Some(&byte) if byte >= 0 => out.push(byte as u8),
            _ => out.extend(c.encode_utf8(&mut utf8).bytes()),
        }
    }
}

/// Words that are remembered while a text is encoded: longer ones hardly come again.
const MAX_KNOWN: usize = 48;

/// So many words are remembered, so that memory stays bounded.
const MAX_WORDS: usize = 1 << 16;

/// The merges and the way to the words that they apply to.
#[derive(Debug)]
pub(super) struct ByteLevel {
    pre: PreTokenizer,
    bpe: BPE,
    /// Of texts that are spelled as text.
    text: Option<Box<TextSpelling>>,
}

/// What is particular to vocabularies whose tokens are text rather than spelled bytes.
#[derive(Debug)]
struct TextSpelling {
    /// Runs of line ends that are tokens.
    lines: AHashMap<String, u32>,
    /// The characters that are tokens. Merges go up to those that are not.
    chars: AHashSet<char>,
    /// The tokens of single bytes, as far as there are any.
    bytes: [Option<u32>; 256],
    /// Whether no token has a `▁` behind another character. Then no merge crosses the start of a
    /// run of spaces, and words can be looked up one by one.
    splits_at_spaces: bool,
}

impl ByteLevel {
    pub fn build(gguf: &Gguf, vocab: &Vocab, pre: PreTokenizer) -> Result<Self> {
        let ids = vocab.ids(|_| true);
        let merges = read_merges(gguf, &ids)?;
        let is_text = pre.spelling == Spelling::Text;
        let text = is_text.then(|| Box::new(TextSpelling::new(vocab, &ids, pre.whole_lines)));
        let mut builder = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(pre.whole_words)
            .fuse_unk(true);
        // Text has bytes for what is unknown.
        let unk = vocab.unk.filter(|_| !is_text);
        if let Some(unk) = unk.and_then(|id| vocab.text(id)).filter(|text| !text.is_empty()) {
            builder = builder.unk_token(unk.to_owned());
        }
        let bpe =
            builder.build().map_err(|e| Error::format(gguf.name(), format!("merges: {e}")))?;
        Ok(ByteLevel { pre, bpe, text })
    }

    /// Appends the ids of `text`, which holds no special token. Bytes that the vocabulary lacks
    /// become the unknown token, or nothing where there is none.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        // The place in `ids` of every word that came before.
        let mut known: AHashMap<&str, (usize, usize)> = AHashMap::new();
        let mut spelled = String::new();
        let spaced: String;
        let text = match self.text {
            Some(_) => {
                spaced = text.replace(' ', SPACE.encode_utf8(&mut [0; 4]));
                &spaced
            }
            None => text,
        };
        self.pre.split(text, &mut |word| {
            let mut encode = |word| {
                if let Some(&(start, end)) = known.get(word) {
                    return ids.extend_from_within(start..end);
                }
                let start = ids.len();
                self.encode_word(word, &mut spelled, ids);
                if word.len() <= MAX_KNOWN && known.len() < MAX_WORDS {
                    known.insert(word, (start, ids.len()));
                }
            };
            match &self.text {
                Some(text) if text.splits_at_spaces => at_spaces(word, encode),
                _ => encode(word),
            }
        });
    }

    fn encode_word(&self, word: &str, spelled: &mut String, ids: &mut Vec<u32>) {
        match &self.text {
            Some(text) => text.encode(word, ids, |part, ids| self.merge(part, ids)),
            None => {
                spelled.clear();
                spelled.extend(word.bytes().map(|byte| ALPHABET[byte as usize]));
                self.merge(spelled, ids);
            }
        }
    }

    fn merge(&self, spelled: &str, ids: &mut Vec<u32>) {
        // Fails only for an unknown token outside the vocabulary, which `build` rules out.
        let tokens = self.bpe.tokenize(spelled).unwrap_or_default();
        ids.extend(tokens.iter().map(|token| token.id));
    }
}

impl TextSpelling {
    fn new(vocab: &Vocab, ids: &AHashMap<String, u32>, whole_lines: bool) -> Self {
        let is_lines = |text: &str| text.chars().all(|c| c == '\n');
        let lines = ids.iter().filter(|(text, _)| whole_lines && is_lines(text));
        let single = |text: &String| {
            let mut chars = text.chars();
            chars.next().filter(|_| chars.next().is_none())
        };
        let mut bytes = [None; 256];
        for (id, text, _) in vocab.iter() {
            if let Some(byte) = byte_of(text) {
                bytes[byte as usize].get_or_insert(id);
            }
        }
        TextSpelling {
            lines: lines.map(|(text, &id)| (text.clone(), id)).collect(),
            chars: ids.keys().filter_map(single).collect(),
            bytes,
            splits_at_spaces: splits_at_spaces(ids),
        }
    }

    /// Appends the ids of a word, of which `merge` encodes the parts that have tokens.
    fn encode(&self, word: &str, ids: &mut Vec<u32>, merge: impl Fn(&str, &mut Vec<u32>)) {
        if let Some(&id) = self.lines.get(word) {
            return ids.push(id);
        }
        let mut start = 0;
        for (at, c) in word.char_indices().filter(|(_, c)| !self.chars.contains(c)) {
            if start < at {
                merge(&word[start..at], ids);
            }
            start = at + c.len_utf8();
            ids.extend(word[at..start].bytes().filter_map(|byte| self.bytes[byte as usize]));
        }
        if start < word.len() {
            merge(&word[start..], ids);
        }
    }
}

/// The merges, each checked to join two tokens to a third.
fn read_merges(gguf: &Gguf, ids: &AHashMap<String, u32>) -> Result<Vec<(String, String)>> {
    const KEY: &str = "tokenizer.ggml.merges";
    let error = |what: String| Error::format(gguf.name(), format!("`{KEY}`: {what}"));
    let array = gguf.get_array(KEY)?.ok_or_else(|| gguf.missing(KEY))?;
    if array.value_type() != ValueType::String {
        return Err(error(format!("{} elements; strings are needed", array.value_type())));
    }
    let mut merges = Vec::with_capacity(array.len());
    let mut seen = AHashSet::with_capacity(array.len());
    let mut joined = String::new();
    for (rank, value) in array.iter().enumerate() {
        let merge =
            value.as_str().ok_or_else(|| error(format!("merge {rank} is not valid UTF-8")))?;
        // A first half may itself begin with a space.
        let halves = merge
            .char_indices()
            .find(|&(at, c)| at > 0 && c == ' ')
            .map(|(at, _)| (&merge[..at], &merge[at + 1..]))
            .filter(|(_, right)| !right.is_empty());
        let Some((left, right)) = halves else {
            return Err(error(format!(
                "merge {rank} is {value}; two tokens with a space between them are needed"
            )));
        };
        joined.clear();
        joined.extend([left, right]);
        let id = |text: &str| {
            ids.get(text).copied().ok_or_else(|| {
                error(format!("merge {rank} is {value}; there is no token {text:?}"))
            })
        };
        let pair = (id(left)?, id(right)?);
        id(&joined)?;
        // Of two merges of the same pair the first counts.
        if seen.insert(pair) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_goes_both_ways() {
        for byte in 0..=255u8 {
            let mut out = Vec::new();
            put_bytes(&ALPHABET[byte as usize].to_string(), &mut out);
            assert_eq!(out, [byte]);
        }
        assert_eq!((ALPHABET[b' ' as usize], ALPHABET[b'\n' as usize]), ('Ġ', 'Ċ'));
    }
}
