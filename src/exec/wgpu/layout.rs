//! How the rows of a matrix lie on the device: the bytes of the file, in another order.
//!
//! Threads side by side read 16 bytes each, which a device does best where these lie side by side and begin
//! at a multiple of 16. Blocks of a file are 18 bytes or 34 or 210. So a row begins with one part of all
//! of its blocks, such as their nibbles, then the next part follows, such as their scales.

use std::borrow::Cow;

use crate::gguf::Tensor;
use crate::quant::BlockType;

/// Rows begin at multiples of so many bytes.
const ALIGNMENT: usize = 16;

/// Weights that a thread takes at a time: rows of floats are filled up to a multiple.
const CHUNK: usize = 32;

/// The parts of a block, in the order of their planes: where each begins, and its bytes.
fn parts(block: BlockType) -> &'static [(usize, usize)] {
    match block {
        BlockType::Q4_0 | BlockType::IQ4_NL => &[(2, 16), (0, 2)],
        BlockType::Q4_1 => &[(4, 16), (0, 4)],
        BlockType::Q5_0 => &[(6, 16), (2, 4), (0, 2)],
        BlockType::Q5_1 => &[(8, 16), (0, 8)],
        BlockType::Q8_0 => &[(2, 32), (0, 2)],
        BlockType::Q2_K => &[(16, 64), (0, 16), (80, 4)],
        BlockType::Q3_K => &[(32, 64), (0, 32), (96, 12), (108, 2)],
        BlockType::Q6_K => &[(0, 128), (128, 64), (192, 16), (208, 2)],
        BlockType::IQ4_XS => &[(8, 128), (0, 8)],
        // Q4_K and Q5_K have blocks of 144 and 176 bytes that begin with what belongs together; floats
        // are blocks of one.
        _ => &[],
    }
}

/// The layout of the rows of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    block: BlockType,
    /// Bytes of a row in the file.
    row: usize,
    /// Bytes from one row to the next on the device.
    pub stride: usize,
}

impl Layout {
    pub fn of(tensor: &Tensor<'_>) -> Self {
        let (block, row) = (tensor.block_type, tensor.row_bytes());
        let whole = if block.is_float() { CHUNK * block.block_bytes() } else { ALIGNMENT };
        Layout { block, row, stride: row.next_multiple_of(whole) }
    }

    /// Rows of the file as they lie on the device.
    pub fn arranged<'a>(&self, rows: &'a [u8]) -> Cow<'a, [u8]> {
        let parts = parts(self.block);
        if parts.is_empty() && self.stride == self.row {
            return rows.into();
        }
        let mut out = vec![0; rows.len() / self.row * self.stride];
        for (row, out) in rows.chunks_exact(self.row).zip(out.chunks_exact_mut(self.stride)) {
            if parts.is_empty() {
                out[..self.row].copy_from_slice(row);
            }
            let mut out = out;
            for &(first, bytes) in parts {
                let plane;
                (plane, out) = out.split_at_mut(row.len() / self.block.block_bytes() * bytes);
                let blocks = row.chunks_exact(self.block.block_bytes());
                for (block, out) in blocks.zip(plane.chunks_exact_mut(bytes)) {
                    let part = &block[first..][..bytes];
                    // (Short copies of a known length are much faster.)
                    match bytes {
                        2 => out[..2].copy_from_slice(&part[..2]),
                        4 => out[..4].copy_from_slice(&part[..4]),
                        16 => out[..16].copy_from_slice(&part[..16]),
                        32 => out[..32].copy_from_slice(&part[..32]),
                        _ => out.copy_from_slice(part),
                    }
                }
            }
        }
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_block_are_the_whole_block() {
        for block in BlockType::READABLE {
            let mut parts = parts(block).to_vec();
            parts.sort_unstable();
            let mut end = 0;
            for (first, bytes) in &parts {
                assert_eq!(*first, end, "{block}");
                end += bytes;
            }
            assert!(parts.is_empty() || end == block.block_bytes(), "{block}");
        }
    }

    #[test]
    fn rows_are_arranged_by_parts_and_filled_up() {
        let tensor = |block_type, cols, bytes| Tensor {
            file: "",
            name: "",
            cols,
            rows: 2,
            block_type,
            bytes,
        };
        let bytes: Vec<u8> = (0..2 * 3 * 18).collect();
        let layout = Layout::of(&tensor(BlockType::Q4_0, 96, &bytes));
        assert_eq!(layout.stride, 64);
        let out = layout.arranged(&bytes);
        let block = |first: u8, len: u8| (first..first + len).collect::<Vec<_>>();
        let row = |at: u8| {
            let nibbles = [block(at + 2, 16), block(at + 20, 16), block(at + 38, 16)].concat();
            let scales = [at, at + 1, at + 18, at + 19, at + 36, at + 37];
            [&nibbles[..], &scales, &[0; 10]].concat()
        };
        assert_eq!(*out, [row(0), row(54)].concat());
        let bytes = [7; 2 * 2 * 33];
        let layout = Layout::of(&tensor(BlockType::F16, 33, &bytes));
        assert_eq!(layout.stride, 128);
        assert_eq!(layout.arranged(&bytes)[..], [[7; 66].to_vec(), vec![0; 62]].concat().repeat(2));
        let bytes = [7; 2 * 144];
        let layout = Layout::of(&tensor(BlockType::Q4_K, 256, &bytes));
        assert!(matches!(layout.arranged(&bytes), Cow::Borrowed(_)));
    }
}
