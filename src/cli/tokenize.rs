//! `mtad tokenize`: the tokens of a text.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{VocabularyArgs, open_model, print_line, print_notes, read_text, warn_of_doubled_bos};
use crate::error::Result;
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Show the tokens of a text
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// The text [default: standard input]
    text: Option<String>,

    /// A GGUF file with a vocabulary, of any architecture [default: the built-in pair's]
    #[arg(
        long,
        short,
        value_name = "GGUF",
        default_value = "builtin:target",
        hide_default_value = true
    )]
    model: PathBuf,

    /// Begin with the token that begins a text
    #[arg(long)]
    bos: bool,

    /// Take names of control tokens in the text for those tokens
    #[arg(long)]
    special: bool,

    #[command(flatten)]
    vocabulary: VocabularyArgs,

    /// Print one line of JSON: {"ids": [...], "pieces": [...]}
    #[arg(long)]
    json: bool,
}

pub(super) fn tokenize(args: &TokenizeArgs) -> Result<()> {
    let pre_tokenizer = args.vocabulary.pre_tokenizer.as_deref();
    let tokenizer = Tokenizer::with_pre_tokenizer(&open_model(&args.model)?, pre_tokenizer)?;
    print_notes(tokenizer.notes().to_vec());
    let text = read_text(args.text.as_deref(), None, "text")?;
    let ids = tokenizer.encode(&text, EncodeOptions { bos: args.bos, special: args.special });
    warn_of_doubled_bos(&tokenizer, &ids);
    // A token may be part of a character: such bytes are shown as U+FFFD.
    let pieces: Vec<String> =
        ids.iter().map(|&id| String::from_utf8_lossy(&tokenizer.piece(id)).into_owned()).collect();
    if args.json {
        return print_line(json!({"ids": ids, "pieces": pieces}));
    }
    for (id, piece) in ids.iter().zip(&pieces) {
        print_line(format_args!("{id:>7}  {piece:?}"))?;
    }
    Ok(())
}
