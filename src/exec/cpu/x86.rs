//! The x86-64 instruction sets: AVX2 with FMA, AVX-VNNI, AVX-512 without and with VNNI.

#![allow(clippy::missing_safety_doc)]

use std::arch::x86_64::*;

use super::simd::Simd;

/// The part that does not depend on how bytes are multiplied, for 256-bit vectors.
macro_rules! simd_256 {
    () => {
        const LANES: usize = 8;
        // 16 registers: 4 accumulators, 4 sums, the weights of a block.
        const TILE: usize = 4;
        type F = __m256;
        type I = __m256i;

        #[inline(always)]
        unsafe fn f32(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: __m256) {
            unsafe { _mm256_storeu_ps(p, x) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn round(x: __m256) -> __m256i {
            unsafe { _mm256_cvtps_epi32(x) }
        }
        #[inline(always)]
        unsafe fn to_f32(x: __m256i) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(x) }
        }
        #[inline(always)]
        unsafe fn as_f32(x: __m256i) -> __m256 {
            unsafe { _mm256_castsi256_ps(x) }
        }
        #[inline(always)]
        unsafe fn i32(x: i32) -> __m256i {
            unsafe { _mm256_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn load_i(p: *const u8) -> __m256i {
            unsafe { _mm256_loadu_si256(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> __m256i {
            unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const u8) -> __m256i {
            unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_u16(p: *const u16) -> __m256i {
            unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store_bytes(p: *mut u8, x: __m256i) {
            unsafe {
                // Bytes 0, 4, 8, 12 of each half to its front.
                let front = _mm256_set1_epi32(0x0c08_0400);
                let x = _mm256_shuffle_epi8(x, front);
                let pair =
                    _mm_unpacklo_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
                _mm_storel_epi64(p.cast(), pair);
            }
        }
        #[inline(always)]
        unsafe fn add_i(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_and_si256(a, b) }
        }
        #[inline(always)]
        unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_or_si256(a, b) }
        }
        #[inline(always)]
        unsafe fn shl<const N: u32>(x: __m256i) -> __m256i {
            unsafe { _mm256_sll_epi32(x, _mm_cvtsi32_si128(N as i32)) }
        }
        #[inline(always)]
        unsafe fn shr<const N: u32>(x: __m256i) -> __m256i {
            unsafe { _mm256_srl_epi32(x, _mm_cvtsi32_si128(N as i32)) }
        }
        #[inline(always)]
        unsafe fn lookup(table: &[u8; 16], x: __m256i) -> __m256i {
            unsafe {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
                _mm256_shuffle_epi8(table, x)
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    };
}

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY of the bodies below: they are the trait's contract, passed on to the intrinsics.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    simd_256!();
    const UNSIGNED_WIDE: bool = false;

    #[inline(always)]
    unsafe fn dot(acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
        // Pairs are at most 2 * 63 * 127 < 2^15: they do not saturate.
        unsafe {
            let pairs = _mm256_maddubs_epi16(w, a);
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
        // |w| <= 128 as the unsigned factor and a with w's sign: pairs are at most
        // 2 * 128 * 127 < 2^15. (a is never -128, whose sign could not be changed.)
        unsafe {
            let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

/// AVX2 with the 256-bit dot product of AVX-VNNI.
#[derive(Clone, Copy)]
pub(super) struct AvxVnni;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for AvxVnni {
    simd_256!();
    const UNSIGNED_WIDE: bool = true;

    #[inline(always)]
    unsafe fn dot(acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_avx_epi32(acc, w, a) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_avx_epi32(acc, w, a) }
    }
}

macro_rules! simd_512 {
    () => {
        const LANES: usize = 16;
        // 32 registers: 8 accumulators, 8 sums, the weights of a block.
        const TILE: usize = 8;
        type F = __m512;
        type I = __m512i;

        #[inline(always)]
        unsafe fn f32(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: __m512) {
            unsafe { _mm512_storeu_ps(p, x) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn round(x: __m512) -> __m512i {
            unsafe { _mm512_cvtps_epi32(x) }
        }
        #[inline(always)]
        unsafe fn to_f32(x: __m512i) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(x) }
        }
        #[inline(always)]
        unsafe fn as_f32(x: __m512i) -> __m512 {
            unsafe { _mm512_castsi512_ps(x) }
        }
        #[inline(always)]
        unsafe fn i32(x: i32) -> __m512i {
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn load_i(p: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> __m512i {
            unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const u8) -> __m512i {
            unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_u16(p: *const u16) -> __m512i {
            unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store_bytes(p: *mut u8, x: __m512i) {
            unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(x)) }
        }
        #[inline(always)]
        unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_and_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_or_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn shl<const N: u32>(x: __m512i) -> __m512i {
            unsafe { _mm512_slli_epi32::<N>(x) }
        }
        #[inline(always)]
        unsafe fn shr<const N: u32>(x: __m512i) -> __m512i {
            unsafe { _mm512_srli_epi32::<N>(x) }
        }
        #[inline(always)]
        unsafe fn lookup(table: &[u8; 16], x: __m512i) -> __m512i {
            unsafe {
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                _mm512_shuffle_epi8(table, x)
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    };
}

/// AVX-512 F, BW and VL.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    simd_512!();
    const UNSIGNED_WIDE: bool = false;

    #[inline(always)]
    unsafe fn dot(acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
        unsafe {
            let pairs = _mm512_maddubs_epi16(w, a);
            _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
        // As for AVX2; a's sign is changed where w is negative (w = 0 has no say).
        unsafe {
            let w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
            let negative = _mm512_movepi8_mask(w);
            let a = _mm512_mask_sub_epi8(a, negative, _mm512_setzero_si512(), a);
            let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), a);
            _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
}

/// AVX-512 with its dot product of bytes.
#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512Vnni {
    simd_512!();
    const UNSIGNED_WIDE: bool = true;

    #[inline(always)]
    unsafe fn dot(acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, w, a) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, w, a) }
    }
}
