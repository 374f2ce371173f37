//! What a program embeds: pairs, their sessions, and the texts that these generate.
//!
//! - [`pair`]: two models that speak the same tokens; [`generation`]: a session, and a text as it is written;
//! - [`prefix`]: what sessions of a pair evaluate once and share;
//! - `file`: the only serialised form of a session.

mod file;
pub mod generation;
pub mod pair;
pub mod prefix;

pub use crate::decode::Origin;
pub use generation::{Generation, Piece, Request, Session, StopReason};
pub use pair::{LoadOptions, Pair};
pub use prefix::Prefix;
