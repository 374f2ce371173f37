//! A chat template and what it makes of a conversation.
//!
//! Templates are written for Jinja in Python, as `transformers` runs it. `minijinja` runs them here,
//! with Python's methods of strings and mappings, Python's way to print values, and the functions
//! and filters that `transformers` adds. A template comes with a file and is not trusted: what it
//! may do is bounded.

use std::fmt;
use std::sync::Arc;

use chrono::NaiveDateTime;
use chrono::format::StrftimeItems;
use minijinja::filters;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior};

use super::json::{Layout, Ordered, python_str, write};
use crate::error::{Error, Result};

/// Work that a rendering may do: steps, and one for each 64 bytes that it makes. Real templates
/// with long conversations take a thousandth of it.
const FUEL: u64 = 20_000_000;

/// A compiled chat template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    source: String,
}

/// What a template is given.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The messages.
    pub(super) messages: Vec<Value>,
    /// The tools; none if there are none.
    pub(super) tools: Value,
    /// Whether the text ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// The name of the token that begins a text, or nothing.
    pub bos: String,
    /// The name of the token that ends a text, or nothing.
    pub eos: String,
    /// What time it is, for templates that say so.
    pub now: NaiveDateTime,
    /// Further variables of the template, such as `enable_thinking`.
    pub(super) variables: Vec<(String, Value)>,
}

impl Default for Inputs {
    fn default() -> Self {
        Inputs {
            messages: Vec::new(),
            tools: Value::from_object(Nothing),
            add_generation_prompt: true,
            bos: String::new(),
            eos: String::new(),
            now: chrono::Local::now().naive_local(),
            variables: Vec::new(),
        }
    }
}

fn value_of(text: &str, what: &str) -> Result<Value> {
    let value: Ordered =
        serde_json::from_str(text).map_err(|e| Error::invalid(format!("{what}: {e}")))?;
    Ok(value.0)
}

/// A mapping with another value for one of its keys, where it has that.
fn with_member(value: &Value, name: &str, change: impl Fn(Value) -> Value) -> Value {
    if value.kind() != ValueKind::Map
        || value.get_attr(name).is_ok_and(|member| member.is_undefined())
    {
        return value.clone();
    }
    let Ok(keys) = value.try_iter() else { return value.clone() };
    Value::from_pairs(keys.map(|key| {
        let member = value.get_item(&key).unwrap_or_default();
        let member = if key.as_str() == Some(name) { change(member) } else { member };
        (key, member)
    }))
}

/// The text of an array of parts that all are texts.
fn joined_parts(content: &Value) -> Option<Value> {
    if content.kind() != ValueKind::Seq {
        return None;
    }
    let parts = content.try_iter().ok()?.map(|part| {
        let is_text = part.get_attr("type").ok()?.as_str() == Some("text");
        Some(part.get_attr("text").ok().filter(|_| is_text)?.as_str()?.to_owned())
    });
    Some(Value::from(parts.collect::<Option<Vec<_>>>()?.join("\n")))
}

impl Inputs {
    /// Takes messages as OpenAI writes them: a JSON array of objects with `role` and `content`,
    /// or an object that has it as `messages`. `what` names the text in errors.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything else.
    pub fn set_messages(&mut self, json: &str, what: &str) -> Result<()> {
        let mut value = value_of(json, what)?;
        if value.kind() == ValueKind::Map {
            let tools = value.get_attr("tools").unwrap_or_default();
            if tools.kind() == ValueKind::Seq {
                self.tools = tools;
            }
            value = value.get_attr("messages").unwrap_or_default();
        }
        if value.kind() != ValueKind::Seq {
            return Err(Error::invalid(format!("{what}: an array of messages is needed")));
        }
        let messages: Vec<Value> = value.try_iter().map(Vec::from_iter).unwrap_or_default();
        for (i, message) in messages.iter().enumerate() {
            let role = message.get_attr("role").unwrap_or_default();
            if message.kind() != ValueKind::Map || role.as_str().is_none() {
                return Err(Error::invalid(format!(
                    "{what}: message {i} is no object with a `role`"
                )));
            }
        }
        self.messages = messages;
        Ok(())
    }

    /// Writes messages as templates expect them where OpenAI's clients have another form: the parts of a text as one
    /// text, a line for each, and the arguments of calls as an object instead of JSON in a text. What has neither
    /// form stays as it is.
    pub fn simplify(&mut self) {
        for message in &mut self.messages {
            *message = with_member(message, "content", |content| {
                joined_parts(&content).unwrap_or(content)
            });
            *message = with_member(message, "tool_calls", |calls| {
                let arguments = |arguments: Value| {
                    let read = arguments.as_str().and_then(|text| value_of(text, "arguments").ok());
                    read.filter(|read| read.kind() == ValueKind::Map).unwrap_or(arguments)
                };
                let call = |call: Value| {
                    with_member(&call, "function", |f| with_member(&f, "arguments", arguments))
                };
                match calls.kind() {
                    ValueKind::Seq => {
                        calls.try_iter().map(|calls| calls.map(call).collect()).unwrap_or(calls)
                    }
                    _ => calls,
                }
            });
        }
    }

    /// Takes tools as OpenAI writes them: a JSON array of objects.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything else.
    pub fn set_tools(&mut self, json: &str, what: &str) -> Result<()> {
        let tools = value_of(json, what)?;
        if tools.kind() != ValueKind::Seq {
            return Err(Error::invalid(format!("{what}: an array of tools is needed")));
        }
        self.tools = tools;
        Ok(())
    }

    /// Sets a further variable of the template, from JSON.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is not JSON.
    pub fn set_variable(&mut self, name: &str, json: &str) -> Result<()> {
        let value = value_of(json, name)?;
        self.variables.push((name.to_owned(), value));
        Ok(())
    }

    /// The messages as a JSON array.
    pub fn messages_json(&self) -> String {
        // They came from JSON, or are texts.
        write(&Value::from(self.messages.clone()), &Layout::plain()).unwrap_or_default()
    }

    /// How many messages there are.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there is no message.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Forgets all but the first messages.
    pub fn truncate(&mut self, len: usize) {
        self.messages.truncate(len);
    }

    /// Adds a message of text alone.
    pub fn push(&mut self, role: &str, content: &str) {
        self.messages.push(Value::from_pairs([("role", role), ("content", content)]));
    }
}

/// What a template says when it refuses a conversation (`raise_exception`).
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// Python's `None`, which the engine would iterate over. That there are no tools is said with it, and
/// templates that need some are to fail.
#[derive(Debug)]
struct Nothing;

impl Object for Nothing {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn is_true(self: &Arc<Self>) -> bool {
        false
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("None")
    }
}

/// The test `none`.
fn is_none(value: &Value) -> bool {
    value.is_none() || value.downcast_object_ref::<Nothing>().is_some()
}

/// A filter that in Python is a generator: it can be iterated over, and that is all.
macro_rules! generator {
    ($filter:path) => {
        |state: &mut State<'_, '_>, value: Value, arguments: Rest<_>| -> Outcome<Value> {
            let values: Vec<Value> = $filter(state, value, arguments)?;
            Ok(Value::make_iterable(move || values.clone().into_iter()))
        }
    };
}

type Outcome<T> = std::result::Result<T, minijinja::Error>;

fn invalid(what: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, what.into())
}

/// `raise_exception(message)`.
fn raise_exception(message: String) -> Outcome<Value> {
    Err(invalid(message.clone()).with_source(Refusal(message)))
}

/// `strftime_now(format)`.
fn strftime_now(state: &State<'_, '_>, format: &str) -> Outcome<String> {
    let now = state.lookup(NOW).and_then(|now| now.as_str()?.parse::<NaiveDateTime>().ok());
    let now = now.ok_or_else(|| invalid("the time is not known"))?;
    let items = StrftimeItems::new(format)
        .parse()
        .map_err(|_| invalid(format!("strftime_now: {format:?} is no format")))?;
    Ok(now.format_with_items(items.iter()).to_string())
}

/// The variable that holds the time.
const NOW: &str = "mtad now";

/// `tojson`, which here escapes nothing for HTML.
fn to_json(value: Value, options: Kwargs) -> Outcome<Value> {
    let mut layout = Layout::plain();
    layout.indent = options.get::<Option<usize>>("indent")?;
    layout.sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    layout.ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    if let Some(separators) = options.get::<Option<Vec<String>>>("separators")? {
        let [items, keys] = <[String; 2]>::try_from(separators)
            .map_err(|_| invalid("tojson: separators are two strings"))?;
        layout.separators = (items, keys);
    }
    options.assert_all_used()?;
    let value = if is_none(&value) { Value::from(()) } else { value };
    Ok(Value::from(write(&value, &layout)?))
}

/// `from_json`.
fn from_json(text: &str) -> Outcome<Value> {
    let value: Ordered =
        serde_json::from_str(text).map_err(|e| invalid(format!("from_json: {e}")))?;
    Ok(value.0)
}

impl Template {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line where it is not one.
    pub fn new(source: impl Into<String>) -> Result<Self> {
        let source = source.into();
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Template(explain(&e)))?);
        environment.set_fuel(Some(FUEL));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| {
            out.write_str(&python_str(value)).map_err(|_| ErrorKind::WriteFailure.into())
        });
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_filter("from_json", from_json);
        environment.add_filter("map", generator!(filters::map));
        environment.add_test("none", is_none);
        environment.add_filter("string", |value: &Value| python_str(value));
        environment.add_template_owned("template", without_generation_tags(&source)).map_err(
            |e| Error::Template(format!("the chat template is damaged: {}", explain(&e))),
        )?;
        Ok(Template { environment, source })
    }

    /// As it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text that it makes.
    ///
    /// # Errors
    /// [`Error::Template`] in the template's own words if it refuses the conversation, or with
    /// what failed in it.
    pub fn render(&self, inputs: &Inputs) -> Result<String> {
        let template = self.environment.get_template("template");
        let template = template.map_err(|e| Error::Template(explain(&e)))?;
        let mut variables = vec![
            ("messages".to_owned(), Value::from(inputs.messages.clone())),
            ("tools".to_owned(), inputs.tools.clone()),
            ("add_generation_prompt".to_owned(), Value::from(inputs.add_generation_prompt)),
            ("bos_token".to_owned(), Value::from(inputs.bos.as_str())),
            ("eos_token".to_owned(), Value::from(inputs.eos.as_str())),
            (NOW.to_owned(), Value::from(inputs.now.format("%Y-%m-%dT%H:%M:%S").to_string())),
        ];
        variables.extend(inputs.variables.iter().cloned());
        template.render(Value::from_pairs(variables)).map_err(|error| {
            let mut source: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = source {
                if let Some(Refusal(message)) = error.downcast_ref() {
                    return Error::Template(format!("the chat template refuses: {message}"));
                }
                source = error.source();
            }
            Error::Template(format!("the chat template fails: {}", explain(&error)))
        })
    }
}

/// The template without the tags by which `transformers` finds the assistant's part in training.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let end = start + len;
        let tag = &rest[start + 2..end];
        out.push_str(&rest[..start + 2]);
        // With the same white space control.
        match tag.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+')) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// An error of the engine with its line.
fn explain(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}
