//! Models: what decoders see ([`lm`]), and the architectures behind it.

pub mod lm;
pub mod table;
pub mod tree;
