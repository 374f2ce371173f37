//! What passes cost: the table that the controller decides by.

use std::time::Instant;

use super::{Models, want};
use crate::error::{Error, Result};
use crate::lm::{Batch, Lm, MAX_TREE, Row, Token};
use crate::sampling::{Distribution, Path, Rng, Warp};

/// Seconds that a pass takes, by its rows, with making probabilities of what it returns.
///
/// Between its entries a table is linear, beyond the last it goes on as between the last two.
#[derive(Debug, Clone, PartialEq)]
pub struct CostTable {
    target: Vec<(usize, f64)>,
    draft: Vec<(usize, f64)>,
}

impl CostTable {
    /// Rows of a target pass that are measured.
    pub const TARGET_ROWS: [usize; 6] = [1, 2, 4, 8, 16, 32];
    /// Rows of a draft step that are measured.
    pub const DRAFT_ROWS: [usize; 4] = [1, 2, 4, 8];

    /// A table of rows and seconds.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless rows begin with 1 and rise, and seconds are above 0.
    pub fn new(target: Vec<(usize, f64)>, draft: Vec<(usize, f64)>) -> Result<Self> {
        for (name, entries) in [("target", &target), ("draft", &draft)] {
            let rising = entries.windows(2).all(|pair| pair[0].0 < pair[1].0);
            let positive = entries.iter().all(|&(_, seconds)| seconds.is_finite() && seconds > 0.0);
            if entries.first().is_none_or(|first| first.0 != 1) || !rising || !positive {
                return Err(Error::invalid(format!(
                    "the cost table's {name} must be pairs of rows and seconds: rows from 1 on, \
                     rising, seconds above 0"
                )));
            }
        }
        Ok(CostTable { target, draft })
    }

    /// Measures both models on their lines, on to which nothing is committed. `token` is any.
    ///
    /// Each size is measured once, and if passes are fast all of them some times more, in turns;
    /// the median counts, so that a busy machine is seen as it is and a hiccup is not.
    ///
    /// # Errors
    /// What the models report; [`Error::Invalid`] without a draft.
    pub fn measure(models: &mut Models<'_>, token: Token, warp: &Warp) -> Result<Self> {
        let (vocab, shared) = (models.vocab(), models.shared());
        let reader = models.draft_reader();
        let q_warp = warp.for_draft();
        let target = seconds(models.target, &Self::TARGET_ROWS, token, vocab, warp, None)?;
        let draft = super::draft_of(models, super::Strategy::Auto)?;
        let widest = Self::DRAFT_ROWS[Self::DRAFT_ROWS.len() - 1];
        let largest = warp.is_greedy().then_some(widest);
        let token = reader.read(&[token])[0];
        let draft = seconds(draft, &Self::DRAFT_ROWS, token, shared, &q_warp, Some(largest))
            .map_err(Error::of_draft)?;
        Self::new(target, draft)
    }

    /// Seconds of a target pass of one row, as [`CostTable::measure`] would find it.
    pub(super) fn plain(models: &mut Models<'_>, token: Token, warp: &Warp) -> Result<f64> {
        let vocab = models.vocab();
        Ok(seconds(models.target, &[1], token, vocab, warp, None)?[0].1)
    }

    /// Rows and seconds of target passes.
    pub fn target_entries(&self) -> &[(usize, f64)] {
        &self.target
    }

    /// Rows and seconds of draft steps.
    pub fn draft_entries(&self) -> &[(usize, f64)] {
        &self.draft
    }

    /// Seconds of a target pass.
    pub fn target(&self, rows: usize) -> f64 {
        interpolate(&self.target, rows)
    }

    /// Seconds of a draft step.
    pub fn draft(&self, rows: usize) -> f64 {
        interpolate(&self.draft, rows)
    }
}

/// Times passes of a model. Rows of a draft (`Some`) are also drawn from, and of beam search (with a
/// number in it) only so many of the largest are wanted.
fn seconds(
    lm: &mut dyn Lm,
    sizes: &[usize],
    token: Token,
    vocab: usize,
    warp: &Warp,
    draft: Option<Option<usize>>,
) -> Result<Vec<(usize, f64)>> {
    /// Sizes are measured again until it took so long together.
    const ENOUGH: f64 = 0.03;
    const MOST_TURNS: usize = 15;
    /// A median wants three, unless that would take longer than this.
    const LEAST_TURNS: usize = 3;
    const PLENTY: f64 = 0.5;
    let want = want(warp, lm, vocab, Path::default(), draft.flatten(), None);
    let mut p = Distribution::default();
    let mut rng = Rng::new(0);
    if lm.committed() >= lm.capacity() {
        // A draft whose context is full; what it loses it would catch up on.
        lm.truncate(lm.capacity().saturating_sub(1))?;
    }
    let start = Instant::now();
    let mut turns: Vec<Vec<f64>> = vec![Vec::new(); sizes.len()];
    for turn in 0..MOST_TURNS {
        if turn >= LEAST_TURNS && start.elapsed().as_secs_f64() >= ENOUGH
            || start.elapsed().as_secs_f64() >= PLENTY
        {
            break;
        }
        for (&rows, took) in sizes.iter().zip(&mut turns) {
            lm.commit(None)?;
            let start = Instant::now();
            let mut batch = Batch::new();
            for row in 0..rows.min(MAX_TREE) {
                // A draft's rows lie side by side, a target's mostly in a chain.
                let parent = (draft.is_none() && row > 0).then(|| Row(row as u32 - 1));
                batch.push(token, parent, want);
            }
            if lm.committed() + rows > lm.capacity() {
                // Side by side they need no room but for one.
                batch.parents.fill(None);
            }
            let outputs = lm.eval(&batch)?;
            for row in 0..batch.len() {
                p.fill(outputs.get(row), vocab, warp, Path::default())?;
                if draft.is_some() {
                    let drawn = p.draw(&mut rng);
                    p.remove(drawn);
                }
            }
            took.push(start.elapsed().as_secs_f64());
        }
    }
    lm.commit(None)?;
    let median = |took: &mut Vec<f64>| {
        took.sort_unstable_by(f64::total_cmp);
        // A clock may be too coarse to see anything.
        took[took.len() / 2].max(1e-9)
    };
    Ok(sizes.iter().copied().zip(turns.iter_mut().map(median)).collect())
}

fn interpolate(entries: &[(usize, f64)], rows: usize) -> f64 {
    let next = entries.partition_point(|&(n, _)| n < rows);
    if next < entries.len() && entries[next].0 == rows || entries.len() == 1 {
        return entries[next.min(entries.len() - 1)].1;
    }
    let next = next.clamp(1, entries.len() - 1);
    let ((n0, t0), (n1, t1)) = (entries[next - 1], entries[next]);
    let slope = (t1 - t0) / (n1 - n0) as f64;
    // Noise must not make the largest passes look free.
    let slope = if rows > n1 { slope.max(0.0) } else { slope };
    (t0 + slope * (rows as f64 - n0 as f64)).max(t0.min(t1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_its_entries_a_table_is_linear() {
        let table = CostTable::new(vec![(1, 10.0), (2, 11.0), (4, 14.0)], vec![(1, 1.0)]).unwrap();
        let found: Vec<f64> = (1..=6).map(|n| table.target(n)).collect();
        assert_eq!(found, [10.0, 11.0, 12.5, 14.0, 15.5, 17.0]);
        assert_eq!(table.draft(7), 1.0);
    }

    #[test]
    fn a_table_that_makes_no_sense_is_refused() {
        let fine = vec![(1, 1.0)];
        for wrong in [vec![], vec![(2, 1.0)], vec![(1, 1.0), (1, 1.0)], vec![(1, 0.0)]] {
            assert!(CostTable::new(wrong.clone(), fine.clone()).is_err());
            let message = CostTable::new(fine.clone(), wrong).unwrap_err().to_string();
            assert!(message.contains("draft"), "{message}");
        }
    }
}
