//! Products of packed weights with a few activation rows.
//!
//! Decoding is bound by reading weights, so a block of weights is unpacked once and used for
//! every activation row of a tile. Activations are quantized once per product to bytes with one
//! scale per 32 columns and laid out in the order in which the kernel reads them: for a tile of
//! `n` rows and each block of 32 columns, eight dwords of four columns (each for n rows), then
//! per row the scale, the negated sums of the bytes times the weights' offset (with which the
//! integer sum begins), and the scaled sums (for formats with minima).
//!
//! One output is sum over blocks of fma(float(integer dot product) * activation scale, weight
//! scale, so far), in order of column: the same operations whatever `n`, the tile, the thread
//! count and the instruction set.

use super::panel::{BLOCK, Bench, Format, Panels, ROWS, Values};
use super::simd::{PairSimd, Simd, max_lanes, sum_lanes_i};

/// What a kernel works on: one panel and one tile.
#[derive(Clone, Copy)]
pub(super) struct Args {
    pub panel: *const u8,
    /// Bytes of scales at the panel's head.
    pub scale_bytes: usize,
    pub cols: usize,
    /// The tile's activations.
    pub activations: *const u32,
    /// Sixteen outputs of the tile's first row.
    pub out: *mut f32,
    /// f32s from a row of outputs to the next.
    pub out_stride: usize,
    /// Sixteen biases, or null.
    pub bias: *const f32,
    /// Whether to add to the outputs instead of replacing them.
    pub add: bool,
    /// A panel to be fetched meanwhile, or null.
    pub prefetch: *const u8,
}

/// A kernel for a fixed type and number of rows.
pub(super) type Kernel = unsafe fn(&Args);

/// The kernels of a weight type.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// For 1, 2, ... activation rows; as many as a tile has at most.
    pub by_rows: &'static [Kernel],
    /// The activations that they read.
    pub form: ActivationLayout,
}

/// How activations are laid out for a weight type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ActivationLayout {
    /// f32, for float weights: for each column, one for each row of the tile.
    Float,
    /// Bytes with sums over the parts of a block that have scales of their own.
    Bytes {
        /// Parts of a block: 1 or 2.
        subs: usize,
        /// The integer sums are multiplied by two to this power: the offset of the weights.
        offset: u32,
    },
}

impl ActivationLayout {
    /// The form that the kernel of a type reads.
    pub const fn of<S: Simd, F: Format>() -> Self {
        let signed = F::Values::WIDE && !S::UNSIGNED_WIDE;
        ActivationLayout::Bytes { subs: F::SUBS, offset: if signed { 0 } else { F::OFFSET } }
    }

    /// Dwords for one row of `cols` columns.
    pub fn row_dwords(self, cols: usize) -> usize {
        match self {
            ActivationLayout::Float => cols,
            ActivationLayout::Bytes { subs, .. } => cols / BLOCK * block_dwords(subs),
        }
    }
}

/// Dwords for one row and one block: bytes, scale, sums, scaled sums.
const fn block_dwords(subs: usize) -> usize {
    8 + 1 + 2 * subs
}

/// Lays out row `r` of a tile of `n` rows.
///
/// # Safety
/// The CPU has `S`.
///
/// # Panics
/// If `tile` is shorter than `n` rows of the form.
#[inline(always)]
pub(super) unsafe fn quantize_activations<S: Simd>(
    form: ActivationLayout,
    x: &[f32],
    tile: &mut [u32],
    r: usize,
    n: usize,
) {
    match form {
        ActivationLayout::Float => {
            for (x, group) in x.iter().zip(tile.chunks_exact_mut(n)) {
                group[r] = x.to_bits();
            }
        }
        // SAFETY: the caller's.
        ActivationLayout::Bytes { subs: 1, offset } => unsafe {
            quantize::<S, 1>(x, offset, tile, r, n)
        },
        // SAFETY: the caller's.
        ActivationLayout::Bytes { offset, .. } => unsafe {
            quantize::<S, 2>(x, offset, tile, r, n)
        },
    }
}

/// Rounds a row to bytes: in each block the largest magnitude becomes 127.
#[inline(always)]
unsafe fn quantize<S: Simd, const SUBS: usize>(
    x: &[f32],
    offset: u32,
    tile: &mut [u32],
    r: usize,
    n: usize,
) {
    let blocks = tile.chunks_exact_mut(n * block_dwords(SUBS));
    for (x, tile) in x.chunks_exact(BLOCK).zip(blocks) {
        let (mut bytes, mut part_sums) = ([0u8; BLOCK], [0i32; SUBS]);
        // SAFETY: a block of floats, and of bytes, is a whole number of vectors.
        let scale = unsafe {
            let (mut largest, zero) = (S::f32(0.0), S::f32(0.0));
            for i in (0..BLOCK).step_by(S::LANES) {
                let x = S::load(x.as_ptr().add(i));
                largest = S::max(largest, S::max(x, S::sub(zero, x)));
            }
            let largest = max_lanes::<S>(largest);
            // (What is so small that its scale is no normal number counts as zero.)
            let scale = largest / 127.0;
            let normal = scale >= f32::MIN_POSITIVE;
            let inverse = S::f32(if normal { 127.0 / largest } else { 0.0 });
            for (part, sum) in part_sums.iter_mut().enumerate() {
                let mut sums = S::i32(0);
                for i in (part * BLOCK / SUBS..(part + 1) * BLOCK / SUBS).step_by(S::LANES) {
                    let q = S::round(S::mul(S::load(x.as_ptr().add(i)), inverse));
                    S::store_bytes(bytes.as_mut_ptr().add(i), q);
                    sums = S::add_i(sums, q);
                }
                *sum = sum_lanes_i::<S>(sums);
            }
            if normal { scale } else { 0.0 }
        };
        for (g, q) in bytes.as_chunks::<4>().0.iter().enumerate() {
            tile[g * n + r] = u32::from_le_bytes(*q);
        }
        tile[8 * n + r] = scale.to_bits();
        for (s, sum) in part_sums.into_iter().enumerate() {
            tile[(9 + s) * n + r] = (sum.wrapping_neg() as u32) << offset;
            tile[(9 + SUBS + s) * n + r] = (scale * sum as f32).to_bits();
        }
    }
}

/// How the bytes of a block are multiplied: one activation row after the other, or in pairs.
pub(super) trait Products<S: Simd> {
    /// The integer sums of `N` activation rows over the part `SUB` of a block.
    ///
    /// # Safety
    /// As [`quantized`]: `plane` points at the block's values, `tile` at its activations.
    unsafe fn sums<F: Format, const N: usize, const SUB: usize>(
        plane: *const u8,
        tile: *const u32,
    ) -> [S::I; N];
}

/// What the sum of activation row `r` begins with: what takes the offset off the weights.
#[inline(always)]
unsafe fn beginning<S: Simd, F: Format, const N: usize, const SUB: usize>(
    tile: *const u32,
    r: usize,
) -> i32 {
    match ActivationLayout::of::<S, F>() {
        ActivationLayout::Bytes { offset: 0, .. } | ActivationLayout::Float => 0,
        // SAFETY: the caller's.
        ActivationLayout::Bytes { .. } => unsafe { *tile.add((9 + SUB) * N + r) as i32 },
    }
}

/// One activation row after the other.
pub(super) struct Singly;

impl<S: Simd> Products<S> for Singly {
    #[inline(always)]
    unsafe fn sums<F: Format, const N: usize, const SUB: usize>(
        plane: *const u8,
        tile: *const u32,
    ) -> [S::I; N] {
        // SAFETY: the caller's.
        unsafe {
            let mut acc = [S::i32(0); N];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = S::i32(beginning::<S, F, N, SUB>(tile, r));
            }
            macro_rules! groups {
                ($($g:literal)*) => {$(
                    if $g * F::SUBS / 8 == SUB {
                        let q = F::Values::group::<S>(plane, $g);
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = S::i32(*tile.add($g * N + r) as i32);
                            *acc = match F::Values::WIDE {
                                true => S::dot_wide(*acc, q, x),
                                false => S::dot(*acc, q, x),
                            };
                        }
                    }
                )*};
            }
            groups!(0 1 2 3 4 5 6 7);
            acc
        }
    }
}

/// Two activation rows at a time, where the instruction set can; a last one alone.
#[cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]
pub(super) struct InPairs;

impl<S: PairSimd> Products<S> for InPairs {
    #[inline(always)]
    unsafe fn sums<F: Format, const N: usize, const SUB: usize>(
        plane: *const u8,
        tile: *const u32,
    ) -> [S::I; N] {
        // SAFETY: the caller's.
        unsafe {
            let mut pairs = [S::pair(0, 0); 4];
            for (i, pair) in pairs[..N / 2].iter_mut().enumerate() {
                let first = beginning::<S, F, N, SUB>(tile, 2 * i);
                *pair = S::pair(first, beginning::<S, F, N, SUB>(tile, 2 * i + 1));
            }
            let mut last = S::i32(beginning::<S, F, N, SUB>(tile, N - 1));
            macro_rules! groups {
                ($($g:literal)*) => {$(
                    if $g * F::SUBS / 8 == SUB {
                        let first = F::Values::group::<S>(plane, $g);
                        let second = F::Values::group::<S>(plane, $g + 1);
                        let (x, y) = (tile.add($g * N), tile.add(($g + 1) * N));
                        let w = S::eight(first, second);
                        for (i, pair) in pairs[..N / 2].iter_mut().enumerate() {
                            *pair = S::dot_pair(*pair, w, x.add(2 * i), y.add(2 * i));
                        }
                        if N % 2 == 1 {
                            last = S::dot_wide(last, first, S::i32(*x.add(N - 1) as i32));
                            last = S::dot_wide(last, second, S::i32(*y.add(N - 1) as i32));
                        }
                    }
                )*};
            }
            groups!(0 2 4 6);
            let mut acc = [last; N];
            for (i, pair) in pairs[..N / 2].iter().enumerate() {
                let [a, b] = S::split(*pair);
                (acc[2 * i], acc[2 * i + 1]) = (a, b);
            }
            acc
        }
    }
}

/// The kernel of a quantized type for a tile of `N` rows.
///
/// # Safety
/// `a` describes a panel of this format with `cols` a multiple of 32, a tile of `N` rows laid
/// out for it, and outputs that nobody else uses; the CPU has `S`.
#[inline(always)]
pub(super) unsafe fn quantized<S: Simd, P: Products<S>, F: Format, const N: usize>(a: &Args) {
    let (blocks, values) = (a.cols / BLOCK, a.panel.wrapping_add(a.scale_bytes));
    for lane in (0..ROWS).step_by(S::LANES) {
        // SAFETY: all reads are inside the panel and the tile, whose sizes follow from `cols`.
        unsafe {
            let mut sums = [S::f32(0.0); N];
            let mut tile = a.activations;
            for b in 0..blocks {
                let at = b * F::BLOCK_BYTES;
                if lane == 0 && !a.prefetch.is_null() {
                    for line in (0..F::BLOCK_BYTES).step_by(64) {
                        S::prefetch(a.prefetch.wrapping_add(a.scale_bytes + at + line));
                    }
                    let scales = b * F::SCALE_BYTES / F::SCALE_BLOCKS;
                    S::prefetch(a.prefetch.wrapping_add(scales));
                }
                let plane = values.add(at + 4 * lane);
                let set = a.panel.add(b / F::SCALE_BLOCKS * F::SCALE_BYTES);
                let [first, second] = F::scales::<S>(set, lane, b % F::SCALE_BLOCKS);
                part::<S, P, F, N, 0>(plane, tile, first, &mut sums);
                if F::SUBS == 2 {
                    part::<S, P, F, N, 1>(plane, tile, second, &mut sums);
                }
                tile = tile.add(N * block_dwords(F::SUBS));
            }
            finish::<S, N>(a, lane, sums);
        }
    }
}

/// Adds the part `SUB` of a block, which has a scale of its own, to the sums of `N` rows.
#[inline(always)]
unsafe fn part<S: Simd, P: Products<S>, F: Format, const N: usize, const SUB: usize>(
    plane: *const u8,
    tile: *const u32,
    [scale, minimum]: [S::F; 2],
    sums: &mut [S::F; N],
) {
    // SAFETY: the caller's, [`quantized`].
    unsafe {
        let acc = P::sums::<F, N, SUB>(plane, tile);
        for r in 0..N {
            let d = S::f32(f32::from_bits(*tile.add(8 * N + r)));
            sums[r] = S::fma(S::mul(S::to_f32(acc[r]), d), scale, sums[r]);
            if F::MINIMA {
                let sum = *tile.add((9 + F::SUBS + SUB) * N + r);
                sums[r] = S::fma(S::f32(f32::from_bits(sum)), minimum, sums[r]);
            }
        }
    }
}

/// A float type: how a vector of weights is loaded.
pub(super) trait FloatWeights {
    /// Bytes of a weight.
    const SIZE: usize;

    /// # Safety
    /// As [`Simd`]'s loads.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl FloatWeights for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load(p.cast()) }
    }
}

impl FloatWeights for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load_f16(p.cast()) }
    }
}

impl FloatWeights for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the caller's. A bf16 is the high half of an f32.
        unsafe { S::as_f32(S::shl::<16>(S::load_u16(p.cast()))) }
    }
}

/// The kernel of a float type for a tile of `N` rows.
///
/// # Safety
/// As [`quantized`], for any `cols`.
#[inline(always)]
pub(super) unsafe fn float<S: Simd, W: FloatWeights, const N: usize>(a: &Args) {
    for lane in (0..ROWS).step_by(S::LANES) {
        // SAFETY: all reads are inside the panel and the tile, whose sizes follow from `cols`.
        unsafe {
            let mut sums = [S::f32(0.0); N];
            let mut tile = a.activations.cast::<f32>();
            let mut weights = a.panel.add(lane * W::SIZE);
            for _ in 0..a.cols {
                let w = W::load::<S>(weights);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(w, S::f32(*tile.add(r)), *sum);
                }
                tile = tile.add(N);
                weights = weights.add(ROWS * W::SIZE);
            }
            finish::<S, N>(a, lane, sums);
        }
    }
}

#[inline(always)]
unsafe fn finish<S: Simd, const N: usize>(a: &Args, lane: usize, sums: [S::F; N]) {
    for (r, mut sum) in sums.into_iter().enumerate() {
        // SAFETY: `out` has N rows of sixteen, `bias` sixteen.
        unsafe {
            let out = a.out.add(r * a.out_stride + lane);
            if !a.bias.is_null() {
                sum = S::add(sum, S::load(a.bias.add(lane)));
            }
            if a.add {
                sum = S::add(S::load(out), sum);
            }
            S::store(out, sum);
        }
    }
}

/// Multiplies some panels with every tile of a batch.
///
/// # Safety
/// As the kernels'; `activations` holds `rows` rows in tiles of `tile`, laid out in the form of
/// the panels' type, and `out` has `rows` rows of `out_stride >= 16 * count()`, of which nobody
/// else uses the columns of these panels.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn multiply(
    panels: &Panels,
    range: std::ops::Range<usize>,
    kernels: &Kernels,
    activations: *const u32,
    rows: usize,
    out: *mut f32,
    out_stride: usize,
    bias: Option<&[f32]>,
    add: bool,
) {
    let tile = kernels.by_rows.len();
    let row_dwords = kernels.form.row_dwords(panels.cols);
    let mut bench = Bench::default();
    for p in range.clone() {
        let panel = panels.panel(p, &mut bench);
        for first in (0..rows).step_by(tile) {
            let n = tile.min(rows - first);
            // The next panel is asked for while the first tile is worked on: without, any number
            // of rows waits for memory.
            let fetch = first == 0 && p + 1 < range.end && panels.is_packed();
            let args = Args {
                panel,
                scale_bytes: panels.scale_bytes,
                cols: panels.cols,
                activations: activations.wrapping_add(first * row_dwords),
                out: out.wrapping_add(first * out_stride + p * ROWS),
                out_stride,
                bias: bias.map_or(std::ptr::null(), |bias| bias[p * ROWS..].as_ptr()),
                add,
                prefetch: if fetch { panel.wrapping_add(panels.stride) } else { std::ptr::null() },
            };
            // SAFETY: the caller's.
            unsafe { kernels.by_rows[n - 1](&args) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::cpu::kernels::Isa;
    use crate::exec::cpu::noise::Noise;
    use crate::gguf::Tensor;
    use crate::quant::BlockType;

    /// Random blocks with plausible scales: any bits are values, but not any bits are an f16.
    fn blocks(block_type: BlockType, elements: usize, noise: &mut Noise) -> Vec<u8> {
        let count = elements / block_type.block_len();
        let mut bytes: Vec<u8> =
            (0..count * block_type.block_bytes()).map(|_| noise.bits() as u8).collect();
        // An F16 weight is a half itself.
        let halves = if block_type == BlockType::F16 { &[0] } else { block_type.scale_offsets() };
        for block in bytes.chunks_exact_mut(block_type.block_bytes()) {
            for &at in halves {
                let scale = half::f16::from_f32(0.1 * noise.unit());
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
            match block_type {
                BlockType::F32 => block.copy_from_slice(&noise.unit().to_le_bytes()),
                BlockType::BF16 => {
                    block.copy_from_slice(&half::bf16::from_f32(noise.unit()).to_le_bytes());
                }
                _ => {}
            }
        }
        bytes
    }

    /// All outputs of `rows` activation rows, `16 * panels` of each.
    fn product(isa: Isa, panels: &Panels, x: &[f32], rows: usize) -> Vec<f32> {
        let kernels = (isa.kernels().matmul)(panels.block_type);
        let form = kernels.form;
        let dwords = form.row_dwords(panels.cols);
        let mut activations = vec![0; rows * dwords];
        let tile = kernels.by_rows.len();
        for (t, tile_data) in activations.chunks_mut(tile * dwords).enumerate() {
            let n = tile.min(rows - t * tile);
            for r in 0..n {
                let row = &x[(t * tile + r) * panels.cols..][..panels.cols];
                // SAFETY: the caller asks for available instruction sets only.
                unsafe { (isa.kernels().quantize_activations)(form, row, tile_data, r, n) };
            }
        }
        let stride = panels.count() * ROWS;
        let mut out = vec![0.0; rows * stride];
        // SAFETY: activations and outputs are as large as `multiply` wants.
        unsafe {
            multiply(
                panels,
                0..panels.count(),
                &kernels,
                activations.as_ptr(),
                rows,
                out.as_mut_ptr(),
                stride,
                None,
                false,
            );
        }
        out
    }

    #[test]
    fn every_type_and_instruction_set_against_the_exact_product() {
        let noise = &mut Noise(7);
        // Not a multiple of 16 rows; an odd number of blocks where the type allows it.
        let (rows, n) = (37, 11);
        for block_type in BlockType::READABLE {
            let cols = if block_type.block_len() == 256 { 768 } else { 224 };
            let bytes = blocks(block_type, rows * cols, noise);
            let tensor = Tensor { file: "test", name: "w", cols, rows, block_type, bytes: &bytes };
            let panels = Panels::pack(&tensor, |parts, job| (0..parts).for_each(job)).unwrap();
            let x: Vec<f32> = (0..n * cols).map(|_| noise.unit()).collect();

            let mut weights = vec![0.0; rows * cols];
            block_type.dequantize(&bytes, &mut weights);
            // What the kernel sees of the activations: bytes with one scale for 32.
            let rounded: Vec<f64> = match block_type.is_float() {
                true => x.iter().map(|&x| x.into()).collect(),
                false => x
                    .chunks_exact(BLOCK)
                    .flat_map(|block| {
                        let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
                        let (scale, inverse) = (largest / 127.0, 127.0 / largest);
                        let round = move |x: &f32| {
                            f64::from(scale) * f64::from((x * inverse).round_ties_even())
                        };
                        block.iter().map(round).collect::<Vec<_>>()
                    })
                    .collect(),
            };
            let reference = product(Isa::Scalar, &panels, &x, n);
            for i in 0..n {
                for j in 0..rows {
                    let terms =
                        (0..cols).map(|c| rounded[i * cols + c] * f64::from(weights[j * cols + c]));
                    let (exact, size) =
                        terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                    let found = f64::from(reference[i * panels.count() * ROWS + j]);
                    assert!(
                        (found - exact).abs() <= 2e-6 * size,
                        "{block_type} row {i} output {j}: {found}, exactly {exact}"
                    );
                }
            }
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                assert_eq!(product(isa, &panels, &x, n), reference, "{block_type} on {isa}");
                for few in 1..n {
                    let part = product(isa, &panels, &x[..few * cols], few);
                    assert_eq!(
                        part,
                        reference[..part.len()],
                        "{few} rows of {block_type} on {isa}"
                    );
                }
            }
        }
    }

    #[test]
    fn activations_that_are_zero_or_huge_do_no_harm() {
        let bytes = blocks(BlockType::Q8_0, 16 * 64, &mut Noise(3));
        let tensor = Tensor {
            file: "t",
            name: "w",
            cols: 64,
            rows: 16,
            block_type: BlockType::Q8_0,
            bytes: &bytes,
        };
        let panels = Panels::pack(&tensor, |parts, job| (0..parts).for_each(job)).unwrap();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            assert!(product(isa, &panels, &[0.0; 64], 1).iter().all(|&x| x == 0.0));
            // No panic; what comes out of infinities is not a number, as it should be.
            for x in [f32::MAX, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE / 4.0] {
                product(isa, &panels, &[x; 64], 1);
            }
        }
    }
}
