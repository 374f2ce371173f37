//! The options that hold text to a grammar.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::{of_option, read_text};
use crate::error::{Error, Result};
use crate::grammar::Grammar;
use crate::sampling::Constraint;
use crate::tokenizer::Tokenizer;

/// What the text must be.
#[derive(Debug, Args)]
pub(super) struct GrammarArgs {
    /// Generate JSON that fits this schema: a file, or the schema itself. `{"type": "object"}` is any
    /// JSON object
    #[arg(long, value_name = "FILE|JSON", conflicts_with_all = ["grammar", "regex"])]
    json_schema: Option<String>,

    /// Generate a text of this grammar: a file in Lark's syntax (.lark) or llama.cpp's GBNF (.gbnf)
    #[arg(long, value_name = "FILE", conflicts_with = "regex")]
    grammar: Option<PathBuf>,

    /// Generate a text that matches this regular expression as a whole
    #[arg(long, value_name = "RE")]
    regex: Option<String>,
}

impl GrammarArgs {
    /// The files that are read.
    pub fn inputs(&self) -> impl Iterator<Item = &Path> {
        let schema = self.json_schema.as_deref().filter(|schema| !is_json(schema)).map(Path::new);
        schema.into_iter().chain(self.grammar.as_deref())
    }

    /// What the text is held to, in the tokens of a vocabulary.
    pub fn constraint(&self, tokenizer: &Tokenizer) -> Result<Option<Arc<dyn Constraint>>> {
        let grammar = if let Some(schema) = &self.json_schema {
            json_schema(schema, tokenizer).map_err(of_option("--json-schema"))?
        } else if let Some(file) = &self.grammar {
            let text = read_text(None, Some(file), "grammar")?;
            let extension = file.extension().map(|extension| extension.to_ascii_lowercase());
            // Lark has a single colon there.
            let is_gbnf = match extension.as_deref().and_then(|extension| extension.to_str()) {
                Some("gbnf") => true,
                Some("lark") => false,
                _ => text.contains("::="),
            };
            let made = match is_gbnf {
                true => Grammar::gbnf(&text, tokenizer),
                false => Grammar::lark(&text, tokenizer),
            };
            made.map_err(of_option("--grammar"))?
        } else if let Some(regex) = &self.regex {
            Grammar::regex(regex, tokenizer).map_err(of_option("--regex"))?
        } else {
            return Ok(None);
        };
        super::print_notes(grammar.notes().to_vec());
        Ok(Some(Arc::new(grammar)))
    }
}

/// Whether an argument is JSON rather than a file.
fn is_json(argument: &str) -> bool {
    argument.trim_start().starts_with('{')
}

fn json_schema(argument: &str, tokenizer: &Tokenizer) -> Result<Grammar> {
    let file = (!is_json(argument)).then(|| PathBuf::from(argument));
    let text = read_text(file.is_none().then_some(argument), file.as_ref(), "JSON schema")?;
    let schema = serde_json::from_str(&text).map_err(|e| {
        let name = if file.is_some() { argument } else { "it" };
        Error::Grammar(format!("{name} is no JSON: {e}"))
    })?;
    Grammar::json_schema(&schema, tokenizer)
}
