//! Calls of functions in what a model writes, for the templates whose way of writing them is known.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::api::FunctionCall;

/// How a family of models writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, as often as there are calls: Hermes, Qwen.
    Tagged,
    /// `[TOOL_CALLS] [{"name": .., "arguments": {..}}]`, or `[TOOL_CALLS]name[ARGS]{..}`: Mistral.
    Listed,
    /// `{"name": .., "parameters": {..}}` and nothing else: Llama 3.
    Bare,
}

const TAG: &str = "<tool_call>";
const END_TAG: &str = "</tool_call>";
const LIST: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";
const PYTHON: &str = "<|python_tag|>";

impl Style {
    /// The style that a chat template asks its model for; `None` where it is not known, or there are no tools.
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains(TAG) {
            Some(Style::Tagged)
        } else if source.contains(LIST) {
            Some(Style::Listed)
        } else if source.contains("tools") && source.contains("<|start_header_id|>") {
            Some(Style::Bare)
        } else {
            None
        }
    }

    /// Names of control tokens that mean something in it: decoding would leave them out.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Style::Tagged => &[TAG, END_TAG],
            Style::Listed => &[LIST, ARGS],
            Style::Bare => &[PYTHON],
        }
    }

    /// Where calls begin in a text, or might begin with what comes next.
    fn begin(self, text: &str) -> Option<usize> {
        let marker = match self {
            Style::Tagged => TAG,
            Style::Listed => LIST,
            Style::Bare => {
                let rest = text.trim_start();
                let is_call = rest.starts_with('{')
                    || PYTHON.starts_with(&rest[..rest.len().min(PYTHON.len())]);
                let is_call = is_call || rest.starts_with(PYTHON);
                return is_call.then_some(0);
            }
        };
        let whole = text.find(marker);
        let part = || {
            let starts = |(at, _): &(usize, char)| marker.starts_with(&text[*at..]);
            text.char_indices().find(starts).map(|(at, _)| at)
        };
        whole.or_else(part)
    }

    /// The calls of a text that begins with them; `None` if it has no such form.
    fn calls(self, text: &str) -> Option<Vec<FunctionCall>> {
        let mut calls = Vec::new();
        match self {
            Style::Tagged => {
                let mut rest = text.trim();
                while !rest.is_empty() {
                    let (call, after) =
                        rest.strip_prefix(TAG)?.split_once(END_TAG).or_else(|| {
                            // The end of the text ends the last call, too.
                            Some((rest.strip_prefix(TAG)?, ""))
                        })?;
                    calls.push(call_of(call)?);
                    rest = after.trim_start();
                }
            }
            Style::Listed => {
                for part in text.trim().split(LIST).skip(1) {
                    match part.split_once(ARGS) {
                        Some((name, arguments)) => {
                            let arguments: &RawValue =
                                serde_json::from_str(arguments.trim()).ok()?;
                            let (name, arguments) =
                                (name.trim().to_owned(), arguments.get().to_owned());
                            calls.push(FunctionCall { name, arguments });
                        }
                        None => {
                            let listed: Vec<Call> = serde_json::from_str(part.trim()).ok()?;
                            for call in listed {
                                calls.push(call.into_function()?);
                            }
                        }
                    }
                }
            }
            Style::Bare => {
                let text = text.trim();
                let text = text.strip_prefix(PYTHON).unwrap_or(text);
                let read = serde_json::Deserializer::from_str(text.trim_end_matches(';'));
                let mut read = read.into_iter::<Call>();
                for call in read.by_ref() {
                    calls.push(call.ok()?.into_function()?);
                }
            }
        }
        (!calls.is_empty()).then_some(calls)
    }
}

#[derive(Deserialize)]
struct Call {
    name: String,
    #[serde(alias = "parameters")]
    arguments: Option<Box<RawValue>>,
}

impl Call {
    fn into_function(self) -> Option<FunctionCall> {
        let arguments = self.arguments.map_or("{}".to_owned(), |json| json.get().to_owned());
        arguments.starts_with('{').then_some(FunctionCall { name: self.name, arguments })
    }
}

fn call_of(json: &str) -> Option<FunctionCall> {
    serde_json::from_str::<Call>(json.trim()).ok()?.into_function()
}

/// Tells calls from what else a model writes.
pub(super) struct Reader {
    style: Option<Style>,
    /// What may be calls.
    held: String,
    has_begun: bool,
}

impl Reader {
    /// For answers in this style; without one all of an answer is text.
    pub fn new(style: Option<Style>) -> Self {
        Reader { style, held: String::new(), has_begun: false }
    }

    /// Takes more of the answer and gives what is text for sure.
    pub fn push(&mut self, text: &str) -> String {
        let Some(style) = self.style else { return text.to_owned() };
        self.held.push_str(text);
        // A model that writes nothing but calls writes text from its first character, or never.
        if style == Style::Bare && self.has_begun {
            return std::mem::take(&mut self.held);
        }
        let safe = style.begin(&self.held).unwrap_or(self.held.len());
        let text: String = self.held.drain(..safe).collect();
        self.has_begun |= !text.trim().is_empty();
        text
    }

    /// The end: what of the rest is text, and the calls.
    pub fn finish(&mut self) -> (String, Vec<FunctionCall>) {
        let rest = std::mem::take(&mut self.held);
        match self.style.and_then(|style| style.calls(&rest)) {
            Some(calls) => (String::new(), calls),
            None => (rest, Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(style: Style, text: &str) -> (String, Vec<(String, String)>) {
        let mut whole = None;
        // However it is cut, it is read the same.
        for size in [1, 2, 5, 1000] {
            let mut reader = Reader::new(Some(style));
            let mut content = String::new();
            let chars: Vec<char> = text.chars().collect();
            for part in chars.chunks(size) {
                content += &reader.push(&part.iter().collect::<String>());
            }
            let (rest, calls) = reader.finish();
            let calls: Vec<_> = calls.into_iter().map(|c| (c.name, c.arguments)).collect();
            let found = (content + &rest, calls);
            assert_eq!(whole.get_or_insert_with(|| found.clone()), &found, "in parts of {size}");
        }
        whole.unwrap()
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn calls_are_found_in_each_style() {
        let tagged = "I look it up.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                      <tool_call>{\"name\":\"b\",\"arguments\":{}}</tool_call>";
        let two = vec![call("a", "{\"x\": 1}"), call("b", "{}")];
        assert_eq!(read(Style::Tagged, tagged), ("I look it up.\n".to_owned(), two));
        let cut = "<tool_call>{\"name\":\"b\",\"arguments\":{\"y\":[]}}";
        assert_eq!(read(Style::Tagged, cut).1, [call("b", "{\"y\":[]}")]);
        let listed = "[TOOL_CALLS] [{\"name\": \"a\", \"arguments\": {}}, {\"name\": \"b\", \"arguments\": {\"z\": 2}}]";
        assert_eq!(read(Style::Listed, listed).1, [call("a", "{}"), call("b", "{\"z\": 2}")]);
        let args = "[TOOL_CALLS]a[ARGS]{\"x\": 1}[TOOL_CALLS]b[ARGS]{}";
        assert_eq!(read(Style::Listed, args).1, [call("a", "{\"x\": 1}"), call("b", "{}")]);
        let bare = "{\"name\": \"a\", \"parameters\": {\"x\": \"y\"}}";
        assert_eq!(read(Style::Bare, bare).1, [call("a", "{\"x\": \"y\"}")]);
        assert_eq!(read(Style::Bare, &format!("<|python_tag|>{bare}")).1.len(), 1);
    }

    #[test]
    fn what_is_no_call_is_text() {
        for (style, text) in [
            (Style::Tagged, "a < b and <tool_box>"),
            (Style::Tagged, "<tool_call>not json</tool_call>"),
            (Style::Tagged, "ends with <tool_"),
            (Style::Listed, "[TOOL_CALLS] nothing"),
            (Style::Bare, "{\"a\": 1}"),
            (Style::Bare, "Sure: {\"name\": \"a\", \"parameters\": {}}"),
            (Style::Bare, "<|pyth"),
            (Style::Bare, ""),
            (Style::Bare, "{\"name\": \"a\", \"parameters\": 3}"),
        ] {
            assert_eq!(read(style, text), (text.to_owned(), vec![]), "{style:?}");
        }
    }
}
