//! The C ABI: the facade as opaque handles and plain functions.
//!
//! `include/mtad.h` is made from this module and says all that a user of it needs. Here is how it
//! is built:
//!
//! - [`status`]: codes, messages, and the guard at the border, which no panic crosses;
//! - [`types`]: structs that begin with their size;
//! - [`memory`]: what comes in as pointers and goes out into the caller's buffers;
//! - [`pair`], [`session`], [`generation`]: the functions, by handle.
//!
//! Handles are [`std::sync::Arc`]s in disguise. A generation owns the session it runs on, in the
//! Rust sense: the session's handle finds an empty place until it is given back, and says that it
//! is busy.

pub mod generation;
pub mod memory;
pub mod pair;
pub mod session;
pub mod status;
pub mod types;

/// What a handle points to is used by any thread, and threads share it.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<pair::mtad_pair>();
    shared::<session::mtad_session>();
    shared::<generation::mtad_generation>();
};
