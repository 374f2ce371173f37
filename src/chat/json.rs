//! JSON for templates: keys stay in their order, as in Python, and what is written is what
//! `json.dumps` writes.

use std::fmt::{self, Write};

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

/// A value with its keys in the order in which they were written.
pub(super) struct Ordered(pub Value);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader).map(Ordered)
    }
}

/// What `serde_json` calls the only key of a number, where a crate in the build has it keep numbers
/// as they are written.
const NUMBER: &str = "$serde_json::private::Number";

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::from(()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Ordered(value)) = items.next_element()? {
            values.push(value);
        }
        Ok(Value::from(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut pairs: Vec<(String, Value)> = Vec::new();
        while let Some((key, Ordered(value))) = entries.next_entry::<String, Ordered>()? {
            if key == NUMBER
                && let Some(number) = value.as_str()
            {
                return Ok(number_of(number));
            }
            pairs.push((key, value));
        }
        Ok(Value::from_pairs(pairs))
    }
}

fn number_of(text: &str) -> Value {
    match (text.parse::<i64>(), text.parse::<f64>()) {
        (Ok(whole), _) => Value::from(whole),
        (_, Ok(number)) => Value::from(number),
        _ => Value::from(text),
    }
}

/// How JSON is laid out.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Between elements and behind keys.
    pub separators: (String, String),
    /// Spaces for each level, on lines of their own.
    pub indent: Option<usize>,
    /// Whether keys are put in order.
    pub sort_keys: bool,
    /// Whether characters beyond ASCII are escaped.
    pub ascii: bool,
}

impl Layout {
    /// As `json.dumps(.., ensure_ascii=False)` does it.
    pub fn plain() -> Self {
        Layout {
            separators: (", ".to_owned(), ": ".to_owned()),
            indent: None,
            sort_keys: false,
            ascii: false,
        }
    }
}

/// Writes `value` as JSON.
///
/// # Errors
/// A value that JSON does not have.
pub(super) fn write(value: &Value, layout: &Layout) -> Result<String, Error> {
    let mut out = String::new();
    put(value, layout, 0, &mut out)?;
    Ok(out)
}

fn put(value: &Value, layout: &Layout, depth: usize, out: &mut String) -> Result<(), Error> {
    let no_json = |what: &str| {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{what} is not JSON serializable")))
    };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => put_string(value.as_str().unwrap_or_default(), layout.ascii, out),
        ValueKind::Seq => {
            let items: Vec<Value> = value.try_iter()?.collect();
            put_all(items.len(), ['[', ']'], layout, depth, out, |i, out| {
                put(&items[i], layout, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if layout.sort_keys {
                keys.sort();
            }
            put_all(keys.len(), ['{', '}'], layout, depth, out, |i, out| {
                put_string(&keys[i].to_string(), layout.ascii, out);
                out.push_str(&layout.separators.1);
                put(&value.get_item(&keys[i])?, layout, depth + 1, out)
            })?;
        }
        ValueKind::Undefined => return no_json("an undefined value"),
        other => return no_json(&format!("a value of type {other}")),
    }
    Ok(())
}

/// Writes `count` elements between brackets.
fn put_all(
    count: usize,
    brackets: [char; 2],
    layout: &Layout,
    depth: usize,
    out: &mut String,
    mut each: impl FnMut(usize, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = layout.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(brackets[0]);
    for i in 0..count {
        if i > 0 {
            // On lines of their own there is no space at the end of one.
            let separator = layout.separators.0.as_str();
            out.push_str(if layout.indent.is_some() { separator.trim_end() } else { separator });
        }
        line(depth + 1, out);
        each(i, out)?;
    }
    if count > 0 {
        line(depth, out);
    }
    out.push(brackets[1]);
    Ok(())
}

fn put_string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A number as Python writes it.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(x) if !value.is_integer() => {
            let size = x.abs();
            if x.is_nan() {
                "NaN".to_owned()
            } else if x.is_infinite() {
                if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
            } else if size != 0.0 && !(1e-4..1e16).contains(&size) {
                let text = format!("{x:e}");
                let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
                let sign = if power.starts_with('-') { '-' } else { '+' };
                format!("{digits}e{sign}{:0>2}", power.trim_start_matches('-'))
            } else {
                format!("{x:?}")
            }
        }
        _ => value.to_string(),
    }
}

/// A value as Python's `str` writes it.
pub(super) fn python_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => {
            let mut out = String::new();
            put_repr(value, &mut out);
            out
        }
    }
}

fn put_repr(value: &Value, out: &mut String) {
    let items = |value: &Value| value.try_iter().map(Vec::from_iter).unwrap_or_default();
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&match number(value).as_str() {
            "NaN" => "nan".to_owned(),
            "Infinity" => "inf".to_owned(),
            "-Infinity" => "-inf".to_owned(),
            number => number.to_owned(),
        }),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let items = items(value);
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                put_repr(item, out);
            }
            if value.is_tuple() && items.len() == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in items(value).iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                put_repr(key, out);
                out.push_str(": ");
                put_repr(&value.get_item(key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Value {
        serde_json::from_str::<Ordered>(text).unwrap().0
    }

    #[test]
    fn json_comes_back_as_python_writes_it() {
        let text =
            r#"{"z": [1, -2.5, 1e+20, 1e-07, 0.0001, true, null], "a": {"é\"\n": "x"}, "e": []}"#;
        assert_eq!(write(&read(text), &Layout::plain()).unwrap(), text);
        let indented = Layout { indent: Some(2), sort_keys: true, ..Layout::plain() };
        let lines = "{\n  \"a\": {\n    \"b\": 1\n  },\n  \"z\": [\n    1,\n    2\n  ]\n}";
        assert_eq!(write(&read(r#"{"z": [1,2], "a": {"b": 1}}"#), &indented).unwrap(), lines);
        let ascii = Layout { ascii: true, ..Layout::plain() };
        assert_eq!(write(&read("\"é🦙\""), &ascii).unwrap(), "\"\\u00e9\\ud83e\\udd99\"");
        assert!(write(&Value::UNDEFINED, &Layout::plain()).is_err());
    }

    #[test]
    fn values_print_as_in_python() {
        let value = read(r#"{"a": [true, null, 1.0, "it's"], "b": "q\"'"}"#);
        assert_eq!(python_str(&value), r#"{'a': [True, None, 1.0, "it's"], 'b': 'q"\''}"#);
        assert_eq!(python_str(&read("\"a\"")), "a");
        assert_eq!(python_str(&Value::UNDEFINED), "");
    }
}
