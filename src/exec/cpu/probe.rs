//! What the machine can do at most: read bandwidth, and the rate of byte products in registers.
//!
//! They are the two limits of a pass over n rows, max(bytes / bandwidth, n MACs / rate), and a
//! bench measures them beside its passes.

use std::time::Instant;

use super::simd::Simd;
use super::{Cpu, share};

/// Parts for each thread: a thread that is late leaves some of its work to the others.
const PARTS: usize = 8;

/// Memory that a bandwidth measurement reads.
#[derive(Debug)]
pub struct Readable(Vec<u64>);

impl Readable {
    /// `bytes` of memory, touched once so that every page is there.
    pub fn new(bytes: usize) -> Self {
        // (All zeros would be one shared page.)
        Readable((0..bytes as u64 / 8).collect())
    }
}

/// Reads a stretch of memory once.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(super) unsafe fn read<S: Simd>(data: &[u64]) -> i32 {
    const CHAINS: usize = 8;
    let width = S::LANES / 2;
    // SAFETY: chunks are as long as all chains together.
    unsafe {
        let mut acc = [S::i32(0); CHAINS];
        for chunk in data.chunks_exact(CHAINS * width) {
            for (i, acc) in acc.iter_mut().enumerate() {
                let at = chunk.as_ptr().cast::<u8>().add(i * 8 * width);
                *acc = S::or(*acc, S::load_i(at));
            }
        }
        fold::<S>(acc)
    }
}

/// `rounds` times as many byte products as [`products`] says, in registers.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd>(rounds: usize, seed: i32) -> i32 {
    // SAFETY: no memory is touched.
    unsafe {
        let w = S::and(S::i32(seed), S::i32(0x0f0f_0f0f));
        let mut acc = [S::i32(seed); CHAINS];
        for _ in 0..rounds {
            for (i, acc) in acc.iter_mut().enumerate() {
                // Different factors, so that the compiler cannot share a product.
                *acc = S::dot(*acc, w, S::i32(seed ^ i as i32));
            }
        }
        fold::<S>(acc)
    }
}

/// Independent sums: enough to hide the latency of two products a cycle, few enough for registers.
const CHAINS: usize = 10;

#[inline(always)]
unsafe fn fold<S: Simd>(acc: impl IntoIterator<Item = S::I>) -> i32 {
    let mut out = 0;
    for acc in acc {
        let mut lanes = [0f32; 16];
        // SAFETY: the array is at least as wide as any vector.
        unsafe { S::store(lanes.as_mut_ptr(), S::as_f32(acc)) };
        out ^= lanes.iter().fold(0, |x, lane| x ^ lane.to_bits() as i32);
    }
    out
}

impl Cpu {
    /// Reads `data` once with all threads; bytes per second.
    pub fn read_bandwidth(&self, data: &Readable) -> f64 {
        let threads = self.threads();
        let start = self.pool.enter(true, |scope| {
            scope.run(threads, &|_| ());
            let start = Instant::now();
            scope.run(PARTS * threads, &|part| {
                let part = &data.0[share(data.0.len(), part, PARTS * threads)];
                // SAFETY: the kernels are those of this machine.
                std::hint::black_box(unsafe { (self.isa.kernels().read)(part) });
            });
            start.elapsed()
        });
        data.0.len() as f64 * 8.0 / start.as_secs_f64()
    }

    /// Multiplies bytes in registers with all threads for some milliseconds; products per second.
    pub fn byte_products(&self) -> f64 {
        const ROUNDS: usize = 50_000;
        let threads = self.threads();
        let seed = std::hint::black_box(0x0102_0304);
        let seconds = self.pool.enter(true, |scope| {
            scope.run(threads, &|_| ());
            let start = Instant::now();
            scope.run(PARTS * threads, &|_| {
                // SAFETY: the kernels are those of this machine.
                std::hint::black_box(unsafe { (self.isa.kernels().products)(ROUNDS, seed) });
            });
            start.elapsed().as_secs_f64()
        });
        let lanes = self.isa.kernels().lanes;
        (ROUNDS * PARTS * CHAINS * lanes * 4 * threads) as f64 / seconds
    }
}
