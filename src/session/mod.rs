//! What a program embeds: pairs, their sessions, and the texts that these generate.
//!
//! - [`pair`]: two models that speak the same tokens; [`generation`]: a session, and a text as it is written;
//! - `file`: the only serialised form of a session.

mod file;
pub mod generation;
pub mod pair;

pub use crate::decode::Origin;
pub use generation::{Generation, Piece, Request, Session, StopReason};
pub use pair::{LoadOptions, Pair};
