//! Judging text: perplexity of a model, and strategies side by side on tasks.
//!
//! A [`Task`] is a prompt, perhaps with a right answer; an [`Arm`] is a strategy with its settings.
//! A [`Runner`] lets all arms take turns on all tasks, so that a slow minute of the machine slows
//! all of them, and takes each [`Outcome`] down in a journal, from which an interrupted evaluation
//! goes on. [`summarize`] turns outcomes into rows of the table that the MTAD paper prints (Qin et
//! al., arXiv 2407.09722), and [`report`] writes those.

mod arms;
mod cooling;
mod journal;
mod outcome;
pub mod perplexity;
#[cfg(feature = "spider")]
mod queries;
pub mod report;
mod runner;
#[cfg(feature = "spider")]
mod spider;
mod summary;
mod tasks;

pub use arms::{Arm, Grid};
pub use cooling::cool;
pub use journal::Journal;
pub use outcome::Outcome;
#[cfg(feature = "spider")]
pub use queries::run_queries_with;
#[cfg(feature = "spider")]
pub(crate) use queries::{COMMAND as ANSWER_QUERIES, answer_queries};
pub use runner::{Observer, Runner, fingerprint};
pub use summary::{Estimate, Summary, summarize};
pub use tasks::{Answer, Task, TaskSet};
