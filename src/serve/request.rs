//! From what a request says to what sequences do.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use serde_json::value::RawValue;

use super::api::{ChatOwn, CompletionOwn, NamedSchema, Options, Prompt};
use super::errors::ApiError;
use super::tools::Style;
use crate::chat::Chat;
use crate::decode::{Settings, Strategy};
use crate::error::Error;
use crate::grammar::Grammar;
use crate::lm::Token;
use crate::sampling::{Constraint, Warp};
use crate::session::generation::{Request, clock_seed};
use crate::session::pair::Pair;
use crate::tokenizer::{EncodeOptions, Tokenizer};

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
        inputs.simplify();
        if own.functions.as_ref().is_some_and(|functions| !functions.is_null()) {
            return Err(ApiError::invalid("functions", "functions are not supported; use tools"));
        }
        let choice = ToolChoice::of(own.tool_choice.as_ref())?;
        let mut calls = None;
        let mut form = None;
        if let Some(tools) = own.tools.as_ref().filter(|tools| tools.get() != "null") {
            let functions = functions(tools)?;
            if choice != ToolChoice::None {
                calls = Style::of_template(chat.template().source());
                inputs
                    .set_tools(tools.get(), "tools")
                    .map_err(|e| ApiError::invalid("tools", e.to_string()))?;
            }
            if let Some(schema) = choice.schema(&functions)? {
                // A call that must come is held to its form, which is the same for all models.
                calls = Some(Style::Bare);
                form = Some(
                    Grammar::json_schema(&schema, self.pair.tokenizer())
                        .map_err(|e| ApiError::invalid("tools", e.to_string()))?,
                );
            }
        } else if !matches!(choice, ToolChoice::None | ToolChoice::Auto) {
            return Err(ApiError::invalid("tool_choice", "tool_choice needs tools"));
        }
        for (name, json) in own.chat_template_kwargs.iter().flatten() {
            inputs
                .set_variable(name, json.get())
                .map_err(|e| ApiError::invalid("chat_template_kwargs", e.to_string()))?;
        }
        let prompt =
            chat.encode(&inputs).map_err(|e| ApiError::invalid("messages", e.to_string()))?;
        let wanted = self.wanted(vec![prompt], "messages", options, log_probs, None, form)?;
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
        self.wanted(prompts, "prompt", options, own.logprobs, Some(16), None)
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

    /// `call` is what a call has to look like that must come.
    fn wanted(
        &self,
        prompts: Vec<Vec<Token>>,
        param: &'static str,
        options: &Options,
        log_probs: Option<usize>,
        default_max: Option<u32>,
        call: Option<Grammar>,
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
        settings.alternatives = log_probs.unwrap_or(0);
        let stream = options.stream.unwrap_or(false);
        let asks = options.stream_options.as_ref().and_then(|options| options.include_usage);
        if asks.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "stream_options needs stream: true"));
        }
        let form = match (call, form(options, self.pair.tokenizer())?) {
            (Some(_), Some(_)) => {
                let what = "tool_choice and a format or grammar exclude each other";
                return Err(ApiError::invalid("tool_choice", what));
            }
            (call, form) => call.or(form),
        };
        settings.constraint = form.map(|form| Arc::new(form) as Arc<dyn Constraint>);
        // Scores want a pass for each token, also for those that a form forces.
        settings.score = log_probs.is_some() || (origins && settings.constraint.is_none());
        let request = Request {
            settings,
            max_tokens: max.or(default_max).map(|max| max as usize),
            stop,
            ..Request::default()
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
            const NAMES: [&str; 9] = [
                "temperature",
                "top-p",
                "min-p",
                "repeat-penalty",
                "presence-penalty",
                "frequency-penalty",
                "tau",
                "gamma",
                "beam-width",
            ];
            let spelled = |name: &str| name.replace('-', "_");
            let message = error.to_string();
            let param = NAMES.iter().find(|name| message.starts_with(*name));
            let param = param.map(|name| spelled(name));
            let message =
                NAMES.iter().fold(message, |text, name| text.replace(name, &spelled(name)));
            ApiError { param, ..ApiError::invalid(None, message) }
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

/// Which function is to be called.
#[derive(Debug, PartialEq)]
enum ToolChoice {
    /// None.
    None,
    /// What the model wants.
    Auto,
    /// Any, but one.
    Required,
    /// This one.
    Named(String),
}

impl ToolChoice {
    fn of(said: Option<&serde_json::Value>) -> Result<Self, ApiError> {
        use serde_json::Value;
        let named =
            |choice: &Value| choice.get("function")?.get("name")?.as_str().map(str::to_owned);
        match said {
            None | Some(Value::Null) => Ok(ToolChoice::Auto),
            Some(choice) => match (choice.as_str(), named(choice)) {
                (Some("none"), _) => Ok(ToolChoice::None),
                (Some("auto"), _) => Ok(ToolChoice::Auto),
                (Some("required"), _) => Ok(ToolChoice::Required),
                (_, Some(name)) => Ok(ToolChoice::Named(name)),
                _ => {
                    let what = "tool_choice is \"none\", \"auto\", \"required\", or \
                                {\"type\": \"function\", \"function\": {\"name\": ..}}";
                    Err(ApiError::invalid("tool_choice", what))
                }
            },
        }
    }

    /// What a call that must come looks like.
    fn schema(
        &self,
        functions: &[(String, serde_json::Value)],
    ) -> Result<Option<serde_json::Value>, ApiError> {
        let chosen: Vec<_> = match self {
            ToolChoice::None | ToolChoice::Auto => return Ok(None),
            ToolChoice::Required => functions.iter().collect(),
            ToolChoice::Named(name) => {
                functions.iter().filter(|(known, _)| known == name).collect()
            }
        };
        if chosen.is_empty() {
            let what = format!("tool_choice: there is no such function among the tools ({self:?})");
            return Err(ApiError::invalid("tool_choice", what));
        }
        let call = |(name, parameters): &(String, serde_json::Value)| {
            json!({
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        // No white space but what Python's json writes: models that may write it sometimes find no end of it.
        let spaces =
            json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        let calls: Vec<_> = chosen.into_iter().map(call).collect();
        Ok(Some(json!({"anyOf": calls, "x-guidance": spaces})))
    }
}

/// What a text is to follow by the request, if anything.
fn form(options: &Options, tokenizer: &Tokenizer) -> Result<Option<Grammar>, ApiError> {
    let of_format = |form: Result<Grammar, Error>| {
        form.map(Some).map_err(|e| ApiError::invalid("response_format", e.to_string()))
    };
    let format = options.response_format.as_ref();
    let by_format = match format.map(|format| (format.kind.as_str(), &format.json_schema)) {
        None | Some(("text", _)) => None,
        Some(("json_object", _)) => of_format(Grammar::json_object(tokenizer))?,
        Some(("json_schema", Some(NamedSchema { schema: Some(schema), .. }))) => {
            of_format(Grammar::json_schema(schema, tokenizer))?
        }
        Some(("json_schema", _)) => {
            let what = "response_format of type json_schema needs json_schema with a schema";
            return Err(ApiError::invalid("response_format", what));
        }
        Some((kind, _)) => {
            let what = format!("response_format is text, json_object or json_schema, not {kind:?}");
            return Err(ApiError::invalid("response_format", what));
        }
    };
    match (&options.grammar, by_format) {
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "grammar",
            "grammar and response_format are both given; one will do",
        )),
        (Some(grammar), None) => {
            // In GBNF `::=` stands in every rule, in Lark in none.
            let read = match grammar.contains("::=") {
                true => Grammar::gbnf(grammar, tokenizer),
                false => Grammar::lark(grammar, tokenizer),
            };
            read.map(Some).map_err(|e| ApiError::invalid("grammar", e.to_string()))
        }
        (None, by_format) => Ok(by_format),
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

/// The functions that tools are, with the schemas of their arguments.
fn functions(tools: &RawValue) -> Result<Vec<(String, serde_json::Value)>, ApiError> {
    let wrong = |what: String| ApiError::invalid("tools", what);
    let tools: Vec<serde_json::Value> = serde_json::from_str(tools.get())
        .map_err(|e| wrong(format!("tools must be an array of objects: {e}")))?;
    let function = |(i, tool): (usize, &serde_json::Value)| {
        let is_function = tool.get("type").and_then(serde_json::Value::as_str) == Some("function");
        let function = tool.get("function").filter(|_| is_function);
        let name = function.and_then(|function| function.get("name")?.as_str());
        let (Some(function), Some(name)) = (function, name) else {
            return Err(wrong(format!(
                "tool {i} must be of the type \"function\" and have a function with a name"
            )));
        };
        let parameters = function.get("parameters").filter(|parameters| !parameters.is_null());
        Ok((name.to_owned(), parameters.cloned().unwrap_or_else(|| json!({"type": "object"}))))
    };
    tools.iter().enumerate().map(function).collect()
}
