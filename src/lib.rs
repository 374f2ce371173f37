//! Multi-token joint decoding on pairs of quantized GGUF models.

pub mod backend;
pub mod error;
pub mod gguf;
pub mod model;
pub mod quant;
pub mod tokenizer;

pub use error::{Error, Result};
