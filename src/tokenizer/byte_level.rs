//! Byte-level BPE: text is cut into words by a pattern, the bytes of a word are written as
//! printable characters, and merges are applied in the order in which training found them.

use ahash::{AHashMap, AHashSet};
use tokenizers::Model;
use tokenizers::models::bpe::BPE;
use tokenizers::utils::SysRegex;

use super::vocab::Vocab;
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

/// GPT-2's words, without the look-ahead of its last alternatives `\s+(?!\S)|\s+`:
/// [`Words::split`] does what that does, so that matching takes linear time and hits no limit.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// Llama 3's words, with the same change.
const LLAMA3: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
);

/// Qwen2's words, which are Llama 3's but for digits: each is a word.
const QWEN2: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
);

/// How text is cut into words before merging (`tokenizer.ggml.pre`).
#[derive(Debug)]
struct PreTokenizer {
    words: Words,
    /// What a file gets that names none: words within and between runs of punctuation, numbers
    /// apart from the space before them and in groups of three.
    default: Option<Box<DefaultCuts>>,
}

#[derive(Debug)]
struct DefaultCuts {
    punctuation: SysRegex,
    numbers: SysRegex,
    triples: SysRegex,
}

/// A pattern whose alternatives cover every character.
#[derive(Debug)]
struct Words {
    regex: SysRegex,
    /// White space that ends in a line's end is a word of its own kind and is kept whole.
    keeps_line_ends: bool,
}

impl PreTokenizer {
    /// The pre-tokenizer that the file names, and whether it is Llama 3's.
    fn read(gguf: &Gguf) -> Result<(Self, bool)> {
        let regex = |pattern: &str| {
            SysRegex::new(pattern)
                .map_err(|e| Error::invalid(format!("pre-tokenizer `{pattern}`: {e}")))
        };
        let words = |pattern: &str, keeps_line_ends| {
            Ok::<_, Error>(Words { regex: regex(pattern)?, keeps_line_ends })
        };
        match gguf.get_str("tokenizer.ggml.pre")? {
            None | Some("" | "default") => {
                let cuts = DefaultCuts {
                    punctuation: regex(r"[\p{P}$+<=>^~|]+")?,
                    numbers: regex(r"\p{N}+")?,
                    triples: regex("[0-9][0-9][0-9]")?,
                };
                let words = words(GPT2, false)?;
                Ok((PreTokenizer { words, default: Some(Box::new(cuts)) }, false))
            }
            Some("gpt-2") => {
                Ok((PreTokenizer { words: words(GPT2, false)?, default: None }, false))
            }
            Some("llama-bpe" | "llama3" | "llama-v3") => {
                Ok((PreTokenizer { words: words(LLAMA3, true)?, default: None }, true))
            }
            Some("qwen2") => {
                Ok((PreTokenizer { words: words(QWEN2, true)?, default: None }, false))
            }
            Some(other) => Err(Error::unsupported(
                gguf.name(),
                format!(
                    "pre-tokenizer {other:?} (`tokenizer.ggml.pre`) is not supported; \
                     `default`, `llama-bpe` (`llama3`, `llama-v3`), `qwen2` and `gpt-2` are"
                ),
            )),
        }
    }

    /// Gives every word of `text` to `take`, in order and without gaps.
    fn split(&self, text: &str, take: &mut impl FnMut(&str)) {
        let Some(cuts) = &self.default else { return self.words.split(text, take) };
        isolate(&cuts.punctuation, text, &mut |part: &str| {
            self.words.split(part, &mut |word: &str| {
                if word.ends_with(char::is_numeric) {
                    isolate(&cuts.numbers, word, &mut |part: &str| {
                        isolate(&cuts.triples, part, take);
                    });
                } else {
                    take(word);
                }
            });
        });
    }
}

/// Cuts `text` at both ends of every match.
fn isolate(regex: &SysRegex, text: &str, take: &mut impl FnMut(&str)) {
    let mut done = 0;
    for (start, end) in regex.find_iter(text) {
        if done < start {
            take(&text[done..start]);
        }
        take(&text[start..end]);
        done = end;
    }
    if done < text.len() {
        take(&text[done..]);
    }
}

impl Words {
    /// Cuts `text` into matches.
    ///
    /// White space in front of a word gives its last character back, so that the word can take
    /// it. Only `\s+` ends in white space, or, where line ends are kept, in other white space
    /// than those: the last character tells that it was this alternative which matched.
    fn split(&self, text: &str, take: &mut impl FnMut(&str)) {
        let mut rest = text;
        while let Some((_, mut end)) = self.regex.find_iter(rest).next() {
            let last = rest[..end].chars().next_back().unwrap_or('x');
            let is_space =
                last.is_whitespace() && !(self.keeps_line_ends && matches!(last, '\r' | '\n'));
            if is_space && end < rest.len() && end > last.len_utf8() {
                end -= last.len_utf8();
            }
            let (word, after) = rest.split_at(end);
            take(word);
            rest = after;
        }
        if !rest.is_empty() {
            take(rest);
        }
    }
}

/// The merges and the way to the words that they apply to.
#[derive(Debug)]
pub(super) struct ByteLevel {
    pre: PreTokenizer,
    bpe: BPE,
    pub is_llama3: bool,
}

impl ByteLevel {
    pub fn build(gguf: &Gguf, vocab: &Vocab) -> Result<Self> {
        // First, because it is cheap and says most when it fails.
        let (pre, is_llama3) = PreTokenizer::read(gguf)?;
        let ids = vocab.ids(|_| true);
        let merges = read_merges(gguf, &ids)?;
        let mut builder =
            BPE::builder().vocab_and_merges(ids, merges).ignore_merges(is_llama3).fuse_unk(true);
        if let Some(unk) = vocab.unk.and_then(|id| vocab.text(id)).filter(|text| !text.is_empty()) {
            builder = builder.unk_token(unk.to_owned());
        }
        let bpe =
            builder.build().map_err(|e| Error::format(gguf.name(), format!("merges: {e}")))?;
        Ok(ByteLevel { pre, bpe, is_llama3 })
    }

    /// Appends the ids of `text`, which holds no special token. Bytes that the vocabulary lacks
    /// become the unknown token, or nothing where there is none.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut spelled = String::new();
        self.pre.split(text, &mut |word: &str| {
            spelled.clear();
            spelled.extend(word.bytes().map(|byte| ALPHABET[byte as usize]));
            // Fails only for an unknown token outside the vocabulary, which `build` rules out.
            let tokens = self.bpe.tokenize(&spelled).unwrap_or_default();
            ids.extend(tokens.iter().map(|token| token.id));
        });
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
    use crate::gguf::Writer;

    fn pre_tokenizer(name: &str) -> PreTokenizer {
        let mut writer = Writer::new();
        writer.set("tokenizer.ggml.pre", name);
        PreTokenizer::read(&Gguf::from_vec("test.gguf", writer.to_vec()).unwrap()).unwrap().0
    }

    fn split(pre: &PreTokenizer, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        pre.split(text, &mut |word: &str| words.push(word.to_owned()));
        assert_eq!(words.concat(), text);
        words
    }

    #[test]
    fn the_alphabet_goes_both_ways() {
        for byte in 0..=255u8 {
            let mut out = Vec::new();
            put_bytes(&ALPHABET[byte as usize].to_string(), &mut out);
            assert_eq!(out, [byte]);
        }
        assert_eq!((ALPHABET[b' ' as usize], ALPHABET[b'\n' as usize]), ('Ġ', 'Ċ'));
    }

    #[test]
    fn spaces_go_to_the_word_behind_them() {
        let [gpt2, llama3, qwen2] = ["gpt-2", "llama-bpe", "qwen2"].map(pre_tokenizer);
        let text = "I'll  go\n\n now,\t\t12345   ";
        let words = ["I", "'ll", " ", " go", "\n\n", " now", ",", "\t", "\t", "12345", "   "];
        assert_eq!(split(&gpt2, text), words);
        let words = ["I", "'ll", " ", " go", "\n\n", " now", ",", "\t", "\t", "123", "45", "   "];
        assert_eq!(split(&llama3, text), words);
        let words = [
            "I", "'ll", " ", " go", "\n\n", " now", ",", "\t", "\t", "1", "2", "3", "4", "5", "   ",
        ];
        assert_eq!(split(&qwen2, text), words);
        assert_eq!(split(&gpt2, "\n\nx"), ["\n", "\n", "x"]);
        assert_eq!(split(&llama3, "\n\nx"), ["\n\n", "x"]);
        assert_eq!(split(&llama3, " \n  x!\n\ny'S"), [" \n", " ", " x", "!\n\n", "y", "'S"]);
    }

    #[test]
    fn the_default_cuts_punctuation_and_numbers_apart() {
        let words = ["don", "'", "t", " ", "123", "4", " a", " ", "+=", "  ", "...", "½", "x"];
        assert_eq!(split(&pre_tokenizer("default"), "don't 1234 a +=  ...½x"), words);
    }

    /// Applies patterns one after another, each within the parts that the one before it left.
    fn split_by_all(patterns: &[SysRegex], text: &str) -> Vec<String> {
        let mut parts = vec![text.to_owned()];
        for pattern in patterns {
            let mut cut = Vec::new();
            for part in &parts {
                isolate(pattern, part, &mut |word: &str| cut.push(word.to_owned()));
            }
            parts = cut;
        }
        parts
    }

    #[test]
    fn words_are_those_of_the_published_patterns() {
        const GPT2: &str =
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        const LLAMA3: &str = concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        const QWEN2: &str = concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];
        const BITS: [&str; 30] = [
            " ", "  ", "   ", "\t", "\n", "\r\n", "\u{a0}", "\u{2003}", "a", "Wörter", "かな",
            "'s", "'", "'LL", "1", "23", "4567", "½", "٣", "!", "...", "+=", "$", "_", "🦙",
            "\u{301}", "ª", "`", "^", "x",
        ];
        let published: [(&str, &[&str]); 4] = [
            ("gpt-2", &[GPT2]),
            ("llama-bpe", &[LLAMA3]),
            ("qwen2", &[QWEN2]),
            ("default", &DEFAULT),
        ];
        for (name, patterns) in published {
            let pre = pre_tokenizer(name);
            let patterns: Vec<_> = patterns.iter().map(|p| SysRegex::new(p).unwrap()).collect();
            let mut state = 1u64;
            for _ in 0..5000 {
                let mut text = String::new();
                for _ in 0..12 {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    text.push_str(BITS[(state >> 33) as usize % BITS.len()]);
                }
                assert_eq!(split(&pre, &text), split_by_all(&patterns, &text), "{name}: {text:?}");
            }
        }
    }
}
