//! Multi-token joint decoding on pairs of quantized GGUF models.

pub mod decode;
pub mod error;
pub mod gguf;
pub mod model;
pub mod quant;
pub mod sampling;

pub use error::{Error, Result};
