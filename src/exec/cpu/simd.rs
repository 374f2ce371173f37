//! The vector operations that kernels are written in, and their scalar form.
//!
//! A kernel is written once, generic over [`Simd`], and compiled once per instruction set inside
//! a function that enables it. All methods are `inline(always)` so that they end up there. The
//! integer products are exact and every float operation is one IEEE operation per lane, in an
//! order that the kernel fixes; so a kernel returns the same bits on every instruction set,
//! as long as it does not sum across lanes.
//!
//! # Safety
//! Every method requires that the CPU has the instruction set of the implementation, and every
//! load or store that the pointer is valid for its whole width.

#![allow(clippy::missing_safety_doc)]

/// One instruction set: vectors of `LANES` f32 or i32.
pub(super) trait Simd: Copy {
    /// Lanes of a vector.
    const LANES: usize;
    /// Activation rows that a matrix kernel handles at once: what the registers hold.
    const TILE: usize;
    /// Whether [`Simd::dot_wide`] takes weights as unsigned bytes with an offset of 128, which the caller
    /// takes off; otherwise they are signed.
    const UNSIGNED_WIDE: bool;
    /// A vector of f32.
    type F: Copy;
    /// A vector of i32, also seen as `4 * LANES` bytes.
    type I: Copy;

    unsafe fn f32(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// `LANES` halves, widened.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// a b + c, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(x: Self::F) -> Self::I;
    unsafe fn to_f32(x: Self::I) -> Self::F;
    /// The same bits as f32.
    unsafe fn as_f32(x: Self::I) -> Self::F;

    unsafe fn i32(x: i32) -> Self::I;
    /// `4 * LANES` bytes.
    unsafe fn load_i(p: *const u8) -> Self::I;
    /// `LANES` unsigned bytes, widened.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    /// `LANES` signed bytes, widened.
    unsafe fn load_i8(p: *const u8) -> Self::I;
    /// `LANES` 16-bit words, widened without sign.
    unsafe fn load_u16(p: *const u16) -> Self::I;
    /// Stores the low byte of each lane.
    unsafe fn store_bytes(p: *mut u8, x: Self::I);
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn shl<const N: u32>(x: Self::I) -> Self::I;
    unsafe fn shr<const N: u32>(x: Self::I) -> Self::I;
    /// Bytes 0..15 to the entries of a table of 16.
    unsafe fn lookup(table: &[u8; 16], x: Self::I) -> Self::I;

    /// acc + the dot product of four bytes of `w` (0..=63) with four signed bytes of `a`, lane
    /// by lane.
    unsafe fn dot(acc: Self::I, w: Self::I, a: Self::I) -> Self::I;
    /// Likewise for weights of eight bits, stored with an offset of 128: takes the offset off
    /// unless [`Simd::UNSIGNED_WIDE`]. `a` is within -127..=127.
    unsafe fn dot_wide(acc: Self::I, w: Self::I, a: Self::I) -> Self::I;

    /// Asks for a cache line.
    unsafe fn prefetch(p: *const u8);
}

/// An instruction set that multiplies bytes by matrices: weights of eight columns with two
/// activation rows at once.
#[cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]
pub(super) trait PairSimd: Simd {
    /// Eight columns of the weights of `LANES` rows.
    type Eight: Copy;
    /// The sums of two activation rows, in the order of the instruction.
    type Pair: Copy;

    /// From two vectors of four columns.
    unsafe fn eight(first: Self::I, second: Self::I) -> Self::Eight;
    /// Sums that begin at `a` for one activation row and at `b` for the other.
    unsafe fn pair(a: i32, b: i32) -> Self::Pair;
    /// acc + the products of eight columns, whose first and second four signed bytes of the two
    /// activation rows are at `first` and `second`.
    unsafe fn dot_pair(
        acc: Self::Pair,
        w: Self::Eight,
        first: *const u32,
        second: *const u32,
    ) -> Self::Pair;
    /// The sums of the two activation rows, lane by lane.
    unsafe fn split(acc: Self::Pair) -> [Self::I; 2];
}

/// e^x, within two units in the last place; 0 below -87.3, and x is taken as at most 88.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 6 (Taylor's with the last
/// coefficients adjusted is not needed at this accuracy), times 2^n by its exponent bits.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's; no memory is touched.
    unsafe {
        let low = S::f32(-87.3);
        let clamped = S::min(S::max(x, low), S::f32(88.0));
        let n = S::round(S::mul(clamped, S::f32(std::f32::consts::LOG2_E)));
        let nf = S::to_f32(n);
        // ln 2 in two parts, so that n ln 2 is taken off exactly.
        let r = S::fma(nf, S::f32(-0.693_359_4), clamped);
        let r = S::fma(nf, S::f32(2.121_944_4e-4), r);
        let mut e = S::f32(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            e = S::fma(e, r, S::f32(c));
        }
        let power = S::as_f32(S::shl::<23>(S::add_i(n, S::i32(127))));
        S::mul(e, power)
    }
}

/// The sum of the lanes, in a fixed order.
#[inline(always)]
pub(super) unsafe fn sum_lanes<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [0f32; 16];
    // SAFETY: the array is at least as wide as any vector.
    unsafe { S::store(lanes.as_mut_ptr(), x) };
    let mut n = S::LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// The sum of the lanes of integers.
#[inline(always)]
pub(super) unsafe fn sum_lanes_i<S: Simd>(x: S::I) -> i32 {
    let mut lanes = [0f32; 16];
    // SAFETY: the array is at least as wide as any vector.
    unsafe { S::store(lanes.as_mut_ptr(), S::as_f32(x)) };
    let mut sum = 0i32;
    for lane in &lanes[..S::LANES] {
        sum = sum.wrapping_add(lane.to_bits() as i32);
    }
    sum
}

/// The largest lane.
#[inline(always)]
pub(super) unsafe fn max_lanes<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    // SAFETY: the array is at least as wide as any vector.
    unsafe { S::store(lanes.as_mut_ptr(), x) };
    let mut n = S::LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] = if lanes[i + n] > lanes[i] { lanes[i + n] } else { lanes[i] };
        }
    }
    lanes[0]
}

/// No instruction set at all: the twin that the others are compared with.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

const LANES: usize = 16;
type F = [f32; LANES];
type I = [i32; LANES];

#[inline(always)]
fn each<T: Copy, U>(x: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    x.map(f)
}

#[inline(always)]
fn both<T: Copy, U: Copy, V>(a: [T; LANES], b: [U; LANES], f: impl Fn(T, U) -> V) -> [V; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    const LANES: usize = LANES;
    const TILE: usize = 4;
    const UNSIGNED_WIDE: bool = false;
    type F = F;
    type I = I;

    #[inline(always)]
    unsafe fn f32(x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        // SAFETY: the caller's.
        unsafe { p.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: F) {
        // SAFETY: the caller's.
        unsafe { p.cast::<F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        // SAFETY: the caller's.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        each(bits, |b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        both(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        both(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        both(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        both(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        both(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        both(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn round(x: F) -> I {
        each(x, |x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn to_f32(x: I) -> F {
        each(x, |x| x as f32)
    }
    #[inline(always)]
    unsafe fn as_f32(x: I) -> F {
        each(x, |x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    unsafe fn i32(x: i32) -> I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u8) -> I {
        // SAFETY: the caller's.
        unsafe { p.cast::<I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> I {
        // SAFETY: the caller's.
        each(unsafe { p.cast::<[u8; LANES]>().read() }, i32::from)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> I {
        // SAFETY: the caller's.
        each(unsafe { p.cast::<[i8; LANES]>().read() }, i32::from)
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u16) -> I {
        // SAFETY: the caller's.
        each(unsafe { p.cast::<[u16; LANES]>().read_unaligned() }, i32::from)
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut u8, x: I) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[u8; LANES]>().write(each(x, |x| x as u8)) }
    }
    #[inline(always)]
    unsafe fn add_i(a: I, b: I) -> I {
        both(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        both(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        both(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(x: I) -> I {
        each(x, |x| ((x as u32) << N) as i32)
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(x: I) -> I {
        each(x, |x| ((x as u32) >> N) as i32)
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], x: I) -> I {
        each(x, |x| i32::from_le_bytes(x.to_le_bytes().map(|b| table[(b & 15) as usize])))
    }
    #[inline(always)]
    unsafe fn dot(acc: I, w: I, a: I) -> I {
        std::array::from_fn(|i| {
            let (w, a) = (w[i].to_le_bytes(), a[i].to_le_bytes());
            (0..4).fold(acc[i], |sum, j| sum + i32::from(w[j]) * i32::from(a[j] as i8))
        })
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: I, w: I, a: I) -> I {
        std::array::from_fn(|i| {
            let (w, a) = (w[i].to_le_bytes(), a[i].to_le_bytes());
            let product = |j: usize| (i32::from(w[j]) - 128) * i32::from(a[j] as i8);
            (0..4).fold(acc[i], |sum, j| sum + product(j))
        })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
