//! The seeded generator: the same numbers on every platform.

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64;

/// A PCG generator (XSL RR 128/64; O'Neill 2014).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    generator: Pcg64,
    at: RngState,
}

/// Where a generator is: all that is needed to go on from there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngState {
    /// Its seed.
    pub seed: u64,
    /// Numbers that it has given.
    pub draws: u64,
}

impl Rng {
    /// The generator of this seed.
    pub fn new(seed: u64) -> Self {
        Self::at(RngState { seed, draws: 0 })
    }

    /// The generator that has come so far; any distance takes the same time.
    pub fn at(at: RngState) -> Self {
        let mut generator = Pcg64::seed_from_u64(at.seed);
        generator.advance(u128::from(at.draws));
        Rng { generator, at }
    }

    /// Where it is.
    pub fn state(&self) -> RngState {
        self.at
    }

    /// A number in `[0, 1)`, one of 2^53 equally likely ones.
    pub fn uniform(&mut self) -> f64 {
        self.at.draws = self.at.draws.wrapping_add(1);
        (self.generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number in `0..n`.
    pub fn below(&mut self, n: u32) -> u32 {
        (self.uniform() * f64::from(n)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_seed_are_fixed() {
        let mut rng = Rng::new(7);
        let first: Vec<u32> = (0..8).map(|_| rng.below(1000)).collect();
        assert_eq!(first, [0, 231, 901, 835, 491, 591, 89, 323]);
        assert!((0..10_000).all(|_| (0.0..1.0).contains(&rng.uniform())));
        let mut again = Rng::at(rng.state());
        assert_eq!(again, rng);
        assert_eq!(again.uniform(), rng.uniform());
        assert_eq!(again.state(), RngState { seed: 7, draws: 10_009 });
    }
}
