//! `mtad template`: what a chat template makes of messages.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use super::console::stdout_error;
use super::{VocabularyArgs, open_model, read_text};
use crate::chat::{Chat, Inputs, NAMES, Template};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;

/// Print what a chat template makes of messages
///
/// Messages are JSON as OpenAI writes them: [{"role": "user", "content": "Hello"}]. Where the
/// template refuses them, its words are printed to standard error and the exit code is 1. The
/// environment variable MTAD_NOW=2026-01-02T03:04:05 sets the time for templates that tell it.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    /// The model whose template it is, a GGUF file
    #[arg(long, short, value_name = "GGUF", required_unless_present = "template")]
    model: Option<PathBuf>,

    /// A template instead: a file, a further one that the model names, or one of chatml, llama2,
    /// llama3, mistral, gemma, phi3, zephyr, vicuna, alpaca, plain
    #[arg(long, value_name = "FILE|NAME")]
    template: Option<String>,

    /// Messages [default: standard input]
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,

    /// Tools that the model may call, as OpenAI writes them
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,

    /// Do not end where the assistant begins to speak
    #[arg(long)]
    no_generation_prompt: bool,

    /// The name of the token that begins a text [default: the model's]
    #[arg(long, value_name = "TEXT")]
    bos: Option<String>,

    /// The name of the token that ends a text [default: the model's]
    #[arg(long, value_name = "TEXT")]
    eos: Option<String>,

    /// Set a further variable of the template; the value is JSON; may be given more than once
    #[arg(long, value_name = "NAME=JSON")]
    set: Vec<String>,

    #[command(flatten)]
    vocabulary: VocabularyArgs,
}

/// The template that `--template` names, or the file's.
pub(super) fn find(name: Option<&str>, gguf: Option<&Gguf>) -> Result<Template> {
    if let Some(name) = name {
        let path = Path::new(name);
        if path.is_file() {
            let source = std::fs::read_to_string(path).map_err(|e| Error::io(name, e))?;
            return Template::new(source);
        }
        let of_model = gguf.map(|gguf| Template::of_file(gguf, Some(name))).transpose()?.flatten();
        return match of_model {
            Some(template) => Ok(template),
            None => Template::named(name).map_err(|error| {
                Error::invalid(format!("--template {name}: there is no such file, and {error}"))
            }),
        };
    }
    let Some(gguf) = gguf else { return Err(Error::invalid("name a model or a template")) };
    Template::of_file(gguf, None)?.ok_or_else(|| {
        let what = format!(
            "has no chat template; a model that was tuned to answer may do with one of these: \
             --template {}",
            NAMES.join("|")
        );
        Error::unsupported(gguf.name(), what)
    })
}

/// Sets the time that `MTAD_NOW` names, if it does.
pub(super) fn set_now(inputs: &mut Inputs) -> Result<()> {
    const NAME: &str = "MTAD_NOW";
    if let Some(now) = std::env::var_os(NAME).filter(|now| !now.is_empty()) {
        let text = now.to_string_lossy();
        inputs.now = text.parse().map_err(|_| {
            Error::invalid(format!(
                "{NAME} is {text:?}; a time such as 2026-01-02T03:04:05 is needed"
            ))
        })?;
    }
    Ok(())
}

pub(super) fn template(args: &TemplateArgs) -> Result<()> {
    let gguf = args.model.as_deref().map(open_model).transpose()?;
    let template = find(args.template.as_deref(), gguf.as_ref())?;
    let mut inputs = match &gguf {
        Some(gguf) => {
            let name = args.vocabulary.pre_tokenizer.as_deref();
            Chat::new(Template::new("")?, &Tokenizer::with_pre_tokenizer(gguf, name)?).inputs()
        }
        None => Inputs::default(),
    };
    set_now(&mut inputs)?;
    inputs.add_generation_prompt = !args.no_generation_prompt;
    if let Some(bos) = &args.bos {
        inputs.bos.clone_from(bos);
    }
    if let Some(eos) = &args.eos {
        inputs.eos.clone_from(eos);
    }
    let name = |file: &Option<PathBuf>| {
        file.as_ref().map_or_else(|| "standard input".to_owned(), |file| file.display().to_string())
    };
    let messages = read_text(None, args.messages.as_ref(), "messages")?;
    inputs.set_messages(&messages, &name(&args.messages))?;
    if args.tools.is_some() {
        let tools = read_text(None, args.tools.as_ref(), "tools")?;
        inputs.set_tools(&tools, &name(&args.tools))?;
    }
    for set in &args.set {
        let Some((name, json)) = set.split_once('=') else {
            return Err(Error::invalid(format!("--set {set}: NAME=JSON is needed")));
        };
        inputs.set_variable(name, json)?;
    }
    // As it is: what a script compares has no line end that is not the template's.
    let text = template.render(&inputs)?;
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(stdout_error)
}
