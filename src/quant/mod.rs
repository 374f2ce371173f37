//! Block formats: how GGUF stores weights, and the scalar truth about what they mean.
//!
//! A row of weights is a sequence of *blocks*; a block holds [`BlockType::block_len`] weights in
//! [`BlockType::block_bytes`] bytes. [`BlockType::dequantize`] turns blocks into `f32` exactly as
//! ggml's reference does, and every kernel is tested against it. Speed is of no concern here.

mod floats;
mod k_quants;
mod legacy;
mod nonlinear;

use std::fmt;

pub use k_quants::{k4_scale_min, q3_k_scales};
pub use legacy::{quantize_q4_0, quantize_q8_0};
pub use nonlinear::IQ4_VALUES;

/// The element types of ggml, with the numbers that GGUF gives them.
///
/// All are known by size, so that any file can be listed; [`BlockType::can_dequantize`] says
/// which can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
#[repr(u32)]
pub enum BlockType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
}

/// (type, name, weights in a block, bytes of a block)
const TABLE: &[(BlockType, &str, usize, usize)] = {
    use BlockType::*;
    &[
        (F32, "F32", 1, 4),
        (F16, "F16", 1, 2),
        (Q4_0, "Q4_0", 32, 18),
        (Q4_1, "Q4_1", 32, 20),
        (Q5_0, "Q5_0", 32, 22),
        (Q5_1, "Q5_1", 32, 24),
        (Q8_0, "Q8_0", 32, 34),
        (Q8_1, "Q8_1", 32, 36),
        (Q2_K, "Q2_K", 256, 84),
        (Q3_K, "Q3_K", 256, 110),
        (Q4_K, "Q4_K", 256, 144),
        (Q5_K, "Q5_K", 256, 176),
        (Q6_K, "Q6_K", 256, 210),
        (Q8_K, "Q8_K", 256, 292),
        (IQ2_XXS, "IQ2_XXS", 256, 66),
        (IQ2_XS, "IQ2_XS", 256, 74),
        (IQ3_XXS, "IQ3_XXS", 256, 98),
        (IQ1_S, "IQ1_S", 256, 50),
        (IQ4_NL, "IQ4_NL", 32, 18),
        (IQ3_S, "IQ3_S", 256, 110),
        (IQ2_S, "IQ2_S", 256, 82),
        (IQ4_XS, "IQ4_XS", 256, 136),
        (I8, "I8", 1, 1),
        (I16, "I16", 1, 2),
        (I32, "I32", 1, 4),
        (I64, "I64", 1, 8),
        (F64, "F64", 1, 8),
        (IQ1_M, "IQ1_M", 256, 56),
        (BF16, "BF16", 1, 2),
        (TQ1_0, "TQ1_0", 256, 54),
        (TQ2_0, "TQ2_0", 256, 66),
        (MXFP4, "MXFP4", 32, 17),
    ]
};

impl BlockType {
    /// The types that [`BlockType::dequantize`] reads.
    pub const READABLE: [BlockType; 15] = {
        use BlockType::*;
        [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS]
    };

    fn row(self) -> &'static (BlockType, &'static str, usize, usize) {
        let row = TABLE.iter().find(|row| row.0 == self);
        row.expect("the table has every type")
    }

    /// The type with GGUF's number `id`.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().map(|row| row.0).find(|&t| t as u32 == id)
    }

    /// GGUF's number for it.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The type called `name` (`Q4_0`, in any case).
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Weights in a block.
    pub fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Whether the weights are stored as floating-point numbers, one by one.
    pub fn is_float(self) -> bool {
        matches!(self, BlockType::F32 | BlockType::F16 | BlockType::BF16)
    }

    /// Whether [`BlockType::dequantize`] reads it.
    pub fn can_dequantize(self) -> bool {
        Self::READABLE.contains(&self)
    }

    /// Decodes whole blocks: `out.len()` weights from `blocks`.
    ///
    /// # Panics
    /// If the lengths do not fit each other, or the type is not [`BlockType::READABLE`].
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let (len, bytes) = (self.block_len(), self.block_bytes());
        assert!(
            out.len() % len == 0 && blocks.len() == out.len() / len * bytes,
            "{self}: {} weights in {} bytes",
            out.len(),
            blocks.len()
        );
        let one: fn(&[u8], &mut [f32]) = match self {
            BlockType::F32 => return floats::f32s(blocks, out),
            BlockType::F16 => return floats::f16s(blocks, out),
            BlockType::BF16 => return floats::bf16s(blocks, out),
            BlockType::Q4_0 => legacy::q4_0,
            BlockType::Q4_1 => legacy::q4_1,
            BlockType::Q5_0 => legacy::q5_0,
            BlockType::Q5_1 => legacy::q5_1,
            BlockType::Q8_0 => legacy::q8_0,
            BlockType::Q2_K => k_quants::q2_k,
            BlockType::Q3_K => k_quants::q3_k,
            BlockType::Q4_K => k_quants::q4_k,
            BlockType::Q5_K => k_quants::q5_k,
            BlockType::Q6_K => k_quants::q6_k,
            BlockType::IQ4_NL => nonlinear::iq4_nl,
            BlockType::IQ4_XS => nonlinear::iq4_xs,
            _ => panic!("{self} cannot be dequantized"),
        };
        for (block, out) in blocks.chunks_exact(bytes).zip(out.chunks_exact_mut(len)) {
            one(block, out);
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The `f16` at the start of `bytes`, widened.
pub(crate) fn f16_at(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}
