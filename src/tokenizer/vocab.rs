//! The vocabulary as a GGUF file states it: texts, types, scores and the ids with a role.
//!
//! Everything is checked here, so that the rest of the module need not look at the file again.

use std::borrow::Cow;
use std::fmt;

use ahash::AHashMap;

use super::byte_level;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, MAX_TOKENS, Value, ValueType};

/// Longer tokens mean a damaged file (published vocabularies stay below 300 bytes). The limit
/// also bounds the work on a token, which grows with the square of its length.
const MAX_TOKEN: usize = 1024;

/// What SentencePiece writes for a space.
pub(super) const SPACE: char = '\u{2581}';

/// Tokens that end a generation by their name, whatever the metadata says of them: files often
/// name only one of several, and some type them as ordinary text.
const END_NAMES: [&str; 20] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "< EOT >",
    "[EOT]",
    "[EOS]",
    "<|flush|>",
    "<|calls|>",
    "<turn|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

/// Where a vocabulary has both of a pair, `<|end|>` ends a message of several (gpt-oss, Solar Open)
/// and generation goes on.
const MESSAGES_END_OTHERWISE: [[&str; 2]; 2] =
    [["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"]];

/// What a token is for, with the number that GGUF gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TokenType {
    /// No type was given, or one that this version does not know.
    Undefined = 0,
    /// Ordinary text.
    Normal = 1,
    /// Stands for what the vocabulary cannot spell.
    Unknown = 2,
    /// Steers the model and is no text: begin, end, roles of a chat.
    Control = 3,
    /// Text that is always one token, wherever it occurs.
    UserDefined = 4,
    /// Never produced in training.
    Unused = 5,
    /// One byte, written `<0x41>`.
    Byte = 6,
}

impl TokenType {
    fn from_id(id: i128) -> Self {
        use TokenType::*;
        const ALL: [TokenType; 7] =
            [Undefined, Normal, Unknown, Control, UserDefined, Unused, Byte];
        usize::try_from(id).ok().and_then(|i| ALL.get(i)).copied().unwrap_or(Undefined)
    }

    /// Whether it steers the model rather than being text.
    pub fn is_special(self) -> bool {
        matches!(self, TokenType::Control | TokenType::Unknown)
    }
}

impl fmt::Display for TokenType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TokenType::Undefined => "undefined",
            TokenType::Normal => "normal",
            TokenType::Unknown => "unknown",
            TokenType::Control => "control",
            TokenType::UserDefined => "user-defined",
            TokenType::Unused => "unused",
            TokenType::Byte => "byte",
        })
    }
}

/// How a vocabulary spells text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `tokenizer.ggml.model` = `llama` or `gemma4`: pieces of text, `▁` for a space, single bytes
    /// for what no piece spells. Scores, or an ordered list of merges, say how they are found.
    SentencePiece,
    /// `tokenizer.ggml.model` = `gpt2`: pieces of bytes, each byte written as a printable
    /// character, and an ordered list of merges. (A few pre-tokenizers make it the other family.)
    ByteLevel,
}

/// The first token that two vocabularies do not share.
///
/// Displayed for a target (`ours`) and its draft (`theirs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its id.
    pub id: u32,
    /// Text and type in the vocabulary that was asked. The type is told, not compared.
    pub ours: (String, TokenType),
    /// Text and type in the other one.
    pub theirs: (String, TokenType),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { id, ours, theirs } = self;
        write!(
            f,
            "token {id} is {:?} ({}) in the target and {:?} ({}) in the draft",
            ours.0, ours.1, theirs.0, theirs.1
        )
    }
}

/// Bytes by id.
type Bytes = AHashMap<u32, Box<[u8]>>;

/// Texts and types by id, and the ids with a role.
#[derive(Debug)]
pub(super) struct Vocab {
    pub family: Family,
    texts: Vec<Box<str>>,
    types: Vec<TokenType>,
    /// The bytes of tokens that are not UTF-8, of which `texts` has a readable form.
    bytes: Bytes,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    ends: Vec<u32>,
    /// Whether a SentencePiece text starts with a space that is not in the text.
    pub space_prefix: bool,
}

impl Vocab {
    /// Reads the vocabulary; what a person should know of it is added to `notes`.
    ///
    /// `has_prefix`: text begins with a space that is not in it, unless the file says otherwise.
    pub fn read(
        gguf: &Gguf,
        family: Family,
        has_prefix: bool,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let (texts, bytes) = read_texts(gguf)?;
        let len = texts.len();
        if let Some(first) = bytes.keys().min() {
            notes.push(format!(
                "{}: {} of the {len} tokens are not UTF-8, the first is token {first}; they are \
                 bytes when generated and are never found in a text",
                gguf.name(),
                bytes.len()
            ));
        }
        let mut role = |name: &str| role(gguf, name, len, notes);
        let bos = role("bos_token_id")?;
        let eos = role("eos_token_id")?;
        let eot = role("eot_token_id")?;
        let eom = role("eom_token_id")?;
        let unk = role("unknown_token_id")?;
        let stated = read_types(gguf, len)?;
        let is_stated = stated.is_some();
        let mut types = stated.unwrap_or_else(|| vec![TokenType::Normal; len]);

        if !is_stated {
            // Without types the roles are all there is to tell control tokens from text.
            if family == Family::SentencePiece {
                for (kind, text) in types.iter_mut().zip(&texts) {
                    if byte_of(text).is_some() {
                        *kind = TokenType::Byte;
                    }
                }
            }
            for id in [bos, eos, eot, eom].into_iter().flatten() {
                types[id as usize] = TokenType::Control;
            }
            if let Some(id) = unk {
                types[id as usize] = TokenType::Unknown;
            }
        }

        let mut ends: Vec<u32> = [eos, eot, eom].into_iter().flatten().collect();
        let mut named: Vec<(&str, u32)> = Vec::new();
        for (id, text) in (0..).zip(&texts) {
            if END_NAMES.contains(&text.as_ref()) {
                named.push((text, id));
            }
        }
        let has = |name: &&str| named.iter().any(|(text, _)| text == name);
        let end_goes_on = MESSAGES_END_OTHERWISE.iter().any(|pair| pair.iter().all(has));
        for (text, id) in named {
            types[id as usize] = TokenType::Control;
            ends.push(id);
            if text == "<|end|>" && end_goes_on {
                ends.retain(|&end| end != id);
            }
        }
        ends.sort_unstable();
        ends.dedup();

        // The places that SentencePiece gives these by default, where the file does not say.
        let at =
            |id: u32, wanted: TokenType| (types.get(id as usize) == Some(&wanted)).then_some(id);
        let (bos, eos) = match family {
            Family::SentencePiece => (
                bos.or_else(|| at(1, TokenType::Control)),
                eos.or_else(|| at(2, TokenType::Control)),
            ),
            Family::ByteLevel => (bos, eos),
        };
        if let Some(id) = eos
            && let Err(place) = ends.binary_search(&id)
        {
            ends.insert(place, id);
        }
        let unk = unk.or_else(|| {
            types.iter().position(|&kind| kind == TokenType::Unknown).map(|id| id as u32)
        });

        let space_prefix =
            has_prefix && gguf.get_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        Ok(Vocab { family, texts, types, bytes, bos, eos, unk, ends, space_prefix })
    }

    pub fn len(&self) -> usize {
        self.texts.len()
    }

    pub fn text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(|text| &**text)
    }

    pub fn kind(&self, id: u32) -> Option<TokenType> {
        self.types.get(id as usize).copied()
    }

    /// Id, text and type of every token.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &str, TokenType)> {
        (0..).zip(&self.texts).zip(&self.types).map(|((id, text), &kind)| (id, &**text, kind))
    }

    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Whether a token's text is not what the file has, but a readable form of bytes.
    pub fn is_bytes(&self, id: u32) -> bool {
        self.bytes.contains_key(&id)
    }

    /// Ids by text. Of tokens with the same text the first is taken: the others are padding.
    pub fn ids(&self, wanted: impl Fn(TokenType) -> bool) -> AHashMap<String, u32> {
        let mut ids = AHashMap::with_capacity(self.len());
        for (id, text, kind) in self.iter() {
            if wanted(kind) && !text.is_empty() && !self.is_bytes(id) {
                ids.entry(text.to_owned()).or_insert(id);
            }
        }
        ids
    }

    /// Appends the bytes that `id` stands for in a text.
    pub fn put_piece(&self, id: u32, out: &mut Vec<u8>) {
        let (Some(text), Some(kind)) = (self.text(id), self.kind(id)) else { return };
        if let Some(bytes) = self.bytes.get(&id) {
            return out.extend_from_slice(bytes);
        }
        match self.family {
            _ if kind.is_special() => out.extend(text.bytes()),
            Family::SentencePiece => {
                if kind == TokenType::Byte
                    && let Some(byte) = byte_of(text)
                {
                    return out.push(byte);
                }
                let mut utf8 = [0; 4];
                for c in text.chars() {
                    let c = if c == SPACE { ' ' } else { c };
                    out.extend(c.encode_utf8(&mut utf8).bytes());
                }
            }
            Family::ByteLevel if kind == TokenType::UserDefined => out.extend(text.bytes()),
            Family::ByteLevel => byte_level::put_bytes(text, out),
        }
    }

    /// Whether `id` is text that begins with SentencePiece's space.
    pub fn starts_with_space(&self, id: u32) -> bool {
        self.family == Family::SentencePiece
            && self.kind(id).is_some_and(|k| !k.is_special() && k != TokenType::UserDefined)
            && self.text(id).is_some_and(|text| text.starts_with(SPACE))
            && !self.is_bytes(id)
    }

    /// The first token whose text the other vocabulary does not share, of those that both have.
    pub fn first_difference(&self, other: &Vocab) -> Option<Difference> {
        let token = |vocab: &Vocab, id: u32| {
            let text = vocab.text(id).unwrap_or_default().to_owned();
            (text, vocab.kind(id).unwrap_or(TokenType::Undefined))
        };
        let differs = |&id: &u32| {
            (self.text(id), self.bytes.get(&id)) != (other.text(id), other.bytes.get(&id))
        };
        let id = (0..self.len().min(other.len()) as u32).find(differs)?;
        Some(Difference { id, ours: token(self, id), theirs: token(other, id) })
    }
}

/// The byte that a text such as `<0x0A>` names.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The texts of all tokens, and the bytes of those that are not UTF-8.
fn read_texts(gguf: &Gguf) -> Result<(Vec<Box<str>>, Bytes)> {
    const KEY: &str = "tokenizer.ggml.tokens";
    let error = |what: String| Error::format(gguf.name(), format!("`{KEY}`: {what}"));
    let array = gguf.get_array(KEY)?.ok_or_else(|| gguf.missing(KEY))?;
    if array.value_type() != ValueType::String {
        return Err(error(format!("{} elements; strings are needed", array.value_type())));
    }
    if array.is_empty() {
        return Err(error("no token; a vocabulary is needed".into()));
    }
    if array.len() > MAX_TOKENS {
        return Err(error(format!("{} tokens; at most {MAX_TOKENS} are allowed", array.len())));
    }
    let mut texts: Vec<Box<str>> = Vec::with_capacity(array.len());
    let mut odd = AHashMap::new();
    for (id, value) in (0..).zip(array.iter()) {
        let Value::String(bytes) = value else {
            return Err(error(format!("token {id} is no string")));
        };
        if bytes.len() > MAX_TOKEN {
            return Err(error(format!(
                "token {id} is {} bytes long; at most {MAX_TOKEN} are allowed",
                bytes.len()
            )));
        }
        let text = String::from_utf8_lossy(bytes);
        if matches!(text, Cow::Owned(_)) {
            odd.insert(id, bytes.into());
        }
        texts.push(text.into());
    }
    Ok((texts, odd))
}

fn read_types(gguf: &Gguf, len: usize) -> Result<Option<Vec<TokenType>>> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let error = |what: String| Error::format(gguf.name(), format!("`{KEY}`: {what}"));
    let Some(array) = gguf.get_array(KEY)? else { return Ok(None) };
    if array.len() != len {
        return Err(error(format!("{} types for {len} tokens", array.len())));
    }
    let types = array.iter().map(|value| value.as_i128().map(TokenType::from_id));
    types
        .collect::<Option<Vec<_>>>()
        .map(Some)
        .ok_or_else(|| error(format!("{} elements; i32 is needed", array.value_type())))
}

/// The scores of all tokens, if the file has any.
pub(super) fn read_scores(gguf: &Gguf, len: usize) -> Result<Option<Vec<f32>>> {
    const KEY: &str = "tokenizer.ggml.scores";
    let error = |what: String| Error::format(gguf.name(), format!("`{KEY}`: {what}"));
    let Some(array) = gguf.get_array(KEY)? else { return Ok(None) };
    if array.value_type() != ValueType::F32 {
        return Err(error(format!("{} elements; f32 is needed", array.value_type())));
    }
    if array.len() != len {
        return Err(error(format!("{} scores for {len} tokens", array.len())));
    }
    let mut scores = Vec::with_capacity(len);
    for (id, value) in array.iter().enumerate() {
        let score = value.as_f64().unwrap_or(f64::NAN) as f32;
        if score.is_nan() {
            return Err(error(format!("the score of token {id} is not a number")));
        }
        scores.push(score);
    }
    Ok(Some(scores))
}

/// The id that the metadata gives a role. One outside the vocabulary is none, with a note.
fn role(gguf: &Gguf, name: &str, len: usize, notes: &mut Vec<String>) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}");
    match gguf.get_u64(&key)? {
        Some(id) if id >= len as u64 => {
            notes.push(format!(
                "{}: `{key}` is {id}, but the vocabulary has only {len} tokens; it is ignored",
                gguf.name()
            ));
            Ok(None)
        }
        id => Ok(id.map(|id| id as u32)),
    }
}
