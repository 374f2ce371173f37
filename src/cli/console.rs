//! Standard output and standard error.
//!
//! Names, keys and messages come from files, and a model's text from its weights: a terminal would
//! obey the control characters in them. They are shown instead, as JSON writes them (`\u001b`), so
//! that a line of JSON stays one. What a model writes is changed only at a terminal.
//!
//! Diagnostics that standard error does not take are dropped: nobody is there to read them, and the
//! work that they are about goes on. (The macros of the standard library would panic.)

use std::borrow::Cow;
use std::fmt::{self, Display, Write as _};
use std::io::{self, IsTerminal, StdoutLock, Write};

use crate::error::{Error, Result};

/// What errors of standard output name.
pub(super) const STDOUT: &str = "standard output";

pub(super) fn stdout_error(source: io::Error) -> Error {
    Error::io(STDOUT, source)
}

/// Whether the error is that whoever read standard output has gone.
pub(super) fn reader_left(error: &Error) -> bool {
    matches!(error, Error::Io { path, source }
        if path == STDOUT && source.kind() == io::ErrorKind::BrokenPipe)
}

/// Text in which control characters are shown. Ends of lines and tabs stay.
pub(super) fn visible(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c.is_control() && !matches!(c, '\n' | '\t'))
}

/// The same for a name: it has no place for an end of line either.
pub(super) fn visible_name(text: &str) -> Cow<'_, str> {
    escaped(text, char::is_control)
}

fn escaped(text: &str, hidden: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match hidden(c) {
            // All control characters are below U+00A0. Writing to a string does not fail.
            true => drop(write!(out, "\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// Prints a line to standard output.
pub(super) fn print_line(line: impl Display) -> Result<()> {
    let line = format!("{line}\n");
    io::stdout().lock().write_all(visible(&line).as_bytes()).map_err(stdout_error)
}

/// Says a line on standard error, if that can be.
pub(super) fn say(line: fmt::Arguments<'_>) {
    let line = format!("{line}\n");
    let _ = io::stderr().lock().write_all(visible(&line).as_bytes());
}

/// Says a line on standard error, like `eprintln!`, and never panics.
macro_rules! tell {
    ($($what:tt)*) => { $crate::cli::console::say(format_args!($($what)*)) };
}
pub(super) use tell;

/// Standard output for what a model writes, piece by piece.
pub(super) struct Text {
    out: StdoutLock<'static>,
    raw: bool,
}

impl Text {
    /// `raw` lets control characters through to a terminal too.
    pub(super) fn new(raw: bool) -> Self {
        let out = io::stdout().lock();
        Text { raw: raw || !out.is_terminal(), out }
    }

    /// Shows a piece at once.
    pub(super) fn show(&mut self, text: &str) -> Result<()> {
        let text = if self.raw { Cow::Borrowed(text) } else { visible(text) };
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).map_err(stdout_error)
    }
}

impl Text {
    /// Writes a control sequence of the program's own.
    pub(super) fn control(&mut self, sequence: &str) -> Result<()> {
        self.out.write_all(sequence.as_bytes()).map_err(stdout_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_json_stays_json() {
        assert_eq!(visible("a\tb\nä\u{1F600}"), "a\tb\nä\u{1F600}");
        assert_eq!(
            visible("\x1b[2J\r\x07\x7f\u{9b}1m"),
            "\\u001b[2J\\u000d\\u0007\\u007f\\u009b1m"
        );
        assert_eq!(visible_name("a\nb\tc"), "a\\u000ab\\u0009c");
        let value = serde_json::json!({"k\u{9b}": "\x1b]0;x\x07\u{85}\x7f"});
        let line = visible(&value.to_string()).into_owned();
        assert!(!line.contains(char::is_control), "{line:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
    }
}
