//! `tokenizer.model`: a SentencePiece model, which is a protobuf message.

use std::path::Path;

use prost::Message;

use super::super::json;
use super::{Begins, Family, Kind, Roles, Token, Vocabulary};
use crate::error::{Error, Result};
use crate::gguf::MAX_TOKENS;

/// The parts that matter of SentencePiece's `ModelProto`, by the numbers of its published schema.
#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(int32, optional, tag = "40")]
    unk: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pad: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// The fields of a message that are pieces, as far as it can be read.
fn count_pieces(mut message: &[u8]) -> usize {
    let mut pieces = 0;
    // A key, the number of the field and how it is stored, is a varint as lengths are.
    while let Ok(key) = prost::decode_length_delimiter(&mut message) {
        let value = match key & 7 {
            0 => prost::decode_length_delimiter(&mut message).map(|_| 0),
            1 => Ok(8),
            2 => prost::decode_length_delimiter(&mut message),
            5 => Ok(4),
            _ => break,
        };
        let Some(rest) = value.ok().and_then(|len| message.get(len..)) else { break };
        message = rest;
        pieces += usize::from(key >> 3 == 1);
    }
    pieces
}

/// Reads a SentencePiece model; `None` if the file is not there.
pub(super) fn read(path: &Path) -> Result<Option<Vocabulary>> {
    let file = path.display().to_string();
    let Some(bytes) = json::read(path)? else { return Ok(None) };
    // A piece takes two bytes in the file at least, and a hundred here.
    let pieces = count_pieces(&bytes);
    if pieces > MAX_TOKENS {
        let what = format!("has {pieces} pieces; at most {MAX_TOKENS} are converted");
        return Err(Error::unsupported(file, what));
    }
    let model = Model::decode(&*bytes).map_err(|error| {
        let what = format!(
            "is no SentencePiece model ({error}); take it away if the folder has another tokenizer"
        );
        Error::format(&file, what)
    })?;
    if model.pieces.is_empty() {
        return Err(Error::format(file, "is a SentencePiece model without a token"));
    }
    let trainer = model.trainer.unwrap_or_default();
    let kind = match trainer.model_type.unwrap_or(1) {
        1 => Some("unigram"),
        2 => None,
        3 => Some("words"),
        4 => Some("characters"),
        _ => Some("unknown"),
    };
    if let Some(kind) = kind {
        let what = format!("is a SentencePiece model of type {kind}; BPE is converted");
        return Err(Error::unsupported(file, what));
    }
    let mut tokens = Vec::with_capacity(model.pieces.len());
    for (id, piece) in model.pieces.into_iter().enumerate() {
        let kind = match piece.kind.unwrap_or(1) {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            other => {
                let what = format!("piece {id}, {:?}, has the type {other}", piece.text);
                return Err(Error::format(file, what));
            }
        };
        if piece.score.is_nan() {
            let what = format!("the score of piece {id}, {:?}, is not a number", piece.text);
            return Err(Error::format(file, what));
        }
        tokens.push(Token { text: piece.text, score: piece.score, kind });
    }

    let mut notes = Vec::new();
    let normalizer = model.normalizer.unwrap_or_default();
    let name = normalizer.name.as_deref().unwrap_or_default();
    if !matches!(name, "" | "identity") {
        notes.push(format!(
            "{file} rewrites characters (`{name}`), which GGUF cannot say: texts with such \
             characters may get other tokens"
        ));
    }
    if normalizer.remove_extra_whitespaces.unwrap_or(true) {
        notes.push(format!(
            "{file} drops repeated spaces, which GGUF cannot say: texts with them get other tokens"
        ));
    }
    if normalizer.escape_whitespaces == Some(false) {
        let what = "keeps spaces as they are; models that write them as `▁` are converted";
        return Err(Error::unsupported(file, what));
    }
    let id = |id: i32| u32::try_from(id).ok().filter(|&id| (id as usize) < tokens.len());
    let roles = Roles {
        unk: id(trainer.unk.unwrap_or(0)),
        bos: id(trainer.bos.unwrap_or(1)),
        eos: id(trainer.eos.unwrap_or(2)),
        pad: id(trainer.pad.unwrap_or(-1)),
    };
    let space_prefix = normalizer.add_dummy_prefix.unwrap_or(true);
    Ok(Some(Vocabulary {
        file,
        family: Family::SentencePiece { space_prefix },
        tokens,
        added: Vec::new(),
        roles,
        begins: Begins::Unsaid,
        notes,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_counted_without_being_read() {
        let piece = |text: &str| Piece { text: text.to_owned(), score: 1.5, kind: Some(3) };
        let model = Model {
            pieces: ["", "a", "▁the", &"x".repeat(300)].map(piece).to_vec(),
            trainer: Some(Trainer { model_type: Some(2), ..Trainer::default() }),
            normalizer: Some(Normalizer { name: Some("identity".into()), ..Normalizer::default() }),
        };
        let bytes = model.encode_to_vec();
        assert_eq!(count_pieces(&bytes), 4);
        assert_eq!(count_pieces(&[]), 0);
        assert_eq!(count_pieces(&b"\x0a\x00".repeat(1000)), 1000);
        for cut in 0..bytes.len() {
            assert!(count_pieces(&bytes[..cut]) <= 4);
        }
        // All ways to store a field, before a piece.
        assert_eq!(count_pieces(b"\x20\xff\x01\x29ABCDEFGH\x35ABCD\x0a\x00"), 1);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.model");
        std::fs::write(&path, b"\x0a\x00".repeat(MAX_TOKENS + 1)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("524289 pieces; at most 524288"), "{error}");
    }
}
