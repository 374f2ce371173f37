//! `tokenizer.json`: the file of the library `tokenizers`.
//!
//! It describes a pipeline of parts; those of byte-level BPE and of SentencePiece's BPE are
//! recognised, and any other is refused by what it says.

use std::path::Path;

use serde_json::Value;

use super::super::json::{Object, shown};
use super::byte_pairs::{check_merges, ids, spell, tokens};
use super::{Added, Begins, Family, Kind, Roles, Token, Vocabulary};
use crate::error::{Error, Result};

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// The patterns that cut text into words, as their authors published them, and GGUF's names.
const PATTERNS: [(&str, &str); 2] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
];

/// Reads the file; `None` if it is not there.
pub(super) fn read(path: &Path, vocab_size: u64) -> Result<Option<Vocabulary>> {
    let Some(mut file) = Object::read(path)? else { return Ok(None) };
    let mut model = file.take_object("model")?.ok_or_else(|| file.wrong("model", "an object"))?;
    if model.str("type")?.is_some_and(|kind| kind != "BPE") {
        return Err(model.unsupported("type", "`BPE` is converted"));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.str(key)?.is_some_and(|text| !text.is_empty()) {
            return Err(model.unsupported(key, "vocabularies without it are converted"));
        }
    }
    let vocab = model.take_object("vocab")?;
    let vocab = vocab.ok_or_else(|| model.wrong("vocab", "an object of ids by token"))?;
    let mut tokens = tokens(&vocab, vocab_size)?;
    let merges = merges(&model)?;
    let results = check_merges(model.file(), &merges, &tokens)?;
    let added = added(&file)?;
    let mut notes = Vec::new();
    let unk = model.str("unk_token")?.map(str::to_owned);
    let family = match model.bool("byte_fallback")?.unwrap_or(false) {
        true => {
            let space_prefix = spaces(&file)?;
            set_kinds(&mut tokens, &added, unk.as_deref());
            if !set_scores(&mut tokens, &merges, &results) {
                notes.push(format!(
                    "{}: its merges do not follow from the tokens alone, which is all that GGUF \
                     keeps of them; some texts may get other tokens",
                    file.file()
                ));
            }
            Family::SentencePiece { space_prefix }
        }
        false => {
            let pre = words(&file)?;
            match (pre, model.bool("ignore_merges")?.unwrap_or(false)) {
                ("llama-bpe", false) => notes.push(format!(
                    "{}: words that are tokens will be taken whole, as Llama 3 takes them and GGUF \
                     means by `llama-bpe`, though the file does not say so (`ignore_merges`)",
                    file.file()
                )),
                ("llama-bpe", true) | (_, false) => {}
                (_, true) => {
                    let what = format!("vocabularies cut as `{pre}` with it are not converted");
                    return Err(model.unsupported("ignore_merges", &what));
                }
            }
            Family::ByteLevel { pre, merges: spell(file.file(), &merges)? }
        }
    };
    let id = |text: &str| tokens.iter().position(|token| token.text == text);
    let unk = unk.and_then(|text| id(&text)).map(|id| id as u32);
    Ok(Some(Vocabulary {
        file: file.file().to_owned(),
        family,
        tokens,
        added,
        roles: Roles { unk, ..Roles::default() },
        begins: begins(&file),
        notes,
    }))
}

/// The merges, which are strings with a space in older files and pairs in newer ones.
fn merges(model: &Object) -> Result<Vec<(String, String)>> {
    let wanted = "an array of merges";
    let list = model.array("merges")?.ok_or_else(|| model.wrong("merges", wanted))?;
    let pair = |(rank, merge): (usize, &Value)| {
        let pair = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(halves) => match halves.as_slice() {
                [Value::String(left), Value::String(right)] => {
                    Some((left.as_str(), right.as_str()))
                }
                _ => None,
            },
            _ => None,
        };
        let pair = pair.map(|(left, right)| (left.to_owned(), right.to_owned()));
        pair.ok_or_else(|| {
            let what = format!("merge {rank} is {}; two tokens are needed", shown(merge));
            Error::format(model.file(), what)
        })
    };
    list.iter().enumerate().map(pair).collect()
}

/// The tokens that are taken whole.
fn added(file: &Object) -> Result<Vec<Added>> {
    let list = file.array("added_tokens")?.unwrap_or_default();
    let token = |value: &Value| {
        let (id, text) = (value["id"].as_u64(), value["content"].as_str());
        match (id, text) {
            (Some(id), Some(text)) => {
                Ok(Added::new(id, text, value["special"].as_bool().unwrap_or(false)))
            }
            _ => {
                let what =
                    format!("`added_tokens` has {}; id and content are needed", shown(value));
                Err(Error::format(file.file(), what))
            }
        }
    };
    list.iter().map(token).collect()
}

/// The parts of a pipeline, be it one, a sequence or none.
fn parts<'a>(file: &'a Object, key: &str, list: &str) -> Vec<&'a Value> {
    match file.get(key) {
        None => Vec::new(),
        Some(value) if value["type"] == "Sequence" => {
            value[list].as_array().into_iter().flatten().collect()
        }
        Some(value) => vec![value],
    }
}

/// The name of how text is cut into words.
fn words(file: &Object) -> Result<&'static str> {
    const KEY: &str = "pre_tokenizer";
    let refuse = || {
        Err(file.unsupported(KEY, "the byte-level ones of GPT-2, Llama 3 and Qwen2 are converted"))
    };
    // Whether it is the part that writes bytes as characters, and whether it cuts words too.
    let byte_level = |part: &Value| match part["type"] == "ByteLevel" {
        true if part["add_prefix_space"] == false => {
            Some(part["use_regex"].as_bool().unwrap_or(true))
        }
        _ => None,
    };
    let pre = match parts(file, KEY, "pretokenizers").as_slice() {
        [part] if byte_level(part) == Some(true) => "gpt-2",
        [split, part]
            if byte_level(part) == Some(false)
                && split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] == false =>
        {
            let pattern = split["pattern"]["Regex"].as_str().unwrap_or_default();
            match PATTERNS.iter().find(|(published, _)| *published == pattern) {
                Some((_, name)) => name,
                None => return refuse(),
            }
        }
        _ => return refuse(),
    };
    // Qwen2's normal form C changes nothing in most texts; no reader of GGUF applies it.
    let rewrites = parts(file, "normalizer", "normalizers");
    match rewrites.iter().all(|part| pre == "qwen2" && part["type"] == "NFC") {
        true => Ok(pre),
        false => {
            let what = format!("vocabularies cut as `{pre}` that rewrite no text are converted");
            Err(file.unsupported("normalizer", &what))
        }
    }
}

/// Checks that spaces are written as SentencePiece writes them; whether a text begins with one of
/// the tokenizer's own.
fn spaces(file: &Object) -> Result<bool> {
    let (mut replaced, mut prefix) = (false, false);
    for part in parts(file, "normalizer", "normalizers") {
        match part["type"].as_str() {
            Some("Prepend") if part["prepend"] == SPACE => prefix = true,
            Some("Replace") if part["pattern"]["String"] == " " && part["content"] == SPACE => {
                replaced = true;
            }
            _ => {
                let what = "that of Llama-2 (a space before the text, `▁` for spaces) is converted";
                return Err(file.unsupported("normalizer", what));
            }
        }
    }
    for part in parts(file, "pre_tokenizer", "pretokenizers") {
        if part["type"] != "Metaspace" || part["replacement"] != SPACE {
            return Err(file.unsupported("pre_tokenizer", "none or `Metaspace` is converted"));
        }
        replaced = true;
        prefix |= match part["prepend_scheme"].as_str() {
            Some(scheme) => scheme != "never",
            None => part["add_prefix_space"] != false,
        };
    }
    match replaced {
        true => Ok(prefix),
        false => {
            let what = "vocabularies of SentencePiece that write spaces as `▁` are converted";
            Err(file.unsupported("normalizer", what))
        }
    }
}

/// Types of the tokens of a SentencePiece vocabulary that are no text. (Tokens that were added
/// get theirs later; here it matters that they are no text.)
fn set_kinds(tokens: &mut [Token], added: &[Added], unk: Option<&str>) {
    for token in &mut *tokens {
        let is_byte = token.text.len() == 6
            && token.text.starts_with("<0x")
            && token.text.ends_with('>')
            && token.text[3..5].bytes().all(|c| c.is_ascii_hexdigit());
        if is_byte {
            token.kind = Kind::Byte;
        } else if unk == Some(token.text.as_str()) {
            token.kind = Kind::Unknown;
        }
    }
    for added in added.iter().filter(|added| added.control) {
        if let Some(token) = usize::try_from(added.id).ok().and_then(|id| tokens.get_mut(id))
            && token.kind == Kind::Normal
        {
            token.kind = Kind::Control;
        }
    }
}

/// Scores that put merges in their order: SentencePiece's own are minus the place among the
/// tokens of text, and so are these where merges are ordered by what they make; otherwise they are
/// minus the rank of the first merge that makes the token. Whether the merges that follow from
/// such scores, all two parts of every token, are those of the file.
fn set_scores(tokens: &mut [Token], merges: &[(String, String)], results: &[usize]) -> bool {
    let is_text = |token: &Token| matches!(token.kind, Kind::Normal | Kind::UserDefined);
    if results.is_sorted() {
        let first = tokens.iter().position(is_text).unwrap_or(0);
        for (id, token) in tokens.iter_mut().enumerate().filter(|(_, token)| is_text(token)) {
            token.score = -(id.saturating_sub(first) as f32);
        }
    } else {
        for (id, token) in tokens.iter_mut().enumerate().filter(|(_, token)| is_text(token)) {
            token.score = -((merges.len() + id) as f32);
        }
        for (rank, &id) in results.iter().enumerate().rev() {
            tokens[id].score = -(rank as f32);
        }
    }
    let ids = ids(tokens);
    let is_part = |text: &str| ids.get(text).is_some_and(|&id| is_text(&tokens[id]));
    let ways = |token: &&Token| {
        let text = &token.text;
        let cuts = text.char_indices().skip(1);
        cuts.filter(|&(at, _)| is_part(&text[..at]) && is_part(&text[at..])).count()
    };
    let possible: usize = tokens.iter().filter(|token| is_text(token)).map(|t| ways(&t)).sum();
    let scores: Vec<f32> = results.iter().map(|&id| tokens[id].score).collect();
    possible == merges.len() && scores.is_sorted_by(|a, b| a >= b)
}

/// What the file adds before a text.
fn begins(file: &Object) -> Begins {
    let processors = parts(file, "post_processor", "processors");
    if processors.is_empty() {
        return match file.has("post_processor") {
            true => Begins::Plain,
            false => Begins::Unsaid,
        };
    }
    let template = processors.iter().find(|part| part["type"] == "TemplateProcessing");
    let first = template.and_then(|part| part["single"].as_array()?.first());
    match first.and_then(|first| first["SpecialToken"]["id"].as_str()) {
        Some(text) => Begins::With(text.to_owned()),
        None => Begins::Plain,
    }
}
