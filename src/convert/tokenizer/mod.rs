//! A checkpoint's tokenizer as GGUF metadata.
//!
//! The vocabulary comes from `tokenizer.model` (SentencePiece), or else `tokenizer.json`, or else
//! `vocab.json` with `merges.txt`; special tokens, their roles and the chat template from the
//! small files beside them. Types, scores and padding are chosen as llama.cpp's converter does.

mod byte_pairs;
mod json;
mod sentencepiece;
mod special;

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::json::Object;
use crate::error::{Error, Result};
use crate::gguf::{MAX_TOKENS, OwnedValue};

use special::Special;

/// The score of tokens that are not found by merging.
const NO_SCORE: f32 = -1000.0;

/// What a token is for, with the number that GGUF gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// A token of the new file.
#[derive(Debug, Clone, PartialEq)]
struct Token {
    text: String,
    score: f32,
    kind: Kind,
}

impl Token {
    /// A place in the embedding that no token has.
    fn padding(id: usize) -> Self {
        Token { text: format!("[PAD{id}]"), score: NO_SCORE, kind: Kind::Unused }
    }
}

/// How a vocabulary spells text.
#[derive(Debug, Clone, PartialEq)]
enum Family {
    /// GGUF's `llama`.
    SentencePiece {
        /// Whether a text begins with a space of the tokenizer's own.
        space_prefix: bool,
    },
    /// GGUF's `gpt2`.
    ByteLevel {
        /// GGUF's name for how text is cut into words.
        pre: &'static str,
        /// Two tokens each, with a space between them, in the order of training.
        merges: Vec<String>,
    },
}

/// A vocabulary as a file of the checkpoint states it.
#[derive(Debug)]
struct Vocabulary {
    /// The file that it comes from.
    file: String,
    family: Family,
    tokens: Vec<Token>,
    /// Tokens that the file lists apart, which are taken whole.
    added: Vec<Added>,
    /// The ids with a role, where the file itself knows them.
    roles: Roles,
    begins: Begins,
    /// What a person should know.
    notes: Vec<String>,
}

/// What a file says of how texts begin.
#[derive(Debug)]
enum Begins {
    /// Nothing.
    Unsaid,
    /// With their first character.
    Plain,
    /// With this token.
    With(String),
}

/// A token that is taken whole wherever its text occurs.
#[derive(Debug, Clone)]
struct Added {
    id: u64,
    text: String,
    /// Steers the model and is no text.
    control: bool,
}

impl Added {
    /// Names such as `<|fim_prefix|>` steer the model whatever a file says of them, as llama.cpp's
    /// converter knows.
    fn new(id: u64, text: &str, special: bool) -> Self {
        let control = special || (text.starts_with("<|") && text.ends_with("|>"));
        Added { id, text: text.to_owned(), control }
    }
}

/// Ids with a role.
#[derive(Debug, Clone, Copy, Default)]
struct Roles {
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    pad: Option<u32>,
}

/// What the model says that a vocabulary has to fit.
pub(super) struct Model<'a> {
    /// GGUF's name of the architecture.
    pub architecture: &'a str,
    /// Rows of the embedding.
    pub vocab_size: u64,
    pub config: &'a Object,
    pub generation: Option<&'a Object>,
}

/// The metadata of a tokenizer.
#[derive(Debug)]
pub(super) struct Tokenizer {
    pub metadata: Vec<(String, OwnedValue)>,
    /// GGUF's name of it: `llama` or `gpt2`.
    pub model: &'static str,
    /// Tokens that are no padding.
    pub tokens: usize,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Reads the folder's tokenizer; `None` if it has none.
pub(super) fn read(folder: &Path, model: &Model<'_>) -> Result<Option<Tokenizer>> {
    let config = Object::read(&folder.join("tokenizer_config.json"))?;
    let Some(mut vocabulary) = vocabulary(folder, model, config.as_ref())? else {
        return Ok(None);
    };
    // Before a token is made for every row.
    if model.vocab_size > MAX_TOKENS as u64 {
        return Err(Error::unsupported(
            model.config.file(),
            format!(
                "`vocab_size` is {}; vocabularies of at most {MAX_TOKENS} tokens are converted",
                model.vocab_size
            ),
        ));
    }
    let special = Special::read(folder, config, model)?;
    let known = vocabulary.tokens.len();
    if known as u64 > model.vocab_size {
        return Err(Error::format(
            &vocabulary.file,
            format!(
                "has {known} tokens, but the model's embedding has {} rows (`vocab_size` in \
                 config.json); this is another model's tokenizer",
                model.vocab_size
            ),
        ));
    }
    // What several files say of a token, the last one counts.
    let added: BTreeMap<u64, Added> = std::mem::take(&mut vocabulary.added)
        .into_iter()
        .chain(special.added.iter().cloned())
        .map(|added| (added.id, added))
        .collect();
    let tokens = &mut vocabulary.tokens;
    let is_free: Vec<bool> = (0..model.vocab_size as usize)
        .map(|id| tokens.get(id).is_none_or(|token| token.kind == Kind::Unused))
        .collect();
    tokens.extend((known..model.vocab_size as usize).map(Token::padding));
    // Made for the first token that asks for it.
    let merged = LazyCell::new(|| match &vocabulary.family {
        Family::ByteLevel { merges, .. } => byte_pairs::tokens_of(merges),
        Family::SentencePiece { .. } => HashSet::new(),
    });
    for Added { id, text, control } in added.into_values() {
        let Some(token) = usize::try_from(id).ok().and_then(|id| tokens.get_mut(id)) else {
            vocabulary.notes.push(format!(
                "token {id}, {text:?}, is left out: the model's embedding has {} rows",
                model.vocab_size
            ));
            continue;
        };
        let is_same = token.text == text;
        if !is_same && !is_free[id as usize] {
            if merged.contains(token.text.as_str()) {
                let what = format!(
                    "token {id} is {:?}, which merges need, and {text:?} among the tokens that \
                     were added; one of the two is another model's",
                    token.text
                );
                return Err(Error::format(&vocabulary.file, what));
            }
            vocabulary.notes.push(format!("token {id}, {:?}, becomes {text:?}", token.text));
        }
        let kind = match (control, token.kind) {
            (_, Kind::Unknown) if is_same => Kind::Unknown,
            (true, _) => Kind::Control,
            (false, _) => Kind::UserDefined,
        };
        let score = if is_same { token.score } else { NO_SCORE };
        *token = Token { text, score, kind };
    }
    special.name_controls(tokens);

    let roles = special.roles(tokens, vocabulary.roles, &mut vocabulary.notes);
    for id in [roles.ids.bos, roles.ids.eos, roles.ids.pad].into_iter().flatten() {
        let kind = &mut tokens[id as usize].kind;
        if matches!(kind, Kind::Normal | Kind::UserDefined | Kind::Unused) {
            *kind = Kind::Control;
        }
    }
    if let Some(id) = roles.ids.unk
        && ![roles.ids.bos, roles.ids.eos, roles.ids.pad].contains(&Some(id))
    {
        tokens[id as usize].kind = Kind::Unknown;
    }
    if matches!(vocabulary.family, Family::SentencePiece { .. }) && roles.ids.unk.is_none() {
        let bytes: HashSet<_> =
            tokens.iter().filter(|token| token.kind == Kind::Byte).map(|t| &t.text).collect();
        if bytes.len() < 256 {
            let what = "has neither an unknown token nor one for every byte (`<0x00>` to \
                        `<0xFF>`), so it cannot spell every text";
            return Err(Error::format(&vocabulary.file, what));
        }
    }
    let add_bos = special.add_bos()?.unwrap_or(match (&vocabulary.begins, &vocabulary.family) {
        // OPT's texts begin with </s>, whatever wrote the files.
        _ if model.architecture == "opt" => true,
        (Begins::With(text), _) => {
            roles.ids.bos.is_some_and(|id| tokens[id as usize].text == *text)
        }
        (Begins::Plain, _) => false,
        (Begins::Unsaid, family) => matches!(family, Family::SentencePiece { .. }),
    });

    let mut metadata = Vec::new();
    let mut set = |key: &str, value: OwnedValue| {
        metadata.push((format!("tokenizer.{key}"), value));
    };
    let (name, pre) = match &vocabulary.family {
        Family::SentencePiece { .. } => ("llama", "default"),
        Family::ByteLevel { pre, .. } => ("gpt2", *pre),
    };
    set("ggml.model", name.into());
    set("ggml.pre", pre.into());
    let count = tokens.iter().filter(|token| token.kind != Kind::Unused).count();
    let texts = tokens.iter().map(|token| token.text.clone()).collect();
    set("ggml.tokens", OwnedValue::Strings(texts));
    if let Family::SentencePiece { .. } = vocabulary.family {
        let scores = tokens.iter().map(|token| token.score).collect();
        set("ggml.scores", OwnedValue::F32s(scores));
    }
    let kinds = tokens.iter().map(|token| token.kind as i32).collect();
    set("ggml.token_type", OwnedValue::I32s(kinds));
    let space_prefix = match vocabulary.family {
        Family::SentencePiece { space_prefix } => {
            Some(special.space_prefix()?.unwrap_or(space_prefix))
        }
        Family::ByteLevel { merges, .. } => {
            set("ggml.merges", OwnedValue::Strings(merges));
            None
        }
    };
    for (key, id) in [
        ("bos", roles.ids.bos),
        ("eos", roles.ids.eos),
        ("eot", roles.eot),
        ("eom", roles.eom),
        ("unknown", roles.ids.unk),
        ("padding", roles.ids.pad),
    ] {
        if let Some(id) = id {
            set(&format!("ggml.{key}_token_id"), id.into());
        }
    }
    set("ggml.add_bos_token", add_bos.into());
    if let Some(add_eos) = special.add_eos()? {
        set("ggml.add_eos_token", add_eos.into());
    }
    if let Some(space_prefix) = space_prefix {
        set("ggml.add_space_prefix", space_prefix.into());
    }
    for (key, template) in special.chat_templates(folder)? {
        set(&key, template);
    }
    Ok(Some(Tokenizer { metadata, model: name, tokens: count, notes: vocabulary.notes }))
}

/// The vocabulary from the first file that has one.
fn vocabulary(
    folder: &Path,
    model: &Model<'_>,
    config: Option<&Object>,
) -> Result<Option<Vocabulary>> {
    if let Some(vocabulary) = sentencepiece::read(&folder.join("tokenizer.model"))? {
        return Ok(Some(vocabulary));
    }
    if let Some(vocabulary) = json::read(&folder.join("tokenizer.json"), model.vocab_size)? {
        return Ok(Some(vocabulary));
    }
    byte_pairs::read(folder, model, config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_tokens_are_made_for_more_rows_than_vocabularies_have() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let tokenizer = r#"{
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
        }"#;
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        let config = Object::read(&folder.path().join("config.json")).unwrap().unwrap();
        let convert = |vocab_size| {
            let model =
                Model { architecture: "llama", vocab_size, config: &config, generation: None };
            read(folder.path(), &model)
        };
        let most = MAX_TOKENS as u64;
        let error = convert(most + 1).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("`vocab_size` is 524289; "), "{error}");
        assert_eq!(convert(most).unwrap().unwrap().tokens, 3);
    }
}
