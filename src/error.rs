//! The one error type of the library, and its `Result`.
//!
//! A message says what was found, where, and what would do; `main` prints it as it stands.

use std::any::Any;
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
    /// Weights that are quantized already would be rounded again, and nobody allowed that.
    #[error(
        "{file}: tensor `{tensor}` is {found}, quantized already; begin with an F16 or F32 file, or allow that one rounding is added to the other"
    )]
    Quantized {
        /// The file.
        file: String,
        /// The first tensor of that kind.
        tensor: String,
        /// The type that it has.
        found: String,
    },
    /// Draft and target do not speak the same tokens.
    #[error(
        "the draft's vocabulary is not the target's: {0}; use a draft trained with the target's tokenizer"
    )]
    Vocabulary(String),
    /// A grammar does not parse, is too complex, or leaves a text nothing to go on with.
    #[error("{0}")]
    Grammar(String),
    /// A chat template is damaged, fails, or refuses a conversation.
    #[error("{0}")]
    Template(String),
    /// More rows were asked for than the context holds.
    #[error(
        "the context is full: {wanted} rows wanted, {capacity} allowed; a larger context or a shorter prompt would do"
    )]
    ContextFull {
        /// Rows that would have been needed.
        wanted: usize,
        /// Rows that the session may hold.
        capacity: usize,
    },
    /// There is not as much memory.
    #[error("not enough memory: {bytes} bytes are needed for {what}")]
    Memory {
        /// What it is for.
        what: String,
        /// How many bytes.
        bytes: u64,
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
    /// A model's logits are no numbers to make probabilities of.
    #[error(
        "{model}: its logits are not finite numbers (NaN or infinite): a weight of it is damaged, or too large for the arithmetic that runs it"
    )]
    NotFinite {
        /// The model's file; of decoders that run on models without one, `the target` or
        /// `the draft`.
        model: String,
    },
    /// A callback asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

/// What [`Error::NotFinite`] calls models by before their files are known.
pub(crate) const TARGET: &str = "the target";
/// As [`TARGET`].
pub(crate) const DRAFT: &str = "the draft";

/// `std::result::Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a panic said.
pub(crate) fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without words")
}

impl Error {
    /// The same error for somebody else who waited for what failed.
    pub(crate) fn for_another(&self) -> Self {
        match self {
            Error::DeviceLost { device, reason } => {
                Error::DeviceLost { device: device.clone(), reason: reason.clone() }
            }
            Error::Device { device, what } => {
                Error::Device { device: device.clone(), what: what.clone() }
            }
            Error::Memory { what, bytes } => Error::no_memory(what, *bytes),
            other => Error::Invalid(other.to_string()),
        }
    }

    /// An [`Error::Memory`].
    pub(crate) fn no_memory(what: impl Into<String>, bytes: u64) -> Self {
        Error::Memory { what: what.into(), bytes }
    }

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

    /// The same error as the draft's, if it is one of logits.
    pub(crate) fn of_draft(self) -> Self {
        match self {
            Error::NotFinite { .. } => Error::NotFinite { model: DRAFT.to_owned() },
            error => error,
        }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(what: impl Into<String>) -> Self {
        Error::Invalid(what.into())
    }
}
