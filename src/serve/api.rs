//! What requests and answers look like: OpenAI's shapes, and what this program has beyond them.
//!
//! A body is read twice: once for what its route alone has, once for the [`Options`] that all routes that generate
//! share. Members that nobody knows are left alone, as clients send more than any server takes.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error as _, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::lm::Token;

/// How text is generated and told: what chat and completions share.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct Options {
    /// Whether the answer comes as server-sent events.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// The most tokens of an answer.
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The same, by its newer name.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// How many answers to make.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<usize>,
    /// Texts that end an answer; they are not part of it.
    #[schema(value_type = Option<Texts>)]
    pub stop: Option<Strings>,
    /// The same seed gives the same text.
    pub seed: Option<i64>,
    /// 0 takes the most probable token.
    #[schema(minimum = 0)]
    pub temperature: Option<f32>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<usize>,
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    #[schema(exclusive_minimum = 0)]
    pub repeat_penalty: Option<f32>,
    #[schema(minimum = -100, maximum = 100)]
    pub presence_penalty: Option<f32>,
    #[schema(minimum = -100, maximum = 100)]
    pub frequency_penalty: Option<f32>,
    /// How tokens are chosen: greedy, sample, speculative, mtad, ...
    pub strategy: Option<String>,
    /// The threshold of joint decoding: accepted blocks have a joint probability ratio, target to draft, above it.
    #[schema(minimum = 0)]
    pub tau: Option<f64>,
    /// Tokens that the draft proposes in a round.
    #[schema(minimum = 1, maximum = 127)]
    pub gamma: Option<usize>,
    #[schema(minimum = 1, maximum = 128)]
    pub beam_width: Option<usize>,
    /// A grammar that the text follows, in GBNF or Lark.
    pub grammar: Option<String>,
    pub response_format: Option<ResponseFormat>,
    /// Not supported.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Whether chunks tell of each token who wrote it.
    pub mtad_tokens: Option<bool>,
}

/// How a stream is told.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    /// Whether a last chunk has the usage.
    pub include_usage: Option<bool>,
}

/// What an answer's text is to be.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    pub kind: String,
    pub json_schema: Option<NamedSchema>,
}

/// A JSON schema with its name.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NamedSchema {
    /// What it is called; it changes nothing.
    #[allow(dead_code)]
    pub name: Option<String>,
    #[schema(value_type = Option<Object>)]
    pub schema: Option<serde_json::Value>,
}

/// What `/v1/chat/completions` alone has.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ChatOwn {
    /// The conversation, as the model's template takes it.
    #[schema(value_type = Vec<Message>, min_items = 1)]
    pub messages: Box<RawValue>,
    /// What the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Box<RawValue>>,
    /// `none`, `auto`, `required`, or one function.
    #[schema(value_type = Option<ToolChoice>)]
    pub tool_choice: Option<serde_json::Value>,
    /// Not supported: `tools` took their place.
    #[schema(value_type = Option<Vec<Object>>)]
    pub functions: Option<serde_json::Value>,
    /// Whether each token's log-probability is told.
    pub logprobs: Option<bool>,
    /// How many of the most probable tokens are told in each one's place.
    #[schema(maximum = 20)]
    pub top_logprobs: Option<usize>,
    /// Further variables of the template, such as `enable_thinking`.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<BTreeMap<String, Box<RawValue>>>,
}

/// A message, for the document of the interface: what is in it is the template's to know.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(super) struct Message {
    #[schema(example = "user")]
    role: String,
    /// There may be none where there are calls.
    content: Option<Content>,
}

/// What a message says, for the document of the interface.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[schema(example = "Hello")]
#[allow(dead_code)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of what a message says, for the document of the interface: text.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
pub(super) struct Part {
    #[serde(rename = "type")]
    #[schema(example = "text")]
    kind: String,
    #[schema(example = "Hello")]
    text: String,
}

/// Which function is to be called, for the document of the interface.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[schema(example = "auto")]
#[allow(dead_code)]
pub(super) enum ToolChoice {
    /// `none`, `auto` or `required`.
    Word(String),
    One {
        #[serde(rename = "type")]
        kind: String,
        function: ChosenFunction,
    },
}

/// A function by its name, for the document of the interface.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
pub(super) struct ChosenFunction {
    name: String,
}

/// The body of `/v1/chat/completions`, for the document of the interface.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(super) struct ChatRequest {
    #[schema(inline)]
    #[serde(flatten)]
    own: ChatOwn,
    #[serde(flatten)]
    options: Options,
}

/// What `/v1/completions` alone has.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct CompletionOwn {
    /// A text, tokens, or several of them.
    #[schema(value_type = TextsOrTokens)]
    pub prompt: Prompts,
    /// Whether the answer begins with the prompt.
    pub echo: Option<bool>,
    /// How many of the most probable tokens are told in each one's place, with each one's log-probability.
    #[schema(maximum = 20)]
    pub logprobs: Option<usize>,
    /// Not supported.
    pub suffix: Option<String>,
    /// Not supported beyond `n`.
    #[schema(minimum = 1)]
    pub best_of: Option<usize>,
}

/// The body of `/v1/completions`, for the document of the interface.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(super) struct CompletionRequest {
    #[serde(flatten)]
    own: CompletionOwn,
    #[serde(flatten)]
    options: Options,
}

/// The body of `/v1/embeddings`.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct EmbeddingRequest {
    /// A text, tokens, or several of them.
    #[schema(value_type = TextsOrTokens)]
    #[allow(dead_code)]
    pub input: Prompts,
}

/// The body of `/tokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct TokenizeRequest {
    /// The text.
    pub content: String,
    /// Whether what begins a text is put before it.
    pub add_special: Option<bool>,
    /// Whether names of control tokens are taken for those tokens.
    pub parse_special: Option<bool>,
    /// Whether the text of each token is told too.
    pub with_pieces: Option<bool>,
}

/// What `/tokenize` answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Tokenized {
    pub tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pieces: Option<Vec<String>>,
}

/// The body of `/detokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct DetokenizeRequest {
    pub tokens: Vec<Token>,
}

/// What `/detokenize` answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Detokenized {
    pub content: String,
}

/// A text or several.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Strings(pub Vec<String>);

/// A text or several, for the document of the interface.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(super) enum Texts {
    One(String),
    Several(Vec<String>),
}

/// A text, tokens, or several of them, for the document of the interface.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(super) enum TextsOrTokens {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<Token>),
    SeveralTokens(Vec<Vec<Token>>),
}

/// A prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<Token>),
}

/// One prompt or several.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prompts(pub Vec<Prompt>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Prompts(prompts) = deserializer.deserialize_any(PromptVisitor { tokens: false })?;
        let text = |prompt| match prompt {
            Prompt::Text(text) => text,
            Prompt::Tokens(_) => unreachable!("tokens were not allowed"),
        };
        Ok(Strings(prompts.into_iter().map(text).collect()))
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor { tokens: true })
    }
}

struct PromptVisitor {
    /// Whether numbers of tokens are taken.
    tokens: bool,
}

/// An element of an array of prompts.
enum Element {
    Text(String),
    Token(Token),
    Tokens(Vec<Token>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or tokens")
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_u64<E: serde::de::Error>(self, token: u64) -> Result<Element, E> {
                let id = Token::try_from(token);
                id.map(Element::Token)
                    .map_err(|_| E::invalid_value(Unexpected::Unsigned(token), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = items.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.tokens {
            true => "a string, an array of tokens, or an array of such",
            false => "a string or an array of strings",
        })
    }

    fn visit_str<E>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
        let mut prompts = Vec::new();
        let mut tokens = Vec::new();
        while let Some(element) = items.next_element()? {
            match element {
                Element::Text(text) => prompts.push(Prompt::Text(text)),
                Element::Token(token) if self.tokens => tokens.push(token),
                Element::Tokens(tokens) if self.tokens => prompts.push(Prompt::Tokens(tokens)),
                _ => return Err(A::Error::custom("a number where a string was expected")),
            }
        }
        match (prompts.is_empty(), tokens.is_empty()) {
            (_, true) => Ok(Prompts(prompts)),
            (true, false) => Ok(Prompts(vec![Prompt::Tokens(tokens)])),
            _ => Err(A::Error::custom("texts and tokens are mixed in one array")),
        }
    }
}

/// What an answer took.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
    pub mtad: Decoded,
}

/// What is known of a prompt's tokens.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct PromptDetails {
    /// Those that were evaluated for an earlier request.
    pub cached_tokens: usize,
}

/// How an answer was decoded.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Decoded {
    pub strategy: String,
    pub rounds: u64,
    pub drafted: u64,
    pub accepted: u64,
    /// Tokens for each pass of the target.
    pub block_efficiency: f64,
    pub tokens_per_second: Option<f64>,
    /// What it consumed, where there is a meter; of what ran at the same time, an equal share.
    pub joules: Option<f64>,
}

/// A token and how it came to be.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct OriginToken {
    pub id: Token,
    pub text: String,
    /// `draft`, `target`, or `forced` where no other token could follow.
    pub origin: &'static str,
    pub log_prob: Option<f64>,
    /// ln of the joint probability ratio, target to draft, of the accepted block that it came with.
    pub log_ratio: Option<f64>,
}

/// What a chunk tells of its tokens.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Origins {
    pub tokens: Vec<OriginToken>,
}

/// A token with its log-probability.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct TokenLogProb {
    pub token: String,
    pub logprob: f64,
    pub bytes: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    pub top_logprobs: Option<Vec<TokenLogProb>>,
}

/// Log-probabilities of a chat's answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ChatLogProbs {
    pub content: Vec<TokenLogProb>,
}

/// Log-probabilities of a completion.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct CompletionLogProbs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<f64>,
    pub top_logprobs: Vec<BTreeMap<String, f64>>,
    pub text_offset: Vec<usize>,
}

/// A call that the model makes.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ToolCall {
    /// Of a stream: which of the calls it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    pub id: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: FunctionCall,
}

/// What is called, and with what.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct FunctionCall {
    pub name: String,
    /// JSON, as text.
    pub arguments: String,
}

/// What the assistant said, or of a stream, what was added to it.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct Said {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// One of the answers.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ChatChoice {
    pub index: usize,
    /// The whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<Said>,
    /// Of a stream: what was added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Said>,
    pub logprobs: Option<ChatLogProbs>,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: Option<&'static str>,
}

/// One of the continuations.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogProbs>,
    /// `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

/// An answer, or a chunk of one.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Answer<C> {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtad: Option<Origins>,
}

/// What `/v1/models` answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelEntry>,
}

/// The pair that answers.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ModelEntry {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    pub mtad: PairEntry,
}

/// What is known of a pair.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct PairEntry {
    pub draft: Option<String>,
    /// Whether it was tuned to answer.
    pub chat: bool,
    /// The most tokens that a prompt and its answer may have together.
    pub context: usize,
    pub default_strategy: String,
    pub strategies: Vec<StrategyEntry>,
}

/// A strategy that requests may name.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct StrategyEntry {
    pub name: &'static str,
    pub summary: &'static str,
    pub needs_draft: bool,
    /// The settings that it heeds.
    pub knobs: Vec<&'static str>,
}

/// What `/health` answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    pub status: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_texts_or_tokens_or_several() {
        let read = |json: &str| serde_json::from_str::<Prompts>(json);
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(read(r#""a""#).unwrap().0, [text("a")]);
        assert_eq!(read(r#"["a", "b"]"#).unwrap().0, [text("a"), text("b")]);
        assert_eq!(read("[1, 2]").unwrap().0, [Prompt::Tokens(vec![1, 2])]);
        let both = [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])];
        assert_eq!(read("[[1], [2, 3]]").unwrap().0, both);
        assert_eq!(read("[]").unwrap().0, []);
        for wrong in
            ["1", "{}", "null", "[1.5]", "[-1]", "[4294967296]", r#"["a", 1]"#, "[[\"a\"]]"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let strings = |json: &str| serde_json::from_str::<Strings>(json);
        assert_eq!(strings(r#""a""#).unwrap().0, ["a"]);
        let error = strings("[1]").unwrap_err().to_string();
        assert!(error.contains("a string"), "{error}");
    }
}
