//! SentencePiece's BPE: text as characters with `▁` for spaces, joined again and again to the
//! token with the best score; bytes for what no token spells.
//!
//! The file has scores but no merges. They follow from the vocabulary: every way to put a token
//! together from two others is a merge, ordered by the token's score. Tokens of equal score are
//! ordered by id, as in training; llama.cpp takes the leftmost in the text, which is the same for
//! vocabularies that SentencePiece wrote.

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
    pub fn build(gguf: &Gguf, vocab: &Vocab) -> Result<Self> {
        let scores = read_scores(gguf, vocab.len())?;
        let mergeable = |kind| {
            use TokenType::*;
            matches!(kind, Normal | UserDefined | Unused | Undefined)
        };
        let mut ids = vocab.ids(mergeable);
        let merges = derive_merges(gguf, &ids, &scores)?;
        let splits_at_spaces = ids.contains_key(SPACE.to_string().as_str())
            && !ids.keys().any(|text| {
                let mut chars = text.chars().zip(text.chars().skip(1));
                chars.any(|(before, c)| c == SPACE && before != SPACE)
            });

        // The crate finds the byte tokens and the unknown one by their texts.
        let mut bytes = [false; 256];
        for (id, text, kind) in vocab.iter() {
            if let (TokenType::Byte, Some(byte)) = (kind, byte_of(text)) {
                ids.insert(format!("<{byte:#04X}>"), id);
                bytes[byte as usize] = true;
            }
        }
        let has_bytes = bytes.iter().all(|&is_there| is_there);
        let mut builder = BPE::builder().fuse_unk(true).byte_fallback(has_bytes);
        match vocab.unk.and_then(|id| Some((id, vocab.text(id)?))) {
            Some((id, text)) => {
                ids.insert(text.to_owned(), id);
                builder = builder.unk_token(text.to_owned());
            }
            None if !has_bytes => {
                return Err(Error::format(
                    gguf.name(),
                    "the vocabulary has neither a token for every byte (`<0x00>` to `<0xFF>`) nor \
                     an unknown token, so it cannot spell every text",
                ));
            }
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
        let mut start = 0;
        let mut before = SPACE;
        for (at, c) in spelled.char_indices() {
            if c == SPACE && before != SPACE {
                encode(&spelled[start..at]);
                start = at;
            }
            before = c;
        }
        encode(&spelled[start..]);
    }
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
