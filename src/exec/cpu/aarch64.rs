//! The 64-bit Arm instruction sets: NEON, NEON with the dot products of bytes, and with the
//! products of byte matrices (i8mm). A vector is a pair of registers.

#![allow(clippy::missing_safety_doc)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::simd::{PairSimd, Simd};

/// Applies an intrinsic to both registers.
macro_rules! each {
    ($f:path, $($x:expr),+) => {
        each!(@ $f, 0, 1, $($x),+)
    };
    (@ $f:path, $first:tt, $second:tt, $x:expr) => {
        ($f($x.$first), $f($x.$second))
    };
    (@ $f:path, $first:tt, $second:tt, $x:expr, $y:expr) => {
        ($f($x.$first, $y.$first), $f($x.$second, $y.$second))
    };
    (@ $f:path, $first:tt, $second:tt, $x:expr, $y:expr, $z:expr) => {
        ($f($x.$first, $y.$first, $z.$first), $f($x.$second, $y.$second, $z.$second))
    };
}

type F = (float32x4_t, float32x4_t);
type I = (int32x4_t, int32x4_t);

/// Four halves, widened. (The intrinsic's type is not stable.)
#[inline(always)]
unsafe fn widen_f16(x: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: an instruction of the base set, on registers alone.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// a where a > b, else b: as the other instruction sets have it, unlike NEON's own maximum.
#[inline(always)]
unsafe fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: registers alone.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

#[inline(always)]
unsafe fn smaller(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: registers alone.
    unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
}

/// Bytes with an offset of 128 as signed ones.
#[inline(always)]
unsafe fn signed(w: I) -> I {
    // SAFETY: registers alone.
    unsafe {
        let top = vdupq_n_s32(0x8080_8080_u32 as i32);
        each!(veorq_s32, w, (top, top))
    }
}

/// The part that does not depend on how bytes are multiplied.
macro_rules! simd_neon {
    () => {
        const LANES: usize = 8;
        // 32 registers: 4 pairs of accumulators, 4 pairs of sums, the weights of a group.
        const TILE: usize = 4;
        type F = F;
        type I = I;

        #[inline(always)]
        unsafe fn f32(x: f32) -> F {
            unsafe { (vdupq_n_f32(x), vdupq_n_f32(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> F {
            unsafe { (vld1q_f32(p), vld1q_f32(p.add(4))) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: F) {
            unsafe {
                vst1q_f32(p, x.0);
                vst1q_f32(p.add(4), x.1);
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> F {
            unsafe {
                let x = vld1q_u16(p);
                (widen_f16(vget_low_u16(x)), widen_f16(vget_high_u16(x)))
            }
        }
        #[inline(always)]
        unsafe fn add(a: F, b: F) -> F {
            unsafe { each!(vaddq_f32, a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: F, b: F) -> F {
            unsafe { each!(vsubq_f32, a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: F, b: F) -> F {
            unsafe { each!(vmulq_f32, a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: F, b: F) -> F {
            unsafe { each!(vdivq_f32, a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: F, b: F) -> F {
            unsafe { each!(larger, a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: F, b: F) -> F {
            unsafe { each!(smaller, a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: F, b: F, c: F) -> F {
            unsafe { each!(vfmaq_f32, c, a, b) }
        }
        #[inline(always)]
        unsafe fn round(x: F) -> I {
            unsafe { each!(vcvtnq_s32_f32, x) }
        }
        #[inline(always)]
        unsafe fn to_f32(x: I) -> F {
            unsafe { each!(vcvtq_f32_s32, x) }
        }
        #[inline(always)]
        unsafe fn as_f32(x: I) -> F {
            unsafe { each!(vreinterpretq_f32_s32, x) }
        }
        #[inline(always)]
        unsafe fn i32(x: i32) -> I {
            unsafe { (vdupq_n_s32(x), vdupq_n_s32(x)) }
        }
        #[inline(always)]
        unsafe fn load_i(p: *const u8) -> I {
            // (By bytes: the pointer need not be aligned to words.)
            unsafe { each!(vreinterpretq_s32_u8, (vld1q_u8(p), vld1q_u8(p.add(16)))) }
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> I {
            unsafe {
                let x = vmovl_u8(vld1_u8(p));
                let (low, high) = (vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x));
                each!(vreinterpretq_s32_u32, (low, high))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const u8) -> I {
            unsafe {
                let x = vmovl_s8(vld1_s8(p.cast()));
                (vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x))
            }
        }
        #[inline(always)]
        unsafe fn load_u16(p: *const u16) -> I {
            unsafe {
                let x = vld1q_u16(p);
                let (low, high) = (vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x));
                each!(vreinterpretq_s32_u32, (low, high))
            }
        }
        #[inline(always)]
        unsafe fn store_bytes(p: *mut u8, x: I) {
            unsafe {
                let words = vcombine_s16(vmovn_s32(x.0), vmovn_s32(x.1));
                vst1_s8(p.cast(), vmovn_s16(words));
            }
        }
        #[inline(always)]
        unsafe fn add_i(a: I, b: I) -> I {
            unsafe { each!(vaddq_s32, a, b) }
        }
        #[inline(always)]
        unsafe fn and(a: I, b: I) -> I {
            unsafe { each!(vandq_s32, a, b) }
        }
        #[inline(always)]
        unsafe fn or(a: I, b: I) -> I {
            unsafe { each!(vorrq_s32, a, b) }
        }
        #[inline(always)]
        unsafe fn shl<const N: u32>(x: I) -> I {
            unsafe {
                let by = vdupq_n_s32(N as i32);
                each!(vshlq_s32, x, (by, by))
            }
        }
        #[inline(always)]
        unsafe fn shr<const N: u32>(x: I) -> I {
            unsafe {
                // A shift to the left by a negative count.
                let by = vdupq_n_s32(-(N as i32));
                let x = each!(vreinterpretq_u32_s32, x);
                each!(vreinterpretq_s32_u32, each!(vshlq_u32, x, (by, by)))
            }
        }
        #[inline(always)]
        unsafe fn lookup(table: &[u8; 16], x: I) -> I {
            unsafe {
                let table = vld1q_u8(table.as_ptr());
                let x = each!(vreinterpretq_u8_s32, x);
                each!(vreinterpretq_s32_u8, each!(vqtbl1q_u8, (table, table), x))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe {
                asm!("prfm pldl2keep, [{0}]", in(reg) p,
                    options(readonly, nostack, preserves_flags));
            }
        }
    };
}

/// NEON alone.
#[derive(Clone, Copy)]
pub(super) struct Neon;

impl Neon {
    /// acc + the dot products of four signed bytes, lane by lane.
    #[inline(always)]
    unsafe fn dot(acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
        // SAFETY: registers alone. Each product fits 16 bits.
        unsafe {
            let (w, a) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)));
            let high = vpaddlq_s16(vmull_high_s8(w, a));
            vaddq_s32(acc, vpaddq_s32(low, high))
        }
    }
}

// SAFETY of the bodies below: they are the trait's contract, passed on to the intrinsics.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    simd_neon!();
    const UNSIGNED_WIDE: bool = false;

    #[inline(always)]
    unsafe fn dot(acc: I, w: I, a: I) -> I {
        unsafe { each!(Neon::dot, acc, w, a) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: I, w: I, a: I) -> I {
        unsafe { each!(Neon::dot, acc, signed(w), a) }
    }
}

/// NEON with SDOT. (The intrinsics of this and the next are not stable.)
#[derive(Clone, Copy)]
pub(super) struct Dotprod;

impl Dotprod {
    #[inline(always)]
    unsafe fn dot(mut acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
        // SAFETY: registers alone; the caller has the instruction.
        unsafe {
            asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) w, in(vreg) a,
                options(pure, nomem, nostack, preserves_flags));
        }
        acc
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Dotprod {
    simd_neon!();
    const UNSIGNED_WIDE: bool = false;

    #[inline(always)]
    unsafe fn dot(acc: I, w: I, a: I) -> I {
        unsafe { each!(Dotprod::dot, acc, w, a) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: I, w: I, a: I) -> I {
        unsafe { each!(Dotprod::dot, acc, signed(w), a) }
    }
}

/// NEON with USDOT and USMMLA.
#[derive(Clone, Copy)]
pub(super) struct I8mm;

impl I8mm {
    #[inline(always)]
    unsafe fn dot(mut acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
        // SAFETY: registers alone; the caller has the instruction.
        unsafe {
            asm!("usdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) w, in(vreg) a,
                options(pure, nomem, nostack, preserves_flags));
        }
        acc
    }

    /// acc + the products of two rows of eight unsigned bytes with two of signed ones.
    #[inline(always)]
    unsafe fn matrix(mut acc: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
        // SAFETY: registers alone; the caller has the instruction.
        unsafe {
            asm!("usmmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) w, in(vreg) a,
                options(pure, nomem, nostack, preserves_flags));
        }
        acc
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for I8mm {
    simd_neon!();
    const UNSIGNED_WIDE: bool = true;

    #[inline(always)]
    unsafe fn dot(acc: I, w: I, a: I) -> I {
        unsafe { each!(I8mm::dot, acc, w, a) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: I, w: I, a: I) -> I {
        unsafe { each!(I8mm::dot, acc, w, a) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl PairSimd for I8mm {
    /// Weight rows (0, 1) and (2, 3), then (4, 5) and (6, 7), eight columns of each.
    type Eight = (I, I);
    /// For those pairs of weight rows: first row by a, by b, second row by a, by b.
    type Pair = (I, I);

    #[inline(always)]
    unsafe fn eight(first: I, second: I) -> (I, I) {
        unsafe {
            let rows_0_to_3 = (vzip1q_s32(first.0, second.0), vzip2q_s32(first.0, second.0));
            let rows_4_to_7 = (vzip1q_s32(first.1, second.1), vzip2q_s32(first.1, second.1));
            (rows_0_to_3, rows_4_to_7)
        }
    }
    #[inline(always)]
    unsafe fn pair(a: i32, b: i32) -> (I, I) {
        unsafe {
            let x = vzip1q_s32(vdupq_n_s32(a), vdupq_n_s32(b));
            ((x, x), (x, x))
        }
    }
    #[inline(always)]
    unsafe fn dot_pair(acc: (I, I), w: (I, I), first: *const u32, second: *const u32) -> (I, I) {
        unsafe {
            let (first, second) = (vld1_u32(first), vld1_u32(second));
            let x = vcombine_u32(vzip1_u32(first, second), vzip2_u32(first, second));
            let x = vreinterpretq_s32_u32(x);
            (each!(I8mm::matrix, acc.0, w.0, (x, x)), each!(I8mm::matrix, acc.1, w.1, (x, x)))
        }
    }
    #[inline(always)]
    unsafe fn split(acc: (I, I)) -> [I; 2] {
        unsafe {
            let ((m0, m1), (m2, m3)) = acc;
            [(vuzp1q_s32(m0, m1), vuzp1q_s32(m2, m3)), (vuzp2q_s32(m0, m1), vuzp2q_s32(m2, m3))]
        }
    }
}
