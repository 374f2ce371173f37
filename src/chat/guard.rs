//! Telling what a message says from what the template writes around it.
//!
//! What messages say is put between two marks while the template runs, and the marks are found again
//! in the text. Marks are noncharacters (U+FDD0 to U+FDEF, which Unicode keeps for such use) that
//! nothing in the conversation has. A template may look at a message or trim it, so the text without
//! marks is compared with the one that the template makes without them; where they differ, the marks
//! go inside the white space at both ends, and messages that even then make a difference are not
//! marked but have the names in them broken by a third mark. In the end only broken names are left:
//! a name of a control token that touches what a message says has a mark in it.

use std::ops::Range;

use aho_corasick::AhoCorasick;
use minijinja::value::{Value, ValueKind};

use super::template::{Inputs, Template};
use crate::error::{Error, Result};

/// So many texts are marked one by one where marking all of them changes what the template does:
/// each takes a rendering.
const MOST_ONE_BY_ONE: usize = 64;

/// Finds the names of control tokens.
#[derive(Debug)]
pub(super) struct Guard {
    names: Vec<Box<str>>,
    finder: Option<AhoCorasick>,
}

/// Three characters that a conversation does not have.
#[derive(Debug, Clone, Copy)]
struct Marks {
    open: char,
    close: char,
    broken: char,
}

/// What is done to a text that a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Marks at both ends.
    Whole,
    /// Marks inside the white space at both ends.
    Trimmed,
    /// A mark within each name.
    Broken,
}

impl Marks {
    /// Marks that neither the template nor the conversation has.
    fn unused(template: &Template, inputs: &Inputs) -> Result<Self> {
        let mut used = [false; 32];
        let mut see = |text: &str| {
            for c in text.chars().filter(|c| ('\u{fdd0}'..='\u{fdef}').contains(c)) {
                used[c as usize - 0xfdd0] = true;
            }
        };
        see(template.source());
        inputs.messages.iter().chain([&inputs.tools]).for_each(|value| visit(value, &mut see));
        inputs.variables.iter().for_each(|(_, value)| visit(value, &mut see));
        let mut free = (0..32u32).filter(|&i| !used[i as usize]);
        let mut next = || free.next().and_then(|i| char::from_u32(0xfdd0 + i));
        match (next(), next(), next()) {
            (Some(open), Some(close), Some(broken)) => Ok(Marks { open, close, broken }),
            _ => Err(Error::invalid(
                "the conversation has nearly all of the noncharacters U+FDD0 to U+FDEF, which have \
                 no place in text; leave them out",
            )),
        }
    }

    fn are(self, c: char) -> bool {
        [self.open, self.close, self.broken].contains(&c)
    }

    fn without(self, text: &str) -> String {
        text.replace(|c| self.are(c), "")
    }
}

/// Shows every text in a value.
fn visit(value: &Value, see: &mut impl FnMut(&str)) {
    match value.kind() {
        ValueKind::String => see(value.as_str().unwrap_or_default()),
        ValueKind::Seq => value.try_iter().into_iter().flatten().for_each(|item| visit(&item, see)),
        ValueKind::Map => {
            for key in value.try_iter().into_iter().flatten() {
                visit(&key, see);
                visit(&value.get_item(&key).unwrap_or_default(), see);
            }
        }
        _ => {}
    }
}

/// Keys of a message under which is what it says.
const SAID: [&str; 3] = ["content", "reasoning_content", "text"];

/// Makes another value of the same form. `said` is given what messages say, `other` the other texts.
/// Roles and types, which templates compare, stay.
fn map(
    value: &Value,
    key: &str,
    said: &mut dyn FnMut(&str) -> String,
    other: &mut dyn FnMut(&str) -> String,
) -> Value {
    match value.kind() {
        ValueKind::String if matches!(key, "role" | "type") => value.clone(),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            Value::from(if SAID.contains(&key) { said(text) } else { other(text) })
        }
        // Parts of a content are what is said, too.
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            items.map(|item| map(&item, key, said, other)).collect()
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            Value::from_pairs(keys.map(|key| {
                let name = key.as_str().unwrap_or_default().to_owned();
                let item = map(&value.get_item(&key).unwrap_or_default(), &name, said, other);
                (if key.as_str().is_some() { Value::from(other(&name)) } else { key }, item)
            }))
        }
        _ => value.clone(),
    }
}

impl Guard {
    /// For control tokens of these names.
    pub fn new<'n>(names: impl Iterator<Item = &'n str>) -> Self {
        let names: Vec<Box<str>> = names.map(Box::from).collect();
        // It fails only beyond all sizes that vocabularies are allowed.
        let finder = AhoCorasick::new(names.iter().map(|name| name.as_bytes())).ok();
        Guard { names, finder }
    }

    /// Renders a conversation. In the text the character that is returned stands within every name
    /// of a control token that is, even in part, not the template's.
    pub fn render(&self, template: &Template, inputs: &Inputs) -> Result<(String, char)> {
        let marks = Marks::unused(template, inputs)?;
        let plain = template.render(inputs)?;
        let mut count = 0;
        for message in &inputs.messages {
            map(message, "", &mut |_| (count += 1, String::new()).1, &mut |_| String::new());
        }
        let with = |ways: &[Way]| template.render(&self.marked(inputs, marks, ways));
        let same = |rendered: &Result<String>| {
            rendered.as_ref().is_ok_and(|text| marks.without(text) == plain)
        };
        for way in [Way::Whole, Way::Trimmed] {
            let rendered = with(&vec![way; count]);
            if same(&rendered) {
                return Ok((self.broken_at_marks(&rendered?, marks), marks.broken));
            }
        }
        let mut ways = vec![Way::Broken; count];
        for i in 0..count.min(MOST_ONE_BY_ONE) {
            for way in [Way::Whole, Way::Trimmed] {
                ways[i] = way;
                if same(&with(&ways)) {
                    break;
                }
                ways[i] = Way::Broken;
            }
        }
        // A template that looks for such a name in a message does not find it now.
        Ok((self.broken_at_marks(&with(&ways)?, marks), marks.broken))
    }

    /// The inputs with marks.
    fn marked(&self, inputs: &Inputs, marks: Marks, ways: &[Way]) -> Inputs {
        let mut at = 0;
        let mut said = |text: &str| {
            let way = ways.get(at).copied().unwrap_or(Way::Broken);
            at += 1;
            let inner = match way {
                Way::Whole => text,
                Way::Trimmed => text.trim(),
                Way::Broken => return self.broken(text, marks.broken, true),
            };
            let start = text.len() - text.trim_start().len();
            let start = if way == Way::Whole { 0 } else { start };
            let (before, after) = (&text[..start], &text[start + inner.len()..]);
            format!("{before}{}{inner}{}{after}", marks.open, marks.close)
        };
        let mut other = |text: &str| self.broken(text, marks.broken, false);
        let mut marked = inputs.clone();
        for message in &mut marked.messages {
            *message = map(message, "", &mut said, &mut other);
        }
        let all = |value: &Value| {
            let mut again = |text: &str| self.broken(text, marks.broken, false);
            map(value, "", &mut |text| self.broken(text, marks.broken, false), &mut again)
        };
        if marked.tools.kind() == ValueKind::Seq {
            marked.tools = all(&marked.tools);
        }
        for (_, value) in &mut marked.variables {
            *value = all(value);
        }
        marked
    }

    /// Where names are, each with those that overlap it.
    fn names_in<'t>(&'t self, text: &'t str) -> impl Iterator<Item = Range<usize>> + 't {
        let found = self.finder.iter().flat_map(move |finder| finder.find_overlapping_iter(text));
        found.map(|found| found.range())
    }

    /// The text with a mark in every name. `edges`: also where a name might come about together
    /// with what stands beside the text.
    fn broken(&self, text: &str, mark: char, edges: bool) -> String {
        let mut places: Vec<usize> =
            self.names_in(text).map(|name| name.start + first_len(&text[name.start..])).collect();
        if edges && !text.is_empty() {
            // A name may also hold the whole text, which then begins with the end of a part of it.
            let begins = |name: &str| {
                name.contains(text) || cuts(name).any(|at| text.starts_with(&name[at..]))
            };
            let ends = |name: &str| cuts(name).any(|at| text.ends_with(&name[..at]));
            places.extend(self.names.iter().any(|name| begins(name)).then_some(0));
            places.extend(self.names.iter().any(|name| ends(name)).then_some(text.len()));
        }
        with_marks(text, places, mark)
    }

    /// The rendered text with a mark in every name that touches what is between marks, and without
    /// those.
    fn broken_at_marks(&self, rendered: &str, marks: Marks) -> String {
        let mut text = String::with_capacity(rendered.len());
        let mut said: Vec<Range<usize>> = Vec::new();
        let mut start = None;
        for c in rendered.chars() {
            if c == marks.open {
                start = Some(text.len());
            } else if c == marks.close {
                said.extend(start.take().map(|start| start..text.len()));
            } else {
                text.push(c);
            }
        }
        let touches = |name: &Range<usize>| {
            let next = said.partition_point(|range| range.end <= name.start);
            said.get(next).is_some_and(|range| range.start < name.end)
        };
        let places = self
            .names_in(&text)
            .filter(touches)
            .map(|name| name.start + first_len(&text[name.start..]))
            .collect();
        with_marks(&text, places, marks.broken)
    }
}

/// Where a name can be cut in two.
fn cuts(name: &str) -> impl Iterator<Item = usize> {
    name.char_indices().map(|(at, _)| at).skip(1)
}

fn first_len(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

/// The text with marks at these places.
fn with_marks(text: &str, mut places: Vec<usize>, mark: char) -> String {
    places.sort_unstable();
    places.dedup();
    let mut out = String::with_capacity(text.len() + places.len() * mark.len_utf8());
    let mut done = 0;
    for place in places {
        out.push_str(&text[done..place]);
        out.push(mark);
        done = place;
    }
    out.push_str(&text[done..]);
    out
}
