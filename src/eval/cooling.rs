//! Plain sampling at the temperature that gives a wanted perplexity.
//!
//! A strategy that lowers perplexity is worth something only if it does better than cooling the
//! target does; so it is compared with the cooled target, at equal perplexity.

use super::{Arm, Observer, Runner, Task, summarize};
use crate::decode::{Settings, Strategy};
use crate::error::Result;

/// Temperatures are tried in steps of this, so that a resumed search asks for the same ones.
const STEP: f32 = 1.0 / 32.0;

/// Finds, by bisection between greedy decoding and the temperature of `like`, the arm of plain
/// sampling whose perplexity is nearest to `wanted`. `None` if it was stopped.
///
/// # Errors
/// As [`Runner::run`].
pub fn cool(
    runner: &mut Runner<'_>,
    like: &Settings,
    wanted: f64,
    observer: &mut dyn Observer,
) -> Result<Option<Arm>> {
    let arm = |steps: u32| {
        let mut settings = Settings { strategy: Strategy::Sample, ..like.clone() };
        settings.warp.temperature = steps as f32 * STEP;
        Arm::new(settings)
    };
    // Perplexity is that of open tasks, where there are some; the others come when it is found.
    let has_open = runner.tasks().iter().any(|task| task.answer.is_none());
    let (mut low, mut high) = (1, (like.warp.temperature / STEP).round().max(2.0) as u32);
    let mut nearest: Option<(f64, Arm)> = None;
    // More heat, more perplexity.
    while low <= high {
        let middle = (low + high) / 2;
        let arm = arm(middle);
        let open = |task: &Task| !has_open || task.answer.is_none();
        if !runner.run_on(&open, std::slice::from_ref(&arm), observer)? {
            return Ok(None);
        }
        let found = summarize(&arm, runner.tasks(), runner.outcomes()).perplexity;
        let Some(found) = found else { return Ok(None) };
        let off = (found.value / wanted).ln().abs();
        if nearest.as_ref().is_none_or(|(least, _)| off < *least) {
            nearest = Some((off, arm));
        }
        if found.value > wanted {
            high = middle - 1;
        } else {
            low = middle + 1;
        }
    }
    let Some((_, arm)) = nearest else { return Ok(None) };
    Ok(runner.run(std::slice::from_ref(&arm), observer)?.then_some(arm))
}
