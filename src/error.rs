//! The one error type of the library, and its `Result`.
//!
//! A message says what was found, where, and what would do; `main` prints it as it stands.

use std::io;

/// Everything that can go wrong in the library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write.
    #[error("{path}: {source}")]
    Io {
        /// The file, or what stands for it (`standard input`).
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what it claims to be: cut short, damaged, inconsistent.
    #[error("{file}: {what}")]
    Format {
        /// The file.
        file: String,
        /// What was found, where, and what was expected.
        what: String,
    },
    /// A sound file that asks for something this version does not do.
    #[error("{file}: {what}")]
    Unsupported {
        /// The file.
        file: String,
        /// What it asks for, and what would do.
        what: String,
    },
    /// An argument outside its range, or arguments that contradict each other.
    #[error("{0}")]
    Invalid(String),
    /// Draft and target do not speak the same tokens.
    #[error(
        "the draft's vocabulary is not the target's: {0}; use a draft trained with the target's tokenizer"
    )]
    Vocabulary(String),
    /// A chat template is damaged, fails, or refuses a conversation.
    #[error("{0}")]
    Template(String),
    /// More rows were asked for than the context holds.
    #[error(
        "the context is full: {wanted} rows wanted, {capacity} allowed; raise --ctx-size or shorten the prompt"
    )]
    ContextFull {
        /// Rows that would have been needed.
        wanted: usize,
        /// Rows that the session may hold.
        capacity: usize,
    },
    /// The device went away in the middle of work. The tokens so far are still valid.
    #[error("device {device} was lost: {reason}")]
    DeviceLost {
        /// The device's name.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// A device refused to do something, and is still there.
    #[error("device {device}: {what}")]
    Device {
        /// The device's name.
        device: String,
        /// What it was, in the driver's words.
        what: String,
    },
    /// A callback asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

/// `std::result::Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<String>, source: io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    /// An [`Error::Format`] for `file`.
    pub fn format(file: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Format { file: file.into(), what: what.into() }
    }

    /// An [`Error::Unsupported`] for `file`.
    pub fn unsupported(file: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Unsupported { file: file.into(), what: what.into() }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(what: impl Into<String>) -> Self {
        Error::Invalid(what.into())
    }
}
