//! SentencePiece's BPE: text as characters with `▁` for spaces, joined again and again to the
//! token with the best score; bytes for what no token spells.
//!
//! The file has scores but no merges. They follow from the vocabulary: every way to put a token
//! together from two others is a merge, ordered by the token's score. Tokens of equal score are
//! ordered by id, as in training; llama.cpp takes the leftmost in the text, which is the same for
//! vocabularies that SentencePiece wrote. So a file that has lost its scores has lost little:
//! SentencePiece writes tokens in their order.

use ahash::AHashMap;
use tokenizers::Model;
use tokenizers::models::bpe::BPE;

use super::vocab::{SPACE, TokenType, Vocab, byte_of, read_scores};
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// Published vocabularies have about two merges for a token. Many more mean a file that is made
/// to fill memory: a merge costs more there than a token costs in the file.
const MERGES_PER_TOKEN: usize = 4;

/// The same in bytes: the texts of all merges together by those of all tokens.
const MERGED_BYTES_PER_BYTE: usize = 8;

/// Small vocabularies may have more.
const MERGES_ALLOWED: usize = 1 << 14;
const MERGED_BYTES_ALLOWED: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct SentencePiece {
    bpe: BPE,
    /// Whether no token has a `▁` behind another character. Then no merge crosses the start of a
    /// run of spaces, and words can be looked up one by one.
    splits_at_spaces: bool,
}

impl SentencePiece {
    /// Builds it; what a person should know is added to `notes`.
    pub fn build(gguf: &Gguf, vocab: &Vocab, notes: &mut Vec<String>) -> Result<Self> {
        let scores = read_scores(gguf, vocab.len())?.unwrap_or_else(|| {
            notes.push(format!(
                "{}: `tokenizer.ggml.scores` is missing; the order of the tokens stands for them",
                gguf.name()
            ));
            vec![0.0; vocab.len()]
        });
        let mergeable = |kind| {
            use TokenType::*;
            matches!(kind, Normal | UserDefined | Unused | Undefined)
        };
        let mut ids = vocab.ids(mergeable);
        let merges = derive_merges(gguf, &ids, &scores)?;
        let splits_at_spaces = splits_at_spaces(&ids);

        // The crate finds the byte tokens and the unknown one by their texts.
        let mut bytes = [false; 256];
        for (id, text, kind) in vocab.iter() {
            if let (TokenType::Byte, Some(byte)) = (kind, byte_of(text)) {
                ids.insert(format!("<{byte:#04X}>"), id);
                bytes[byte as usize] = true;
            }
        }
        let missing = bytes.iter().filter(|&&is_there| !is_there).count();
        let mut builder = BPE::builder().fuse_unk(true).byte_fallback(missing < 256);
        match vocab.unk.and_then(|id| Some((id, vocab.text(id)?))) {
            Some((id, text)) => {
                ids.insert(text.to_owned(), id);
                builder = builder.unk_token(text.to_owned());
            }
            None if missing == 256 => {
                return Err(Error::format(
                    gguf.name(),
                    "the vocabulary has neither tokens for bytes (`<0x00>` to `<0xFF>`) nor an \
                     unknown token, so it cannot spell every text",
                ));
            }
            None if missing > 0 => notes.push(format!(
                "{}: {missing} bytes have no token (`<0x00>` to `<0xFF>`) and there is no unknown \
                 token; characters that need them are left out",
                gguf.name()
            )),
            None => {}
        }
        let bpe = builder
            .vocab_and_merges(ids, merges)
            .build()
            .map_err(|e| Error::format(gguf.name(), format!("vocabulary: {e}")))?;
        Ok(SentencePiece { bpe, splits_at_spaces })
    }

    /// Appends the ids of `text`, which holds no special token, after a space if `prefix`.
    pub fn encode(&self, text: &str, prefix: bool, ids: &mut Vec<u32>) {
        let mut spelled = String::with_capacity(text.len() + text.len() / 4 + SPACE.len_utf8());
        if prefix {
            spelled.push(SPACE);
        }
        spelled.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        let mut encode = |word: &str| {
            // Fails only for an unknown token outside the vocabulary, which `build` rules out.
            let tokens = self.bpe.tokenize(word).unwrap_or_default();
            ids.extend(tokens.iter().map(|token| token.id));
        };
        if !self.splits_at_spaces {
            return encode(&spelled);
        }
        at_spaces(&spelled, encode);
    }
}

/// Whether no token has a `▁` behind another character, and `▁` is one itself.
pub(super) fn splits_at_spaces(ids: &AHashMap<String, u32>) -> bool {
    ids.contains_key(SPACE.to_string().as_str())
        && !ids.keys().any(|text| {
            let mut chars = text.chars().zip(text.chars().skip(1));
            chars.any(|(before, c)| c == SPACE && before != SPACE)
        })
}

/// Cuts spelled text in front of every run of `▁`.
pub(super) fn at_spaces<'t>(spelled: &'t str, mut take: impl FnMut(&'t str)) {
    let mut start = 0;
    let mut before = SPACE;
    for (at, c) in spelled.char_indices() {
        if c == SPACE && before != SPACE {
            take(&spelled[start..at]);
            start = at;
        }
        before = c;
    }
    take(&spelled[start..]);
}

/// Every way to join two tokens to a third: best score first, then lower id, then shorter left.
fn derive_merges(
    gguf: &Gguf,
    ids: &AHashMap<String, u32>,
    scores: &[f32],
) -> Result<Vec<(String, String)>> {
    let allowed = MERGES_ALLOWED.max(ids.len() * MERGES_PER_TOKEN);
    let all: usize = ids.keys().map(String::len).sum();
    let allowed_bytes = MERGED_BYTES_ALLOWED.max(all * MERGED_BYTES_PER_BYTE);
    let mut bytes = 0;
    let mut found: Vec<(u32, &str, usize)> = Vec::new();
    for (text, &id) in ids {
        for (at, _) in text.char_indices().skip(1) {
            if ids.contains_key(&text[..at]) && ids.contains_key(&text[at..]) {
                found.push((id, text, at));
                bytes += text.len();
            }
        }
        if found.len() > allowed || bytes > allowed_bytes {
            return Err(Error::format(
                gguf.name(),
                format!(
                    "`tokenizer.ggml.tokens`: more than {} ways to join the {} tokens; this is no \
                     vocabulary of a model",
                    found.len() - 1,
                    ids.len()
                ),
            ));
        }
    }
    found.sort_unstable_by(|a, b| {
        let score = |id: u32| scores[id as usize];
        score(b.0).total_cmp(&score(a.0)).then(a.0.cmp(&b.0)).then(a.2.cmp(&b.2))
    });
    Ok(found.into_iter().map(|(_, t, at)| (t[..at].to_owned(), t[at..].to_owned())).collect())
}
