//! Text to tokens and back, by the vocabulary in a GGUF file.
//!
//! Two families are read: `llama` (SentencePiece, `sentencepiece.rs`) and `gpt2` (byte-level BPE,
//! `byte_level.rs`, of words as `pre_tokenizer.rs` cuts them). The crate `tokenizers` does the merging. What GGUF and llama.cpp lay down
//! around it is here: what the metadata means (`vocab.rs`), which tokens are taken whole
//! (`special.rs`), where spaces are added, and how tokens become text again (`stream.rs`). Ids are
//! those that llama.cpp gives for the same file and text.

mod byte_level;
mod pre_tokenizer;
mod sentencepiece;
mod special;
mod stream;
mod vocab;

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gguf::Gguf;

use byte_level::ByteLevel;
use pre_tokenizer::{PreTokenizer, Spelling};
use sentencepiece::SentencePiece;
use special::{Part, SpecialTokens};
use vocab::Vocab;

pub use stream::StreamDecoder;
pub use vocab::{Difference, Family, TokenType};

/// What [`Tokenizer::encode`] does beside turning text into tokens. By default neither.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Begin with the token that begins a text, if the vocabulary has one.
    /// [`Tokenizer::add_bos`] says whether the model expects it.
    pub bos: bool,
    /// Take the names of control tokens in the text for those tokens. Leave it off for text that
    /// is not your own.
    pub special: bool,
}

/// A vocabulary with the rules to apply it. Cloning is cheap: clones share everything.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    vocab: Arc<Vocab>,
    rules: Arc<Rules>,
}

#[derive(Debug)]
struct Rules {
    special: SpecialTokens,
    model: Model,
    add_bos: bool,
    notes: Vec<String>,
    /// What others made of the vocabulary.
    #[cfg(feature = "grammar")]
    kept: std::sync::OnceLock<Box<dyn std::any::Any + Send + Sync>>,
}

#[derive(Debug)]
enum Model {
    SentencePiece(Box<SentencePiece>),
    ByteLevel(Box<ByteLevel>),
}

impl Tokenizer {
    /// Builds the tokenizer that a file describes. The file may hold the vocabulary alone.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tokenizer or a pre-tokenizer that this version does not do,
    /// by name; [`Error::Format`] for a vocabulary that does not hold together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::with_pre_tokenizer(gguf, None)
    }

    /// The same, cutting words as the pre-tokenizer of this name does, whatever the file names.
    /// [`Tokenizer::pre_tokenizers`] has the names. Vocabularies of model `llama` have none, so that
    /// a name is refused there.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that there is not; otherwise as [`Tokenizer::from_gguf`].
    pub fn with_pre_tokenizer(gguf: &Gguf, name: Option<&str>) -> Result<Self> {
        let mut notes = Vec::new();
        // First, because it is cheap and says most when it fails.
        let pre = pre_tokenizer_of(gguf, name, &mut notes)?;
        let vocab = Vocab::read(gguf, family_of(pre.as_ref()), pre.is_none(), &mut notes)?;
        let special = SpecialTokens::new(gguf.name(), &vocab)?;
        let (model, with_bos) = match pre {
            None => {
                let model = SentencePiece::build(gguf, &vocab, &mut notes)?;
                (Model::SentencePiece(Box::new(model)), true)
            }
            Some(pre) => {
                let with_bos = pre.with_bos;
                (Model::ByteLevel(Box::new(ByteLevel::build(gguf, &vocab, pre)?)), with_bos)
            }
        };
        let add_bos = gguf.get_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(with_bos);
        let rules = Rules {
            special,
            model,
            add_bos,
            notes,
            #[cfg(feature = "grammar")]
            kept: std::sync::OnceLock::new(),
        };
        Ok(Tokenizer { vocab: Arc::new(vocab), rules: Arc::new(rules) })
    }

    /// The names that `tokenizer.ggml.pre` may have, those that cut alike behind each other.
    pub fn pre_tokenizers() -> impl Iterator<Item = &'static str> {
        PreTokenizer::names()
    }

    /// What a person should know of the vocabulary: what the file does not say or says wrong, and
    /// what was made of that.
    pub fn notes(&self) -> &[String] {
        &self.rules.notes
    }

    /// The tokens of `text`.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        self.encode_marked(text, options, None)
    }

    /// The same of a text in which the character `mark` may stand: names of tokens with a mark
    /// within are not taken for those tokens, and marks are no part of the text.
    pub(crate) fn encode_marked(
        &self,
        text: &str,
        options: EncodeOptions,
        mark: Option<char>,
    ) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if options.bos {
            ids.extend(self.bos());
        }
        // SentencePiece's space goes before the text and again behind each token taken whole.
        let mut prefix = self.vocab.space_prefix;
        for part in self.rules.special.split(text, options.special) {
            match part {
                Part::Token(id) => {
                    ids.push(id);
                    prefix = self.vocab.space_prefix;
                }
                Part::Text(range) => {
                    let part = match mark {
                        Some(mark) => Cow::Owned(text[range].replace(mark, "")),
                        None => Cow::Borrowed(&text[range]),
                    };
                    if part.is_empty() {
                        continue;
                    }
                    match &self.rules.model {
                        Model::SentencePiece(model) => model.encode(&part, prefix, &mut ids),
                        Model::ByteLevel(model) => model.encode(&part, &mut ids),
                    }
                    prefix = false;
                }
            }
        }
        ids
    }

    /// The text of `ids`, without control tokens. Bytes that are no character become U+FFFD; ids
    /// outside the vocabulary are no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// A decoder for tokens from the start of a text: the space that [`Tokenizer::encode`] puts
    /// there is taken away again.
    pub fn decoder(&self) -> StreamDecoder {
        StreamDecoder::new(Arc::clone(&self.vocab), true)
    }

    /// A decoder for tokens that continue a text, such as those generated after a prompt: a space
    /// at their start is part of the text.
    pub fn continuation(&self) -> StreamDecoder {
        StreamDecoder::new(Arc::clone(&self.vocab), false)
    }

    /// What `make` makes of the vocabulary, once for all clones. `None` if what is kept is something
    /// else.
    #[cfg(feature = "grammar")]
    pub(crate) fn kept<T: Send + Sync + 'static>(&self, make: impl FnOnce() -> T) -> Option<&T> {
        self.rules.kept.get_or_init(|| Box::new(make())).downcast_ref()
    }

    /// How the vocabulary spells text.
    pub fn family(&self) -> Family {
        self.vocab.family
    }

    /// Number of tokens.
    #[allow(clippy::len_without_is_empty)] // A vocabulary without tokens is refused.
    pub fn len(&self) -> usize {
        self.vocab.len()
    }

    /// Whether tokens begin with two of [`Tokenizer::bos`], which models have not seen in training:
    /// the text had the name of one, and another was put before it.
    pub fn doubles_bos(&self, ids: &[u32]) -> bool {
        matches!((self.vocab.bos, ids), (Some(bos), &[a, b, ..]) if a == bos && b == bos)
    }

    /// Whether the model expects prompts to begin with [`Tokenizer::bos`].
    pub fn add_bos(&self) -> bool {
        self.rules.add_bos && self.vocab.bos.is_some()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.bos
    }

    /// The token that ends a text. Others may too: see [`Tokenizer::is_end`].
    pub fn eos(&self) -> Option<u32> {
        self.vocab.eos
    }

    /// The token for what the vocabulary cannot spell.
    pub fn unk(&self) -> Option<u32> {
        self.vocab.unk
    }

    /// Whether generation ends with `id`: the end of a text, of a turn or of a message.
    pub fn is_end(&self, id: u32) -> bool {
        self.vocab.is_end(id)
    }

    /// The names of all tokens that are taken for them only where [`EncodeOptions::special`] is set.
    pub fn control_names(&self) -> impl Iterator<Item = &str> {
        let tokens = self.vocab.iter().filter(|&(id, text, kind)| {
            kind.is_special() && !text.is_empty() && !self.vocab.is_bytes(id)
        });
        tokens.map(|(_, text, _)| text)
    }

    /// A token as the vocabulary writes it; empty for an id outside.
    pub fn token(&self, id: u32) -> &str {
        self.vocab.text(id).unwrap_or_default()
    }

    /// What a token is for; `None` for an id outside the vocabulary.
    pub fn token_type(&self, id: u32) -> Option<TokenType> {
        self.vocab.kind(id)
    }

    /// The bytes of a token as text, which may be part of a character. A control token's are its
    /// name, though decoding leaves it out. Empty for an id outside the vocabulary.
    pub fn piece(&self, id: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.vocab.put_piece(id, &mut bytes);
        bytes
    }

    /// The first token whose text `other` does not share. Types do not count: files of one model
    /// disagree about them. Nor do tokens that only the longer vocabulary has: models are padded to
    /// round sizes, and tuning adds control tokens.
    pub fn first_difference(&self, other: &Tokenizer) -> Option<Difference> {
        self.vocab.first_difference(&other.vocab)
    }

    /// The number of ids that both vocabularies have.
    pub fn shared_len(&self, other: &Tokenizer) -> usize {
        self.len().min(other.len())
    }

    /// Checks that `draft` can propose tokens to the model that this vocabulary belongs to, and
    /// returns the number of tokens that both have.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] with the first token that differs.
    pub fn check_draft(&self, draft: &Tokenizer) -> Result<usize> {
        self.check(&draft.vocab)
    }

    /// The same for the vocabulary of a draft's file, of which no text has to be tokenized: neither
    /// its pre-tokenizer nor its merges have to be known.
    ///
    /// # Errors
    /// As [`Tokenizer::check_draft`], and as [`Tokenizer::from_gguf`].
    pub fn check_draft_file(&self, draft: &Gguf) -> Result<usize> {
        let model = draft.get_str(MODEL)?.ok_or_else(|| no_tokenizer(draft))?;
        let family = match (model, draft.get_str(PRE)?.and_then(PreTokenizer::named)) {
            ("gpt2", None) => Family::ByteLevel,
            ("gpt2", pre) => family_of(pre.as_ref()),
            _ => Family::SentencePiece,
        };
        if family != self.family() {
            return Err(Error::Vocabulary(format!(
                "{}: its tokenizer is of model {model:?}, which spells text in another way than the \
                 target's",
                draft.name()
            )));
        }
        self.check(&Vocab::read(draft, self.family(), false, &mut Vec::new())?)
    }

    fn check(&self, draft: &Vocab) -> Result<usize> {
        match self.vocab.first_difference(draft) {
            Some(difference) => Err(Error::Vocabulary(difference.to_string())),
            None => Ok(self.len().min(draft.len())),
        }
    }
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";

fn no_tokenizer(gguf: &Gguf) -> Error {
    let what = format!(
        "has no tokenizer (metadata `{MODEL}` is missing), so it can be given token ids but no \
         text; a file with the vocabulary is needed"
    );
    Error::format(gguf.name(), what)
}

fn family_of(pre: Option<&PreTokenizer>) -> Family {
    match pre {
        Some(pre) if pre.spelling == Spelling::Bytes => Family::ByteLevel,
        _ => Family::SentencePiece,
    }
}

/// The pre-tokenizer that a file names, or the one of this name; `None` for a vocabulary that
/// needs none.
fn pre_tokenizer_of(
    gguf: &Gguf,
    name: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<Option<PreTokenizer>> {
    let known = || PreTokenizer::names().collect::<Vec<_>>().join(", ");
    let named = match gguf.get_str(MODEL)?.ok_or_else(|| no_tokenizer(gguf))? {
        "llama" => match name {
            None => return Ok(None),
            Some(name) => {
                return Err(Error::invalid(format!(
                    "pre-tokenizer {name:?}: {} has a SentencePiece vocabulary, whose text is not \
                     cut before merging; leave it out",
                    gguf.name()
                )));
            }
        },
        "gpt2" => gguf.get_str(PRE)?.filter(|name| !name.is_empty()),
        "gemma4" => Some("gemma4"),
        other => {
            return Err(Error::unsupported(
                gguf.name(),
                format!(
                    "tokenizer {other:?} (`{MODEL}`) is not supported; `llama` (SentencePiece), \
                     `gpt2` (byte-level BPE) and `gemma4` are"
                ),
            ));
        }
    };
    if let Some(name) = name {
        return PreTokenizer::named(name).map(Some).ok_or_else(|| {
            Error::invalid(format!("there is no pre-tokenizer {name:?}; there are {}", known()))
        });
    }
    let Some(name) = named else {
        notes.push(format!(
            "{}: `{PRE}` is missing; words are cut as `default` does, which is hardly what the \
             model was trained with (choose the right pre-tokenizer, or convert the model anew)",
            gguf.name()
        ));
        return Ok(PreTokenizer::named("default"));
    };
    PreTokenizer::named(name).map(Some).ok_or_else(|| {
        let what = format!(
            "pre-tokenizer {name:?} (`{PRE}`) is not known; choose the one of these that cuts \
             words as it does: {}",
            known()
        );
        Error::unsupported(gguf.name(), what)
    })
}
