//! Counts over rounds, and the metrics of the MTAD paper (Qin et al., arXiv 2407.09722) from them.

use super::Block;

/// What rounds drafted and accepted. Everything else derives from these counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// Rounds that accepted exactly i tokens.
    pub accepted_lengths: Vec<u64>,
    /// Rounds that drafted exactly i tokens in a path.
    pub drafted_lengths: Vec<u64>,
    /// Tokens that are in the text; fewer than were produced if a block was cut short.
    pub emitted: u64,
    /// Tokens that came without a round, as no other could follow by the grammar.
    pub forced: u64,
    /// The smallest ln (joint p / joint q) of an accepted block; infinity if there was none.
    pub min_log_ratio: f64,
}

impl Default for Statistics {
    fn default() -> Self {
        Statistics {
            accepted_lengths: Vec::new(),
            drafted_lengths: Vec::new(),
            emitted: 0,
            forced: 0,
            min_log_ratio: f64::INFINITY,
        }
    }
}

impl Statistics {
    /// Counts a round, or forced tokens.
    pub fn record(&mut self, block: &Block) {
        self.emitted += block.tokens.len() as u64;
        if block.forced > 0 {
            self.forced += block.forced as u64;
            return;
        }
        add(&mut self.accepted_lengths, block.accepted, 1);
        add(&mut self.drafted_lengths, block.drafted, 1);
        self.min_log_ratio = self.min_log_ratio.min(block.log_ratio().unwrap_or(f64::INFINITY));
    }

    /// Counts the rounds of another decoding, too.
    pub fn merge(&mut self, other: &Statistics) {
        for (length, &rounds) in other.accepted_lengths.iter().enumerate() {
            add(&mut self.accepted_lengths, length, rounds);
        }
        for (length, &rounds) in other.drafted_lengths.iter().enumerate() {
            add(&mut self.drafted_lengths, length, rounds);
        }
        self.emitted += other.emitted;
        self.forced += other.forced;
        self.min_log_ratio = self.min_log_ratio.min(other.min_log_ratio);
    }

    /// Rounds. With a draft each is one pass of the target.
    pub fn rounds(&self) -> u64 {
        self.accepted_lengths.iter().sum()
    }

    /// Tokens drafted, gamma per round, also where a tree was drafted.
    pub fn drafted(&self) -> u64 {
        weighted(&self.drafted_lengths)
    }

    /// Drafted tokens that were accepted.
    pub fn accepted(&self) -> u64 {
        weighted(&self.accepted_lengths)
    }

    /// Accepted / drafted, if any were drafted.
    pub fn acceptance_rate(&self) -> Option<f64> {
        let drafted = self.drafted();
        (drafted > 0).then(|| self.accepted() as f64 / drafted as f64)
    }

    /// 1 + accepted / rounds: tokens per pass of the target. 1 without a draft. Forced tokens are not
    /// counted: no pass made them.
    pub fn block_efficiency(&self) -> f64 {
        1.0 + self.accepted() as f64 / self.rounds().max(1) as f64
    }

    /// For each depth, from 1: the share of the rounds that drafted so far which also accepted so
    /// far.
    pub fn acceptance_by_depth(&self) -> Vec<f64> {
        let reached = |lengths: &[u64], depth: usize| -> u64 { lengths.iter().skip(depth).sum() };
        (1..self.drafted_lengths.len())
            .map(|depth| {
                reached(&self.accepted_lengths, depth) as f64
                    / reached(&self.drafted_lengths, depth) as f64
            })
            .collect()
    }

    /// The smallest joint p / joint q of an accepted block, if any was accepted.
    pub fn min_ratio(&self) -> Option<f64> {
        (self.min_log_ratio < f64::INFINITY).then(|| self.min_log_ratio.exp())
    }
}

fn add(histogram: &mut Vec<u64>, length: usize, rounds: u64) {
    if histogram.len() <= length {
        histogram.resize(length + 1, 0);
    }
    histogram[length] += rounds;
}

fn weighted(histogram: &[u64]) -> u64 {
    histogram.iter().zip(0..).map(|(rounds, length)| rounds * length).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(drafted: usize, accepted: usize, log_p: f64) -> Block {
        Block { tokens: vec![0; accepted + 1], drafted, accepted, log_p, ..Block::default() }
    }

    #[test]
    fn metrics_derive_from_counts() {
        let mut a = Statistics::default();
        assert_eq!((a.acceptance_rate(), a.block_efficiency(), a.min_ratio()), (None, 1.0, None));
        a.record(&block(4, 4, -1.0));
        a.record(&block(4, 1, -2.0));
        a.record(&block(4, 0, 0.0));
        let mut b = Statistics::default();
        b.record(&block(2, 2, -0.5));
        a.merge(&b);
        assert_eq!((a.rounds(), a.drafted(), a.accepted(), a.emitted), (4, 14, 7, 11));
        assert_eq!(a.acceptance_rate(), Some(0.5));
        assert_eq!(a.block_efficiency(), 2.75);
        assert_eq!(a.acceptance_by_depth(), [0.75, 0.5, 1.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(a.min_ratio(), Some((-2.0f64).exp()));
    }
}
