//! Which operations run where: a split is a cut in a program's list of operations.

use std::ops::Range;
use std::sync::Arc;

use super::Executor;
use crate::error::{Error, Result};
use crate::graph::Program;

/// Which layers run on which executor, in order: each with the number of its layers. What comes before the first
/// layer runs with it, what comes after the last with that.
pub type Placement = Vec<(Arc<dyn Executor>, usize)>;

/// The ranges of operations that each executor runs.
///
/// # Errors
/// [`Error::Invalid`] if the numbers of layers do not add up to the program's.
pub fn cut(program: &Program, layers: &[usize]) -> Result<Vec<Range<usize>>> {
    let all = program.layers.len();
    let sum: usize = layers.iter().sum();
    if sum != all || layers.contains(&0) || layers.is_empty() {
        return Err(Error::invalid(format!("layers {layers:?} are placed of a model with {all}")));
    }
    let mut ranges = Vec::new();
    let (mut first, mut layer) = (0, 0);
    for count in layers {
        layer += count;
        let end = program.layer_starts.get(layer).copied().unwrap_or(program.ops.len());
        ranges.push(first..end);
        first = end;
    }
    Ok(ranges)
}
