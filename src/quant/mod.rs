//! Block formats: how GGUF stores weights, and the scalar truth about what they mean.
//!
//! A row of weights is a sequence of *blocks*; a block holds [`BlockType::block_len`] weights in
//! [`BlockType::block_bytes`] bytes. [`BlockType::dequantize`] turns blocks into `f32` exactly as
//! ggml's reference does, and every kernel is tested against it; [`BlockType::quantize`] is the other
//! direction. A [`Recipe`] says which type each tensor of a model gets.

mod fit;
mod floats;
mod k_quants;
mod legacy;
mod pack;
mod quantize;
mod recipe;

use std::fmt;

pub use k_quants::SuperScales;
pub use recipe::{Chosen, ModelFacts, Recipe};

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

    /// Weights that share a scale (and a minimum); 1 for the types that have none.
    pub fn scale_len(self) -> usize {
        use BlockType::*;
        match self {
            Q2_K | Q3_K | Q6_K => 16,
            _ if self.is_float() => 1,
            _ => 32,
        }
    }

    /// What is subtracted from a value of [`BlockType::values`] before it is scaled; the IQ4
    /// types look their nibbles up in [`IQ4_VALUES`] instead.
    pub fn offset(self) -> u8 {
        use BlockType::*;
        match self {
            Q3_K => 4,
            Q4_0 => 8,
            Q5_0 => 16,
            Q6_K => 32,
            Q8_0 => 128,
            _ => 0,
        }
    }

    /// Where the f16 scales of a quantized block lie, in bytes from its start.
    pub fn scale_offsets(self) -> &'static [usize] {
        use BlockType::*;
        match self {
            Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
            Q2_K => &[80, 82],
            Q3_K => &[108],
            Q6_K => &[208],
            _ if self.is_float() => &[],
            _ => &[0],
        }
    }

    /// The stored integers of one block of a quantized type, unsigned and in order of column.
    ///
    /// # Panics
    /// If the type is not quantized or not readable, or a length is not a block's.
    pub fn values(self, block: &[u8], values: &mut [u8]) {
        assert_eq!((block.len(), values.len()), (self.block_bytes(), self.block_len()));
        match self {
            BlockType::Q4_0 | BlockType::IQ4_NL => legacy::q4_0(block, values),
            BlockType::Q4_1 => legacy::q4_1(block, values),
            BlockType::Q5_0 => legacy::q5_0(block, values),
            BlockType::Q5_1 => legacy::q5_1(block, values),
            BlockType::Q8_0 => legacy::q8_0(block, values),
            BlockType::Q2_K => k_quants::q2_k(block, values),
            BlockType::Q3_K => k_quants::q3_k(block, values),
            BlockType::Q4_K => k_quants::q4_k(block, values),
            BlockType::Q5_K => k_quants::q5_k(block, values),
            BlockType::Q6_K => k_quants::q6_k(block, values),
            BlockType::IQ4_XS => {
                for (bytes, q) in block[8..].chunks_exact(16).zip(values.chunks_exact_mut(32)) {
                    legacy::nibbles(bytes, q);
                }
            }
            _ => panic!("{self} has no values that can be read"),
        }
    }

    /// The scales of one super-block of a type that has them.
    ///
    /// # Panics
    /// If the type has no super-blocks or is not readable.
    pub fn super_scales(self, block: &[u8]) -> SuperScales {
        match self {
            BlockType::Q2_K => k_quants::q2_k_scales(block),
            BlockType::Q3_K => k_quants::q3_k_scales(block),
            BlockType::Q4_K | BlockType::Q5_K => k_quants::q45_k_scales(block),
            BlockType::Q6_K => k_quants::q6_k_scales(block),
            BlockType::IQ4_XS => k_quants::iq4_xs_scales(block),
            _ => panic!("{self} has no super-blocks"),
        }
    }

    /// Decodes whole blocks: `out.len()` weights from `blocks`.
    ///
    /// # Panics
    /// If the lengths do not fit each other, or the type is not [`BlockType::READABLE`].
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let (len, bytes) = (self.block_len(), self.block_bytes());
        assert!(
            out.len().is_multiple_of(len) && blocks.len() == out.len() / len * bytes,
            "{self}: {} weights in {} bytes",
            out.len(),
            blocks.len()
        );
        match self {
            BlockType::F32 => return floats::f32s(blocks, out),
            BlockType::F16 => return floats::f16s(blocks, out),
            BlockType::BF16 => return floats::bf16s(blocks, out),
            _ => {}
        }
        let mut values = [0; 256];
        let values = &mut values[..len];
        let meaning: [f32; 256] = self.meaning();
        for (block, out) in blocks.chunks_exact(bytes).zip(out.chunks_exact_mut(len)) {
            self.values(block, values);
            let q = values.iter().map(|&q| meaning[q as usize]);
            if len == 256 {
                k_quants::dequantize(&self.super_scales(block), q, out, self.scale_len());
            } else {
                let has_minimum = matches!(self, BlockType::Q4_1 | BlockType::Q5_1);
                let (d, m) = legacy::scales(block, has_minimum);
                out.iter_mut().zip(q).for_each(|(x, q)| *x = d * q + m);
            }
        }
    }

    /// The number that each value stands for before it is scaled.
    fn meaning(self) -> [f32; 256] {
        let nonlinear = matches!(self, BlockType::IQ4_NL | BlockType::IQ4_XS);
        std::array::from_fn(|q| match nonlinear {
            true => f32::from(IQ4_VALUES[q % 16]),
            false => q as f32 - f32::from(self.offset()),
        })
    }
}

/// What a nibble of the IQ4 types stands for.
pub const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The `f16` at the start of `bytes`, widened.
pub(crate) fn f16_at(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}
