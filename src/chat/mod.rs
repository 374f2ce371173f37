//! Conversations: from messages to the tokens that a model was tuned to answer.
//!
//! A [`Template`] makes text of messages, with control tokens by their names. A [`Chat`] makes tokens
//! of that text. Names of control tokens in what somebody *says* stay text: they are found in the
//! rendered text as the template's own or a message's, and a message's are not taken for tokens. So a
//! user who types `<|im_end|>` ends nothing.

mod guard;
mod json;
mod named;
mod template;

pub use named::NAMES;
pub use template::{Inputs, Template};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::tokenizer::{EncodeOptions, Tokenizer};

use guard::Guard;

/// Where a file keeps its template; further ones have a name behind it.
const KEY: &str = "tokenizer.chat_template";

impl Template {
    /// The template of a model file, if it has one. With a name, one of several: the file's
    /// `tokenizer.chat_template.NAME`.
    ///
    /// # Errors
    /// [`Error::Template`] for one that is damaged; [`Error::Format`] if it is no text.
    pub fn of_file(gguf: &Gguf, name: Option<&str>) -> Result<Option<Self>> {
        let key = match name {
            Some(name) => format!("{KEY}.{name}"),
            None => KEY.to_owned(),
        };
        gguf.get_str(&key)?.filter(|source| !source.is_empty()).map(Template::new).transpose()
    }

    /// A template of a family of models by its name, one of [`NAMES`].
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that there is not.
    pub fn named(name: &str) -> Result<Self> {
        let source = named::source(name).ok_or_else(|| {
            let names = NAMES.join(", ");
            Error::invalid(format!("there is no chat template {name:?}; there are {names}"))
        })?;
        Template::new(source)
    }
}

/// A template with the vocabulary of the model that it is for.
#[derive(Debug)]
pub struct Chat {
    template: Template,
    tokenizer: Tokenizer,
    guard: Guard,
}

impl Chat {
    /// A template for the model that a vocabulary belongs to.
    pub fn new(template: Template, tokenizer: &Tokenizer) -> Self {
        let guard = Guard::new(tokenizer.control_names());
        Chat { template, tokenizer: tokenizer.clone(), guard }
    }

    /// The template.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// Inputs without messages, with the names of the tokens that begin and end a text.
    pub fn inputs(&self) -> Inputs {
        let name = |id: Option<u32>| id.map_or("", |id| self.tokenizer.token(id)).to_owned();
        Inputs {
            bos: name(self.tokenizer.bos()),
            eos: name(self.tokenizer.eos()),
            ..Inputs::default()
        }
    }

    /// The text that the template makes of a conversation.
    ///
    /// # Errors
    /// As [`Template::render`].
    pub fn render(&self, inputs: &Inputs) -> Result<String> {
        self.template.render(inputs)
    }

    /// The tokens of a conversation. They begin with the token that begins a text if the model
    /// expects it, once, whether the template writes it or not.
    ///
    /// # Errors
    /// As [`Template::render`].
    pub fn encode(&self, inputs: &Inputs) -> Result<Vec<u32>> {
        let (text, mark) = self.guard.render(&self.template, inputs)?;
        let special = EncodeOptions { bos: false, special: true };
        let mut ids = self.tokenizer.encode_marked(&text, special, Some(mark));
        if let Some(bos) = self.tokenizer.bos().filter(|_| self.tokenizer.add_bos())
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }
}
