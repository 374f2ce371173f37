//! From what a request says to what sequences do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::value::RawValue;

use super::api::{ChatOwn, CompletionOwn, Options, Prompt};
use super::errors::ApiError;
use super::tools::Style;
use crate::chat::Chat;
use crate::decode::{Settings, Strategy};
use crate::error::Error;
use crate::lm::Token;
use crate::sampling::Warp;
use crate::session::generation::{Request, clock_seed};
use crate::session::pair::Pair;
use crate::tokenizer::EncodeOptions;

/// The most answers to one request.
const MOST_ANSWERS: usize = 128;
/// The most texts that end an answer.
const MOST_STOPS: usize = 16;
/// The most alternatives that are told beside a token.
const MOST_ALTERNATIVES: usize = 20;

/// What a request asks for.
#[derive(Debug)]
pub(super) struct Wanted {
    /// A prompt for each job, answers to one prompt one after the other.
    pub prompts: Vec<Vec<Token>>,
    /// What is the same for all jobs but the seed, which goes up by one from answer to answer.
    pub request: Request,
    /// How many answers each prompt has.
    pub answers: usize,
    pub stream: bool,
    pub include_usage: bool,
    /// Whether log-probabilities are told.
    pub log_probs: bool,
    /// Whether chunks tell who wrote each token.
    pub origins: bool,
    /// How calls are written, if there may be some.
    pub calls: Option<Style>,
}

/// What requests are read against.
pub(super) struct Terms<'a> {
    pub pair: &'a Pair,
    /// What is not said.
    pub defaults: &'a Settings,
    /// The most tokens that a prompt and its answer may have together.
    pub context: usize,
    /// The most jobs that one request may have.
    pub most_jobs: usize,
}

impl Terms<'_> {
    /// What a chat asks for.
    pub fn chat(&self, own: &ChatOwn, options: &Options, chat: &Chat) -> Result<Wanted, ApiError> {
        let alternatives = own.top_logprobs.unwrap_or(0);
        if alternatives > 0 && own.logprobs != Some(true) {
            return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true"));
        }
        let log_probs = own.logprobs.unwrap_or(false).then_some(alternatives);
        let mut inputs = chat.inputs();
        inputs
            .set_messages(own.messages.get(), "messages")
            .map_err(|e| ApiError::invalid("messages", e.to_string()))?;
        if inputs.is_empty() {
            return Err(ApiError::invalid("messages", "messages is empty; say something"));
        }
        check_contents(&own.messages)?;
        let choice = own.tool_choice.as_ref();
        let mut calls = None;
        if let Some(tools) = own.tools.as_ref().filter(|tools| tools.get() != "null") {
            check_tools(tools)?;
            match choice.and_then(|choice| choice.as_str()) {
                Some("none") => {}
                Some("auto") | None if choice.is_none_or(|choice| choice.is_string()) => {
                    calls = Style::of_template(chat.template().source());
                    inputs
                        .set_tools(tools.get(), "tools")
                        .map_err(|e| ApiError::invalid("tools", e.to_string()))?;
                }
                _ => {
                    let what = "tool_choice can be \"none\" or \"auto\" here: a call cannot be made sure of";
                    return Err(ApiError::invalid("tool_choice", what));
                }
            }
        } else if choice
            .is_some_and(|choice| !choice.is_null() && choice != "none" && choice != "auto")
        {
            return Err(ApiError::invalid("tool_choice", "tool_choice needs tools"));
        }
        for (name, json) in own.chat_template_kwargs.iter().flatten() {
            inputs
                .set_variable(name, json.get())
                .map_err(|e| ApiError::invalid("chat_template_kwargs", e.to_string()))?;
        }
        let prompt =
            chat.encode(&inputs).map_err(|e| ApiError::invalid("messages", e.to_string()))?;
        let wanted = self.wanted(vec![prompt], "messages", options, log_probs, None)?;
        Ok(Wanted { calls, ..wanted })
    }

    /// What a completion asks for.
    pub fn completion(&self, own: &CompletionOwn, options: &Options) -> Result<Wanted, ApiError> {
        if own.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::invalid(
                "suffix",
                "suffix is not supported: text is only added at the end",
            ));
        }
        let n = options.n.unwrap_or(1);
        if own.best_of.is_some_and(|best| best != n) {
            return Err(ApiError::invalid("best_of", "best_of is not supported beyond n"));
        }
        if own.prompt.0.is_empty() {
            return Err(ApiError::invalid("prompt", "prompt is empty; give a text or tokens"));
        }
        let tokenizer = self.pair.tokenizer();
        let encoded = own.prompt.0.iter().map(|prompt| match prompt {
            Prompt::Text(text) => {
                let options = EncodeOptions { bos: tokenizer.add_bos(), special: false };
                Ok(tokenizer.encode(text, options))
            }
            Prompt::Tokens(tokens) => {
                self.check_tokens(tokens, "prompt")?;
                Ok(tokens.clone())
            }
        });
        let prompts = encoded.collect::<Result<_, ApiError>>()?;
        // What OpenAI's interface has where nothing is said.
        self.wanted(prompts, "prompt", options, own.logprobs, Some(16))
    }

    /// Refuses tokens that the vocabulary does not have.
    pub fn check_tokens(&self, tokens: &[Token], param: &'static str) -> Result<(), ApiError> {
        let all = self.pair.vocabulary().tokens;
        match tokens.iter().find(|&&token| token as usize >= all) {
            Some(token) => {
                let what = format!("token {token} is outside the vocabulary of {all}");
                Err(ApiError::invalid(param, what))
            }
            None => Ok(()),
        }
    }

    fn wanted(
        &self,
        prompts: Vec<Vec<Token>>,
        param: &'static str,
        options: &Options,
        log_probs: Option<usize>,
        default_max: Option<u32>,
    ) -> Result<Wanted, ApiError> {
        if log_probs.is_some_and(|n| n > MOST_ALTERNATIVES) {
            let param = if param == "prompt" { "logprobs" } else { "top_logprobs" };
            return Err(ApiError::invalid(
                param,
                format!("{param} is {MOST_ALTERNATIVES} at most"),
            ));
        }
        if options.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()) {
            return Err(ApiError::invalid("logit_bias", "logit_bias is not supported"));
        }
        let (max_param, max) = match options.max_completion_tokens {
            Some(max) => ("max_completion_tokens", Some(max)),
            None => ("max_tokens", options.max_tokens),
        };
        if max == Some(0) {
            return Err(ApiError::invalid(max_param, format!("{max_param} must be 1 or more")));
        }
        let answers = options.n.unwrap_or(1);
        if !(1..=MOST_ANSWERS).contains(&answers) {
            return Err(ApiError::invalid(
                "n",
                format!("n must be from 1 to {MOST_ANSWERS}, not {answers}"),
            ));
        }
        let jobs = answers * prompts.len();
        if jobs > self.most_jobs {
            let what = format!(
                "{jobs} answers are wanted at once; this server takes {} (n times prompts)",
                self.most_jobs
            );
            return Err(ApiError::invalid("n", what));
        }
        let stop = options.stop.as_ref().map_or(Vec::new(), |stop| stop.0.clone());
        if stop.len() > MOST_STOPS {
            return Err(ApiError::invalid("stop", format!("{MOST_STOPS} stop texts are the most")));
        }
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::invalid("stop", "a stop text is empty"));
        }
        for prompt in &prompts {
            if prompt.is_empty() {
                return Err(ApiError::invalid(
                    param,
                    format!("{param} has no tokens; say something"),
                ));
            }
            if prompt.len() > self.context {
                let what = format!(
                    "the prompt has {} tokens, and the context holds {}; shorten it",
                    prompt.len(),
                    self.context
                );
                return Err(ApiError::invalid(param, what).with_code("context_length_exceeded"));
            }
        }
        let origins = options.mtad_tokens.unwrap_or(false);
        let mut settings = self.settings(options)?;
        settings.score = log_probs.is_some() || origins;
        settings.alternatives = log_probs.unwrap_or(0);
        let stream = options.stream.unwrap_or(false);
        let asks = options.stream_options.as_ref().and_then(|options| options.include_usage);
        if asks.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "stream_options needs stream: true"));
        }
        constrained(options)?;
        let request = Request {
            settings,
            max_tokens: max.or(default_max).map(|max| max as usize),
            stop,
            special: false,
            cancel: Arc::new(AtomicBool::new(false)),
        };
        Ok(Wanted {
            prompts,
            request,
            answers,
            stream,
            include_usage: asks.unwrap_or(false),
            log_probs: log_probs.is_some(),
            origins,
            calls: None,
        })
    }

    fn settings(&self, options: &Options) -> Result<Settings, ApiError> {
        let mut settings = self.defaults.clone();
        if let Some(name) = &options.strategy {
            let strategy: Strategy =
                name.parse().map_err(|e: Error| ApiError::invalid("strategy", e.to_string()))?;
            if strategy.needs_draft() && self.pair.draft().is_none() {
                let what = format!(
                    "strategy {name} needs a draft model, and this server has none; use greedy or sample"
                );
                return Err(ApiError::invalid("strategy", what));
            }
            settings.strategy = strategy;
        }
        settings.seed = options.seed.map_or_else(clock_seed, |seed| seed as u64);
        set(&mut settings.tau, options.tau);
        set(&mut settings.gamma, options.gamma);
        set(&mut settings.beam_width, options.beam_width);
        let warp: &mut Warp = &mut settings.warp;
        set(&mut warp.temperature, options.temperature);
        set(&mut warp.top_k, options.top_k);
        set(&mut warp.top_p, options.top_p);
        set(&mut warp.min_p, options.min_p);
        set(&mut warp.repeat_penalty, options.repeat_penalty);
        set(&mut warp.presence_penalty, options.presence_penalty);
        set(&mut warp.frequency_penalty, options.frequency_penalty);
        settings.validate().map_err(|error| {
            // The library's words begin with the setting's name, as the command line spells it.
            let message = error.to_string();
            const NAMES: [(&str, &str); 10] = [
                ("temperature", "temperature"),
                ("top-p", "top_p"),
                ("min-p", "min_p"),
                ("repeat-penalty", "repeat_penalty"),
                ("presence-penalty", "presence_penalty"),
                ("frequency-penalty", "frequency_penalty"),
                ("tau", "tau"),
                ("gamma", "gamma"),
                ("beam-width", "beam_width"),
                ("branching", "strategy"),
            ];
            let named = NAMES.iter().find(|(name, _)| message.starts_with(name));
            let spelled = NAMES.iter().fold(message.clone(), |text, (from, to)| {
                if from.contains('-') { text.replace(from, to) } else { text }
            });
            ApiError::invalid(named.map(|(_, param)| *param), spelled)
        })?;
        Ok(settings)
    }
}

/// Takes what was said.
fn set<T>(setting: &mut T, said: Option<T>) {
    if let Some(value) = said {
        *setting = value;
    }
}

/// Refuses what a text is to follow, as nothing can make sure of it.
fn constrained(options: &Options) -> Result<(), ApiError> {
    if options.grammar.is_some() {
        return Err(ApiError::invalid("grammar", "grammar is not supported"));
    }
    match &options.response_format {
        Some(format) if format.kind != "text" => {
            let what = format!("response_format {:?} is not supported; text is", format.kind);
            Err(ApiError::invalid("response_format", what))
        }
        _ => Ok(()),
    }
}

/// Messages have texts, or parts that are texts.
fn check_contents(messages: &RawValue) -> Result<(), ApiError> {
    let messages: Vec<BTreeMap<String, serde_json::Value>> =
        serde_json::from_str(messages.get())
            .map_err(|e| ApiError::invalid("messages", e.to_string()))?;
    for (i, message) in messages.iter().enumerate() {
        let wrong =
            |what: String| Err(ApiError::invalid("messages", format!("message {i}: {what}")));
        match message.get("content") {
            None | Some(serde_json::Value::Null) => {
                let calls = message.get("tool_calls").is_some_and(serde_json::Value::is_array);
                if !calls {
                    return wrong("it has no content".to_owned());
                }
            }
            Some(serde_json::Value::String(_)) => {}
            Some(serde_json::Value::Array(parts)) => {
                for part in parts {
                    let kind = part.get("type").and_then(serde_json::Value::as_str);
                    let is_text = part.get("text").is_some_and(serde_json::Value::is_string);
                    if kind != Some("text") || !is_text {
                        let kind = kind.unwrap_or("without a type");
                        return wrong(format!(
                            "a part of it is {kind}; only parts of type text are taken"
                        ));
                    }
                }
            }
            Some(_) => {
                return wrong("its content is neither a text nor an array of parts".to_owned());
            }
        }
    }
    Ok(())
}

/// Tools are functions with names.
fn check_tools(tools: &RawValue) -> Result<(), ApiError> {
    let wrong = |what: String| ApiError::invalid("tools", what);
    let tools: Vec<serde_json::Value> = serde_json::from_str(tools.get())
        .map_err(|e| wrong(format!("tools must be an array of objects: {e}")))?;
    for (i, tool) in tools.iter().enumerate() {
        let name = tool.get("function").and_then(|function| function.get("name"));
        let is_function = tool.get("type").and_then(serde_json::Value::as_str) == Some("function");
        if !is_function || !name.is_some_and(serde_json::Value::is_string) {
            return Err(wrong(format!(
                "tool {i} must be of the type \"function\" and have a function with a name"
            )));
        }
    }
    Ok(())
}
