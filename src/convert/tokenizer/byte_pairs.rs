//! `vocab.json` and `merges.txt`: byte-level BPE in GPT-2's files. And what vocabularies of
//! byte pairs have in common wherever they stand.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::super::json::{self, Object};
use super::{Begins, Family, Kind, Model, Roles, Token, Vocabulary};
use crate::error::{Error, Result};

/// Longer tokens mean a damaged file; they are refused when the model is run, too.
const MAX_TOKEN: usize = 1024;

const VOCAB: &str = "vocab.json";
const MERGES: &str = "merges.txt";

/// Reads the two files; `None` if neither is there.
pub(super) fn read(
    folder: &Path,
    model: &Model<'_>,
    config: Option<&Object>,
) -> Result<Option<Vocabulary>> {
    let path = folder.join(MERGES);
    let (vocab, merges) = match (Object::read(&folder.join(VOCAB))?, json::read(&path)?) {
        (None, None) => return Ok(None),
        (Some(vocab), Some(merges)) => (vocab, merges),
        (vocab, _) => {
            let (there, missing) = if vocab.is_some() { (VOCAB, MERGES) } else { (MERGES, VOCAB) };
            let what = format!("has {there} but no {missing}; a tokenizer needs both");
            return Err(Error::format(folder.display().to_string(), what));
        }
    };
    let name = path.display().to_string();
    let merges = String::from_utf8(merges).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::format(&name, format!("is not UTF-8 text (at byte {at})"))
    })?;
    let pairs: Vec<_> = merges
        .lines()
        .enumerate()
        .filter(|(i, line)| !line.is_empty() && (*i != 0 || !line.starts_with("#version")))
        .map(|(i, line)| match line.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(Error::format(
                &name,
                format!("line {} is {line:?}; two tokens with a space are needed", i + 1),
            )),
        })
        .collect::<Result<_>>()?;
    let tokens = tokens(&vocab, model.vocab_size)?;
    check_merges(&name, &pairs, &tokens)?;
    let pre = pre(folder, model.architecture, config)?;
    const PREFIX: &str = "add_prefix_space";
    if let Some(config) = config
        && config.bool(PREFIX)? == Some(true)
    {
        let what = "byte pairs that add no space before a text are converted";
        return Err(config.unsupported(PREFIX, what));
    }
    Ok(Some(Vocabulary {
        file: vocab.file().to_owned(),
        family: Family::ByteLevel { pre, merges: spell(&name, &pairs)? },
        tokens,
        added: Vec::new(),
        roles: Roles::default(),
        begins: Begins::Unsaid,
        notes: Vec::new(),
    }))
}

/// How text is cut into words, which these files do not say: the class of the tokenizer does, and
/// where no file names one, that of the architecture.
fn pre(folder: &Path, architecture: &str, config: Option<&Object>) -> Result<&'static str> {
    let class = match config {
        Some(config) => config.str("tokenizer_class")?,
        None => None,
    };
    match (class, architecture) {
        (Some("GPT2Tokenizer" | "GPT2TokenizerFast"), _) | (None, "opt") => Ok("gpt-2"),
        (Some("Qwen2Tokenizer" | "Qwen2TokenizerFast"), _) | (None, "qwen2") => Ok("qwen2"),
        (class, _) => Err(Error::unsupported(
            folder.display().to_string(),
            format!(
                "{VOCAB} and {MERGES} do not say how text is cut into words, and {}; \
                 tokenizer.json would say it",
                match class {
                    Some(class) => format!("the tokenizer class `{class}` is not known"),
                    None => "no file names the tokenizer's class".to_owned(),
                }
            ),
        )),
    }
}

/// The tokens of a map from text to id, in order; ids that the map leaves out become padding.
pub(super) fn tokens(vocab: &Object, vocab_size: u64) -> Result<Vec<Token>> {
    let mut texts: Vec<Option<&str>> = Vec::new();
    for (text, id) in vocab.iter() {
        let id = id.as_u64().ok_or_else(|| vocab.wrong(text, "a whole number >= 0"))?;
        if id >= vocab_size {
            let what = format!(
                "token {text:?} has the id {id}, but the model's embedding has {vocab_size} rows \
                 (`vocab_size` in config.json); this is another model's tokenizer"
            );
            return Err(Error::format(vocab.file(), what));
        }
        if text.len() > MAX_TOKEN {
            let what =
                format!("token {id} is {} bytes long; at most {MAX_TOKEN} are allowed", text.len());
            return Err(Error::format(vocab.file(), what));
        }
        let id = id as usize;
        if texts.len() <= id {
            texts.resize(id + 1, None);
        }
        if let Some(other) = texts[id].replace(text) {
            let what = format!("tokens {other:?} and {text:?} have the same id, {id}");
            return Err(Error::format(vocab.file(), what));
        }
    }
    if texts.is_empty() {
        return Err(Error::format(vocab.file(), "has no token"));
    }
    let token = |(id, text): (usize, Option<&str>)| match text {
        Some(text) => Token { text: text.to_owned(), score: 0.0, kind: Kind::Normal },
        None => Token::padding(id),
    };
    Ok(texts.into_iter().enumerate().map(token).collect())
}

/// Ids by text, of tokens that are no padding.
pub(super) fn ids(tokens: &[Token]) -> HashMap<&str, usize> {
    let known = tokens.iter().enumerate().filter(|(_, token)| token.kind != Kind::Unused);
    known.map(|(id, token)| (token.text.as_str(), id)).collect()
}

/// Checks that every merge joins two tokens to a third; the ids of the thirds.
pub(super) fn check_merges(
    file: &str,
    merges: &[(String, String)],
    tokens: &[Token],
) -> Result<Vec<usize>> {
    let ids = ids(tokens);
    let mut seen = HashSet::with_capacity(merges.len());
    let mut results = Vec::with_capacity(merges.len());
    for (rank, (left, right)) in merges.iter().enumerate() {
        let joined = format!("{left}{right}");
        for text in [left, right, &joined] {
            if !ids.contains_key(text.as_str()) {
                let what =
                    format!("merge {rank} is {left:?} {right:?}; there is no token {text:?}");
                return Err(Error::format(file, what));
            }
        }
        if !seen.insert((left, right)) {
            let what = format!("merge {rank}, {left:?} {right:?}, is there twice");
            return Err(Error::format(file, what));
        }
        results.push(ids[joined.as_str()]);
    }
    Ok(results)
}

/// The tokens that merges, as GGUF writes them, join to others or make.
pub(super) fn tokens_of(merges: &[String]) -> HashSet<Cow<'_, str>> {
    let halves = merges.iter().filter_map(|merge| merge.split_once(' '));
    let tokens = halves.flat_map(|(left, right)| {
        [Cow::Borrowed(left), Cow::Borrowed(right), Cow::Owned(format!("{left}{right}"))]
    });
    tokens.collect()
}

/// Merges as GGUF writes them.
pub(super) fn spell(file: &str, merges: &[(String, String)]) -> Result<Vec<String>> {
    let spelled =
        merges.iter().map(|(left, right)| match left.contains(' ') || right.contains(' ') {
            false => Ok(format!("{left} {right}")),
            true => Err(Error::unsupported(
                file,
                format!(
                    "the merge {left:?} {right:?} has a space in a token, which GGUF cannot write"
                ),
            )),
        });
    spelled.collect()
}
