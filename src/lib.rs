//! Multi-token joint decoding on pairs of quantized GGUF models.
//!
//! A *pair* is a large target model and a small draft model with one vocabulary. The draft
//! proposes tokens by their joint likelihood, the target scores all of them in one pass, and the
//! longest prefix whose joint likelihood ratio clears a threshold is accepted (MTAD; Qin et al.,
//! ICLR 2025, arXiv 2407.09722).
//!
//! ```
//! # #[cfg(feature = "builtin-pair")] {
//! use mtad::{LoadOptions, Pair, Request, SessionOptions};
//!
//! let pair = Pair::builtin(true, &LoadOptions::default(), &mut |_, _| true)?;
//! let mut session = pair.session(&SessionOptions::default());
//! let request = Request { max_tokens: Some(20), ..Request::default() };
//! for piece in session.generate("Once upon a time", &request)? {
//!     print!("{}", piece?.text);
//! }
//! # }
//! # Ok::<(), mtad::Error>(())
//! ```
//!
//! # The map of the house
//!
//! Data flows one way: a file becomes weights on a backend, a prompt becomes tokens, rounds of a
//! decoder turn tokens into more tokens, and those become text.
//!
//! | module | what is there | may import |
//! |---|---|---|
//! | [`error`] | the one error type | nothing |
//! | `cached` | files that can be made again: where they are kept | nothing |
//! | [`quant`] | block formats: the scalar truth that kernels are tested against | nothing |
//! | [`gguf`] | model files, in one part or several: checked metadata, tensors as borrowed views; writing | `error`, `quant` |
//! | [`convert`] | checkpoint folders (config, safetensors, tokenizer) as model files | `error`, `quant`, `gguf` |
//! | [`tokenizer`] | text to tokens and back, from a file's vocabulary | `error`, `gguf` |
//! | [`chat`] | conversations to tokens, by the model's template | `error`, `gguf`, `tokenizer` |
//! | [`backend`] | the verbs of a forward pass, and the devices that do them | `error`, `cached`, `quant`, `gguf` |
//! | [`model`] | [`model::lm::Lm`]: a committed line with a tree on it; architectures (Llama's family, OPT) over a backend | `error`, `gguf`, `quant`, `backend` |
//! | [`sampling`] | warping, distributions, draws | `error`, `model::lm` |
//! | [`decode`] | one algorithm per file, over [`model::lm::Lm`] alone | `error`, `model::lm`, `sampling` |
//! | [`energy`] | joules from real meters, by phase | `error` |
//! | the facade | [`Pair`], [`Session`], [`Generation`] | all of the above |
//! | `saved` | sessions in files | all of the above |
//! | [`capi`] | the same for C, and whatever speaks C: `include/mtad.h` | everything |
//! | [`bench`](mod@bench) | timing passes against the machine's limits | everything |
//! | [`eval`] | perplexity, tasks and their scores, strategies side by side | everything |
//! | `cli` | the command line, over the facade | everything |
//!
//! A test holds these rules. `unsafe` appears only in the CPU kernels, where shaders are compiled
//! without checks or were before, where Vulkan is asked for memory, in the memory map and at the border to C.
//!
//! GGUF headers are read by a bounded reader of our own (see [`gguf`]); the crate `gguf-rs`
//! cross-checks it in the tests.

pub mod backend;
pub mod bench;
mod cached;
pub mod capi;
pub mod chat;
pub mod cli;
pub mod convert;
pub mod decode;
pub mod energy;
pub mod error;
pub mod eval;
pub mod generation;
pub mod gguf;
pub mod model;
pub mod pair;
pub mod quant;
pub mod sampling;
mod saved;
pub mod tokenizer;

pub use decode::{Settings, Strategy};
pub use error::{Error, Result};
pub use generation::{Generation, Piece, Request, Session, StopReason};
pub use model::SessionOptions;
pub use pair::{LoadOptions, Pair};
pub use sampling::Warp;
