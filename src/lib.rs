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
//! let mut session = pair.session(&SessionOptions::default())?;
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
//! Data flows one way: a file becomes a program, a program becomes weights on devices, a prompt becomes
//! tokens, rounds of a decoder turn tokens into more tokens, and those become text. [`life_of_a_token`] follows one
//! through the rooms.
//!
//! | module | what is there | may import |
//! |---|---|---|
//! | [`error`] | the one error type | nothing |
//! | [`lm`] | [`lm::Lm`]: what decoders see of a model, a committed line with a tree on it | `error` |
//! | `files` | files as the program writes them, every one: whole or not at all | `error` |
//! | `cached` | files that can be made again: where they are kept, and under what key | `error`, `files` |
//! | [`quant`] | block formats: the scalar truth that kernels are tested against | nothing |
//! | [`gguf`] | model files, in one part or several: checked metadata, tensors as borrowed views; writing | `error`, `files`, `quant` |
//! | [`convert`] | checkpoint folders (config, safetensors, tokenizer) as model files | `error`, `files`, `quant`, `gguf` |
//! | [`tokenizer`] | text to tokens and back, from a file's vocabulary | `error`, `gguf` |
//! | [`chat`] | conversations to tokens, by the model's template | `error`, `gguf`, `tokenizer` |
//! | [`graph`] | forward passes as values: operations over buffers and weights | `error`, `gguf` |
//! | [`models`] | families of models: metadata and tensors to a program, one file each | `error`, `gguf`, `graph` |
//! | [`exec`] | executors of programs: the CPU and GPUs | `error`, `cached`, `quant`, `gguf`, `graph`, `lm` |
//! | [`engine`] | models that run: sequences, and the passes that they share; memory, failover | `error`, `gguf`, `graph`, `models`, `exec`, `lm` |
//! | [`sampling`] | warping, distributions, draws, constraints | `error`, `lm` |
//! | [`decode`] | one algorithm per file, over [`lm::Lm`] alone | `error`, `lm`, `sampling` |
//! | `grammar` | JSON schemas, regular expressions and grammars, as constraints of a vocabulary's texts | `error`, `lm`, `sampling`, `tokenizer` |
//! | `energy` | joules from real meters, by phase | `error` |
//! | [`session`] | what a program embeds: [`Pair`], [`Session`], [`Generation`], [`Prefix`], and sessions in files | all of the above |
//! | `capi` | the same for C, and whatever speaks C: `include/mtad.h` | everything |
//! | `bench` | timing passes against the machine's limits | everything |
//! | `eval` | perplexity, tasks and their scores, strategies side by side | everything |
//! | `serve` | pairs over HTTP, for many at once | everything |
//! | `cli` | the command line, over the facade | everything |
//!
//! A test holds these rules. `unsafe` appears only in the CPU kernels, where shaders are compiled
//! without checks or were before, where Vulkan is asked for memory, in the memory map and at the border to C.
//!
//! GGUF headers are read by a bounded reader of our own (see [`gguf`]); the crate `gguf-rs`
//! cross-checks it in the tests.

#[doc = include_str!("../docs/life-of-a-token.md")]
pub mod life_of_a_token {}

#[cfg(feature = "cli")]
pub mod bench;
#[cfg(any(feature = "cli", feature = "gpu"))]
mod cached;
#[cfg(feature = "capi")]
pub mod capi;
pub mod chat;
#[cfg(feature = "cli")]
pub mod cli;
pub mod convert;
pub mod decode;
#[cfg(feature = "meters")]
pub mod energy;
pub mod engine;
pub mod error;
#[cfg(feature = "eval")]
pub mod eval;
pub mod exec;
#[cfg_attr(not(feature = "cli"), allow(dead_code))]
mod files;
pub mod gguf;
#[cfg(feature = "grammar")]
pub mod grammar;
pub mod graph;
pub mod lm;
pub mod models;
pub mod quant;
pub mod sampling;
#[cfg(feature = "serve")]
pub mod serve;
pub mod session;
pub mod tokenizer;

pub use decode::{Origin, Settings, Strategy};
pub use engine::SessionOptions;
pub use error::{Error, Result};
pub use sampling::Warp;
pub use session::{Generation, LoadOptions, Pair, Piece, Prefix, Request, Session, StopReason};
