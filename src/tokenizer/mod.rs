//! Text to tokens and back, by the vocabulary in a GGUF file.
//!
//! Two families are read: `llama` (SentencePiece, `sentencepiece.rs`) and `gpt2` (byte-level BPE,
//! `byte_level.rs`). The crate `tokenizers` does the merging. What GGUF and llama.cpp lay down
//! around it is here: what the metadata means (`vocab.rs`), which tokens are taken whole
//! (`special.rs`), where spaces are added, and how tokens become text again (`stream.rs`). Ids are
//! those that llama.cpp gives for the same file and text.

mod byte_level;
mod sentencepiece;
mod special;
mod stream;
mod vocab;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gguf::Gguf;

use byte_level::ByteLevel;
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
        const KEY: &str = "tokenizer.ggml.model";
        let name = gguf.get_str(KEY)?.ok_or_else(|| {
            let what = format!(
                "has no tokenizer (metadata `{KEY}` is missing), so it can be given token ids but \
                 no text; a file with the vocabulary is needed"
            );
            Error::format(gguf.name(), what)
        })?;
        let family = match name {
            "llama" => Family::SentencePiece,
            "gpt2" => Family::ByteLevel,
            other => {
                return Err(Error::unsupported(
                    gguf.name(),
                    format!(
                        "tokenizer {other:?} (`{KEY}`) is not supported; `llama` (SentencePiece) \
                         and `gpt2` (byte-level BPE) are"
                    ),
                ));
            }
        };
        let vocab = Vocab::read(gguf, family)?;
        let model = match family {
            Family::SentencePiece => {
                Model::SentencePiece(Box::new(SentencePiece::build(gguf, &vocab)?))
            }
            Family::ByteLevel => Model::ByteLevel(Box::new(ByteLevel::build(gguf, &vocab)?)),
        };
        let add_bos = gguf.get_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(match &model {
            Model::SentencePiece(_) => true,
            Model::ByteLevel(model) => model.is_llama3,
        });
        let special = SpecialTokens::new(gguf.name(), &vocab)?;
        Ok(Tokenizer { vocab: Arc::new(vocab), rules: Arc::new(Rules { special, model, add_bos }) })
    }

    /// The tokens of `text`.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
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
                    match &self.rules.model {
                        Model::SentencePiece(model) => model.encode(&text[range], prefix, &mut ids),
                        Model::ByteLevel(model) => model.encode(&text[range], &mut ids),
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

    /// How the vocabulary spells text.
    pub fn family(&self) -> Family {
        self.vocab.family
    }

    /// Number of tokens.
    #[allow(clippy::len_without_is_empty)] // A vocabulary without tokens is refused.
    pub fn len(&self) -> usize {
        self.vocab.len()
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

    /// The first token whose text or type `other` does not share. Tokens that only the longer
    /// vocabulary has do not count: models are padded to round sizes.
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
        match self.first_difference(draft) {
            Some(difference) => Err(Error::Vocabulary(difference.to_string())),
            None => Ok(self.shared_len(draft)),
        }
    }
}
