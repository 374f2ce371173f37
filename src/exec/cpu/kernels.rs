//! The kernels of each instruction set, and which of them this machine runs.

use std::fmt;
use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use super::aarch64;
use super::attention::{self, Attention, Scratch};
use super::cache::{Block, Half};
#[cfg(target_arch = "aarch64")]
use super::matmul::InPairs;
use super::matmul::{self, ActivationLayout, Kernel, Singly};
use super::panel::{Format, match_format};
use super::probe;
use super::simd::{Scalar, Simd, exp, sum_lanes};
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::error::{Error, Result};
use crate::graph::{Activation, Gating};
use crate::quant::BlockType;

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// No vector instructions beyond the target's baseline: the reference.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
    /// NEON.
    Neon,
    /// NEON with the dot products of bytes.
    Dotprod,
    /// NEON with the products of byte matrices.
    I8mm,
}

impl Isa {
    /// All, for each processor family from the plainest to the best.
    pub const ALL: [Isa; 8] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Neon,
        Isa::Dotprod,
        Isa::I8mm,
    ];

    /// Its name, as `MTAD_CPU` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Neon => "neon",
            Isa::Dotprod => "dotprod",
            Isa::I8mm => "i8mm",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match self {
                Isa::Scalar => true,
                Isa::Avx2 => avx2,
                Isa::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
                Isa::Avx512 => avx512,
                Isa::Avx512Vnni => avx512 && is_x86_feature_detected!("avx512vnni"),
                _ => false,
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected;
            let neon = is_aarch64_feature_detected!("neon");
            let dotprod = neon && is_aarch64_feature_detected!("dotprod");
            match self {
                Isa::Scalar => true,
                Isa::Neon => neon,
                Isa::Dotprod => dotprod,
                Isa::I8mm => dotprod && is_aarch64_feature_detected!("i8mm"),
                _ => false,
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            self == Isa::Scalar
        }
    }

    fn available() -> impl DoubleEndedIterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The best of this machine.
    pub fn best() -> Isa {
        Self::available().next_back().unwrap_or(Isa::Scalar)
    }

    /// The one that the environment variable `MTAD_CPU` names, if it is set.
    ///
    /// # Errors
    /// `MTAD_CPU` names one that is unknown or that this machine lacks.
    pub fn from_env() -> Result<Option<Isa>> {
        let names = || Self::available().map(Isa::name).collect::<Vec<_>>().join(", ");
        match std::env::var("MTAD_CPU") {
            Err(_) => Ok(None),
            Ok(name) => {
                Self::available().find(|isa| isa.name() == name).map(Some).ok_or_else(|| {
                    Error::invalid(format!("MTAD_CPU={name}: this machine runs {}", names()))
                })
            }
        }
    }

    pub(super) fn kernels(self) -> &'static Kernels {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &avxvnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &avx512vnni::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Dotprod => &dotprod::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm => &i8mm::KERNELS,
            _ => &scalar::KERNELS,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Function pointers to the kernels of one instruction set.
///
/// Calling any of them is sound only on a machine that has it; [`Isa::is_available`] says so.
pub(super) struct Kernels {
    /// The matrix kernels of a type.
    pub matmul: fn(BlockType) -> matmul::Kernels,
    /// [`matmul::quantize_activations`].
    pub quantize_activations: unsafe fn(ActivationLayout, &[f32], &mut [u32], usize, usize),
    /// [`rms_norm`].
    pub rms_norm: unsafe fn(&[f32], usize, &[f32], f32, &mut [f32]),
    /// [`layer_norm`].
    pub layer_norm: unsafe fn(&[f32], usize, &LayerNorm<'_>, &mut [f32]),
    /// [`gate`].
    pub gate: unsafe fn(Gating, &mut [f32], &[f32]),
    /// [`activate`].
    pub activate: unsafe fn(Activation, &mut [f32]),
    /// [`soft_cap`].
    pub soft_cap: unsafe fn(&mut [f32], f32),
    /// [`attention::attend`] for the two cache types.
    pub attend_f16: unsafe fn(&Attention<'_>, &[Block<Half>], Range<usize>, &mut Scratch),
    pub attend_f32: unsafe fn(&Attention<'_>, &[Block<f32>], Range<usize>, &mut Scratch),
    /// [`probe::read`].
    pub read: unsafe fn(&[u64]) -> i32,
    /// [`probe::multiply`], and the lanes that it does it with.
    pub products: unsafe fn(usize, i32) -> i32,
    pub lanes: usize,
}

/// One row of RMSNorm over `width` elements; the slices are padded with zeros to vectors.
#[inline(always)]
unsafe fn rms_norm<S: Simd>(
    x: &[f32],
    width: usize,
    weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
) {
    assert!(x.len() == weight.len() && x.len() == out.len() && x.len().is_multiple_of(16));
    // SAFETY: all three are x.len() long, a multiple of every vector.
    unsafe {
        let mut squares = S::f32(0.0);
        for i in (0..x.len()).step_by(S::LANES) {
            let v = S::load(x.as_ptr().add(i));
            squares = S::fma(v, v, squares);
        }
        let mean = sum_lanes::<S>(squares) / width as f32;
        let scale = S::f32(1.0 / (mean + epsilon).sqrt());
        for i in (0..x.len()).step_by(S::LANES) {
            let v = S::mul(S::load(x.as_ptr().add(i)), scale);
            S::store(out.as_mut_ptr().add(i), S::mul(v, S::load(weight.as_ptr().add(i))));
        }
    }
}

/// What a LayerNorm multiplies with and adds; the slices are padded with zeros to vectors.
#[derive(Clone, Copy)]
pub(super) struct LayerNorm<'a> {
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub epsilon: f32,
}

/// One row of LayerNorm over `width` elements; the slices are padded with zeros to vectors.
#[inline(always)]
unsafe fn layer_norm<S: Simd>(x: &[f32], width: usize, norm: &LayerNorm<'_>, out: &mut [f32]) {
    let LayerNorm { weight, bias, epsilon } = *norm;
    assert!(x.len() == weight.len() && x.len() == bias.len() && x.len() == out.len());
    assert!(x.len().is_multiple_of(16));
    // SAFETY: all four are x.len() long, a multiple of every vector.
    unsafe {
        let mut sums = S::f32(0.0);
        for i in (0..x.len()).step_by(S::LANES) {
            sums = S::add(sums, S::load(x.as_ptr().add(i)));
        }
        let mean = S::f32(sum_lanes::<S>(sums) / width as f32);
        for i in (0..x.len()).step_by(S::LANES) {
            S::store(out.as_mut_ptr().add(i), S::sub(S::load(x.as_ptr().add(i)), mean));
        }
        // What pads the row is not part of it.
        out[width..].fill(0.0);
        let mut squares = S::f32(0.0);
        for i in (0..x.len()).step_by(S::LANES) {
            let v = S::load(out.as_ptr().add(i));
            squares = S::fma(v, v, squares);
        }
        let variance = sum_lanes::<S>(squares) / width as f32;
        let scale = S::f32(1.0 / (variance + epsilon).sqrt());
        for i in (0..x.len()).step_by(S::LANES) {
            let v = S::mul(S::load(out.as_ptr().add(i)), scale);
            let (w, b) = (S::load(weight.as_ptr().add(i)), S::load(bias.as_ptr().add(i)));
            S::store(out.as_mut_ptr().add(i), S::fma(v, w, b));
        }
    }
}

/// gate = gated up, elementwise.
#[inline(always)]
unsafe fn gate<S: Simd>(gating: Gating, gate: &mut [f32], up: &[f32]) {
    assert!(gate.len() == up.len() && gate.len().is_multiple_of(16));
    for i in (0..gate.len()).step_by(S::LANES) {
        // SAFETY: both are gate.len() long, a multiple of every vector.
        unsafe {
            let at = gate.as_mut_ptr().add(i);
            let (g, u) = (S::load(at), S::load(up.as_ptr().add(i)));
            let gated = match gating {
                Gating::Activated(activation) => S::mul(activated::<S>(activation, g), u),
                Gating::Clamped { alpha, limit } => {
                    let (g, most) = (S::min(g, S::f32(limit)), S::f32(limit));
                    let u = S::min(S::max(u, S::f32(-limit)), most);
                    S::mul(sigmoid_times::<S>(g, S::f32(alpha)), S::add(u, S::f32(1.0)))
                }
            };
            S::store(at, gated);
        }
    }
}

/// x = f(x), elementwise.
#[inline(always)]
unsafe fn activate<S: Simd>(activation: Activation, x: &mut [f32]) {
    assert!(x.len().is_multiple_of(16));
    for i in (0..x.len()).step_by(S::LANES) {
        // SAFETY: x.len() is a multiple of every vector.
        unsafe {
            let at = x.as_mut_ptr().add(i);
            S::store(at, activated::<S>(activation, S::load(at)));
        }
    }
}

/// x / (1 + exp(-alpha x)).
#[inline(always)]
unsafe fn sigmoid_times<S: Simd>(x: S::F, alpha: S::F) -> S::F {
    // SAFETY: the caller's; no memory is touched.
    unsafe {
        let e = exp::<S>(S::sub(S::f32(0.0), S::mul(x, alpha)));
        S::div(x, S::add(S::f32(1.0), e))
    }
}

#[inline(always)]
unsafe fn activated<S: Simd>(activation: Activation, x: S::F) -> S::F {
    // SAFETY: the caller's; arrays are as wide as any vector.
    unsafe {
        match activation {
            // (What is not a number stays so: vectors' maximum would make it 0.)
            Activation::Relu => {
                let mut lanes = [0f32; 16];
                S::store(lanes.as_mut_ptr(), x);
                lanes.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = 0.0);
                S::load(lanes.as_ptr())
            }
            Activation::Silu => {
                let e = exp::<S>(S::sub(S::f32(0.0), x));
                S::div(x, S::add(S::f32(1.0), e))
            }
            // (1 + tanh(u)) / 2 is the sigmoid of 2u.
            Activation::GeluTanh => {
                let cubic = S::mul(S::mul(x, x), S::f32(0.044_715));
                let alpha = S::mul(S::add(cubic, S::f32(1.0)), S::f32(1.595_769));
                sigmoid_times::<S>(x, alpha)
            }
            Activation::Gelu => {
                let half = S::mul(x, S::f32(0.5));
                S::fma(half, erf::<S>(S::mul(x, S::f32(std::f32::consts::FRAC_1_SQRT_2))), half)
            }
        }
    }
}

/// erf(x) within 2e-7 (Abramowitz and Stegun 1964, 7.1.26).
#[inline(always)]
unsafe fn erf<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's; arrays are as wide as any vector.
    unsafe {
        let magnitude = S::max(x, S::sub(S::f32(0.0), x));
        let t = S::div(S::f32(1.0), S::fma(S::f32(0.327_591_1), magnitude, S::f32(1.0)));
        let mut sum = S::f32(1.061_405_4);
        for c in [-1.453_152, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            sum = S::fma(sum, t, S::f32(c));
        }
        let e = exp::<S>(S::sub(S::f32(0.0), S::mul(magnitude, magnitude)));
        let positive = S::sub(S::f32(1.0), S::mul(S::mul(sum, t), e));
        let (mut lanes, mut signs) = ([0f32; 16], [0f32; 16]);
        S::store(lanes.as_mut_ptr(), positive);
        S::store(signs.as_mut_ptr(), x);
        lanes.iter_mut().zip(signs).for_each(|(lane, sign)| *lane = lane.copysign(sign));
        S::load(lanes.as_ptr())
    }
}

/// x = cap * tanh(x / cap), elementwise.
#[inline(always)]
unsafe fn soft_cap<S: Simd>(x: &mut [f32], cap: f32) {
    assert!(x.len().is_multiple_of(16));
    for i in (0..x.len()).step_by(S::LANES) {
        // SAFETY: x.len() is a multiple of every vector.
        unsafe {
            let at = x.as_mut_ptr().add(i);
            S::store(at, attention::soft_cap::<S>(S::load(at), cap));
        }
    }
}

/// Compiles the kernels for one instruction set, in a module of its own.
macro_rules! compile {
    ($module:ident, $simd:ty, $products:ty, [$($n:literal)*] $(, $features:literal)?) => {
        mod $module {
            use super::*;

            /// # Safety
            /// The machine has the instruction set, and [`matmul::quantized`]'s.
            $(#[target_feature(enable = $features)])?
            unsafe fn quantized<F: Format, const N: usize>(a: &matmul::Args) {
                // SAFETY: the caller's.
                unsafe { matmul::quantized::<$simd, $products, F, N>(a) }
            }

            /// # Safety
            /// The machine has the instruction set, and [`matmul::float`]'s.
            $(#[target_feature(enable = $features)])?
            unsafe fn float<W: matmul::FloatWeights, const N: usize>(a: &matmul::Args) {
                // SAFETY: the caller's.
                unsafe { matmul::float::<$simd, W, N>(a) }
            }

            fn for_format<F: Format>() -> matmul::Kernels {
                let by_rows: &[Kernel] = const { &[$(quantized::<F, $n>),*] };
                matmul::Kernels { by_rows, form: ActivationLayout::of::<$simd, F>() }
            }

            fn for_float<W: matmul::FloatWeights>() -> matmul::Kernels {
                let by_rows: &[Kernel] = const { &[$(float::<W, $n>),*] };
                matmul::Kernels { by_rows, form: ActivationLayout::Float }
            }

            fn matmul(block_type: BlockType) -> matmul::Kernels {
                match block_type {
                    BlockType::F32 => for_float::<matmul::F32>(),
                    BlockType::F16 => for_float::<matmul::F16>(),
                    BlockType::BF16 => for_float::<matmul::Bf16>(),
                    _ => match_format!(
                        block_type,
                        F => for_format::<F>(),
                        _ => unreachable!("{block_type} was refused when it was packed")
                    ),
                }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn quantize_activations(form: ActivationLayout, x: &[f32], tile: &mut [u32], r: usize, n: usize) {
                // SAFETY: the caller's.
                unsafe { matmul::quantize_activations::<$simd>(form, x, tile, r, n) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(x: &[f32], width: usize, w: &[f32], epsilon: f32, out: &mut [f32]) {
                // SAFETY: the caller's.
                unsafe { super::rms_norm::<$simd>(x, width, w, epsilon, out) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn layer_norm(x: &[f32], width: usize, norm: &LayerNorm<'_>, out: &mut [f32]) {
                // SAFETY: the caller's.
                unsafe { super::layer_norm::<$simd>(x, width, norm, out) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn gate(gating: Gating, gate: &mut [f32], up: &[f32]) {
                // SAFETY: the caller's.
                unsafe { super::gate::<$simd>(gating, gate, up) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn activate(activation: Activation, x: &mut [f32]) {
                // SAFETY: the caller's.
                unsafe { super::activate::<$simd>(activation, x) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn soft_cap(x: &mut [f32], cap: f32) {
                // SAFETY: the caller's.
                unsafe { super::soft_cap::<$simd>(x, cap) }
            }

            /// # Safety
            /// The machine has the instruction set, and [`attention::attend`]'s.
            $(#[target_feature(enable = $features)])?
            unsafe fn attend_f16(
                a: &Attention<'_>,
                l: &[Block<Half>],
                heads: Range<usize>,
                s: &mut Scratch,
            ) {
                // SAFETY: the caller's.
                unsafe { attention::attend::<$simd, Half>(a, l, heads, s) }
            }

            /// # Safety
            /// The machine has the instruction set, and [`attention::attend`]'s.
            $(#[target_feature(enable = $features)])?
            unsafe fn attend_f32(
                a: &Attention<'_>,
                l: &[Block<f32>],
                heads: Range<usize>,
                s: &mut Scratch,
            ) {
                // SAFETY: the caller's.
                unsafe { attention::attend::<$simd, f32>(a, l, heads, s) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn read(data: &[u64]) -> i32 {
                // SAFETY: the caller's.
                unsafe { probe::read::<$simd>(data) }
            }

            /// # Safety
            /// The machine has the instruction set.
            $(#[target_feature(enable = $features)])?
            unsafe fn products(rounds: usize, seed: i32) -> i32 {
                // SAFETY: the caller's.
                unsafe { probe::multiply::<$simd>(rounds, seed) }
            }

            pub(super) static KERNELS: Kernels = Kernels {
                matmul,
                quantize_activations,
                rms_norm,
                layer_norm,
                gate,
                activate,
                soft_cap,
                attend_f16,
                attend_f32,
                read,
                products,
                lanes: <$simd as Simd>::LANES,
            };

            const _: () = assert!([$($n),*].len() == <$simd as Simd>::TILE);
        }
    };
}

compile!(scalar, Scalar, Singly, [1 2 3 4]);
#[cfg(target_arch = "x86_64")]
compile!(avx2, x86::Avx2, Singly, [1 2 3 4], "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
compile!(avxvnni, x86::AvxVnni, Singly, [1 2 3 4], "avx2,fma,f16c,avxvnni");
#[cfg(target_arch = "x86_64")]
compile!(avx512, x86::Avx512, Singly, [1 2 3 4 5 6 7 8], "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl");
#[cfg(target_arch = "x86_64")]
compile!(
    avx512vnni,
    x86::Avx512Vnni,
    Singly,
    [1 2 3 4 5 6 7 8],
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
);
#[cfg(target_arch = "aarch64")]
compile!(neon, aarch64::Neon, Singly, [1 2 3 4], "neon");
#[cfg(target_arch = "aarch64")]
compile!(dotprod, aarch64::Dotprod, Singly, [1 2 3 4], "neon,dotprod");
#[cfg(target_arch = "aarch64")]
compile!(i8mm, aarch64::I8mm, InPairs, [1 2 3 4], "neon,dotprod,i8mm");
