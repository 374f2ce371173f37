//! The CPU's form of a weight matrix: panels of sixteen rows.
//!
//! A panel interleaves sixteen rows of weights so that a lane of a vector is a row. Every output
//! is then accumulated in its own lane, blocks in sequence, one fused multiply-add per scale:
//! no sums across lanes, and the same bits however many activation rows share the pass.
//!
//! For a quantized type a panel is its *scales* (for each block or super-block, sixteen of each)
//! followed by its *values*, both in order of column. The values of a block of 32 columns are
//! *planes*, one after the other; in each plane sixteen rows are interleaved by 4 bytes:
//!
//! - a nibble plane (256 bytes) of four vectors: byte `i` of a row's dword in vector `v` holds
//!   column `4v + i` low and column `16 + 4v + i` high;
//! - a 2-bit plane (128 bytes) of two vectors: bits `2s, 2s + 1` of byte `i` in vector `v` belong to
//!   column `16v + 4s + i`;
//! - a 1-bit plane (64 bytes): bit `s` of byte `i` belongs to column `4s + i`;
//! - a byte plane (512 bytes) of eight vectors: byte `i` in vector `v` is column `4v + i`.
//!
//! So a type of 5 bits is a nibble plane and a 1-bit plane, one of 6 bits a nibble plane and a
//! 2-bit plane, and all types share a handful of unpacking steps. A panel is as large as the
//! file's blocks, but for padding to 64 bytes and to whole panels.

use bytemuck::Zeroable;
use memmap2::MmapMut;

use super::simd::Simd;
use super::{Shared, share};
use crate::error::{Error, Result};
use crate::gguf::{SharedTensor, Tensor};
use crate::quant::{BlockType, IQ4_VALUES};

/// Rows of a panel.
pub(super) const ROWS: usize = 16;

/// Columns of a block.
pub(super) const BLOCK: usize = 32;

/// Columns of a super-block.
const SUPER: usize = 256;

/// A cache line, so that panels are aligned.
#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: a Line is 64 initialised bytes, any of which are valid.
unsafe impl bytemuck::Pod for Line {}

/// A matrix of weights in panels.
#[derive(Debug)]
pub(super) struct Panels {
    /// What it is packed from.
    pub block_type: BlockType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Bytes from a panel to the next.
    pub stride: usize,
    /// Bytes of the scales at the head of a panel.
    pub scale_bytes: usize,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    /// Packed once, all panels one after the other.
    Packed(MmapMut),
    /// In the file: each panel is packed when it is used.
    Mapped(SharedTensor, Layout),
}

/// Where a panel that is not kept is packed: one after the other, during a product.
#[derive(Debug, Default)]
pub(super) struct Bench(Vec<Line>);

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Panels {
    /// Packs a tensor. `on_all` runs a job for each of so many parts, on as many threads as it has.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no kernel for its type.
    pub fn pack(
        tensor: &Tensor<'_>,
        on_all: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
    ) -> Result<Self> {
        let layout = layout_of(tensor)?;
        let (scale_bytes, stride) = layout.sizes(tensor);
        let (count, lines) = (tensor.rows.div_ceil(ROWS), stride / size_of::<Line>());
        let mut data = memory(tensor, count * stride)?;
        let to = Shared(data.as_mut_ptr().cast::<Line>());
        let parts = count.min(64);
        on_all(parts, &|part| {
            for p in share(count, part, parts) {
                // SAFETY: panel p is these lines, and belongs to one part alone.
                let panel =
                    unsafe { std::slice::from_raw_parts_mut(to.get().add(p * lines), lines) };
                layout.pack_panel(tensor, p, scale_bytes, panel);
            }
        });
        Ok(Panels::new(tensor, scale_bytes, stride, Weights::Packed(data)))
    }

    /// Leaves a tensor in its file.
    ///
    /// # Errors
    /// As [`Panels::pack`].
    pub fn mapped(weight: &SharedTensor) -> Result<Self> {
        let tensor = weight.view();
        let layout = layout_of(&tensor)?;
        let (scale_bytes, stride) = layout.sizes(&tensor);
        Ok(Panels::new(&tensor, scale_bytes, stride, Weights::Mapped(weight.clone(), layout)))
    }

    fn new(tensor: &Tensor<'_>, scale_bytes: usize, stride: usize, weights: Weights) -> Self {
        let Tensor { block_type, rows, cols, .. } = *tensor;
        Panels { block_type, rows, cols, stride, scale_bytes, weights }
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Whether panels lie in memory one after the other.
    pub fn is_packed(&self) -> bool {
        matches!(self.weights, Weights::Packed(_))
    }

    /// The first byte of a panel. It may lie on the bench, until the next one is put there.
    pub fn panel(&self, p: usize, bench: &mut Bench) -> *const u8 {
        match &self.weights {
            Weights::Packed(data) => data[p * self.stride..].as_ptr(),
            Weights::Mapped(weight, layout) => {
                bench.0.clear();
                bench.0.resize(self.stride / size_of::<Line>(), Line::zeroed());
                layout.pack_panel(&weight.view(), p, self.scale_bytes, &mut bench.0);
                bench.0.as_ptr().cast()
            }
        }
    }
}

/// Zeroed memory for a tensor's panels, in large pages where the system has them: a pass streams
/// through all of it, and looking up small pages costs as much as waiting for memory.
fn memory(tensor: &Tensor<'_>, bytes: usize) -> Result<MmapMut> {
    // (A map of nothing is an error.)
    let map = MmapMut::map_anon(bytes.max(1)).map_err(|source| Error::io(tensor.file, source))?;
    // Advice: where it is not taken, pages are small.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// How a tensor is packed.
fn layout_of(tensor: &Tensor<'_>) -> Result<Layout> {
    layout(tensor.block_type).ok_or_else(|| {
        Error::unsupported(
            tensor.file,
            format!(
                "tensor `{}` has the type {}, which cannot be run; quantize the model to another type",
                tensor.name, tensor.block_type
            ),
        )
    })
}

/// How a type is packed.
#[derive(Debug)]
struct Layout {
    /// Columns that share a set of scales, and the bytes of that set for sixteen rows.
    scale_cols: usize,
    scale_bytes: usize,
    /// Bytes of the values of 32 columns and sixteen rows; 0 for float types.
    block_bytes: usize,
    /// Writes one row into its lane of a panel's scales and values.
    pack_row: fn(BlockType, &[u8], usize, &mut [u8], &mut [u8]),
}

impl Layout {
    /// Bytes of the scales of a panel, and of all of it.
    fn sizes(&self, tensor: &Tensor<'_>) -> (usize, usize) {
        let scale_bytes = (tensor.cols / self.scale_cols * self.scale_bytes).next_multiple_of(64);
        let value_bytes = match self.block_bytes {
            0 => tensor.cols * ROWS * tensor.block_type.block_bytes(),
            n => tensor.cols / BLOCK * n,
        };
        (scale_bytes, (scale_bytes + value_bytes).next_multiple_of(64))
    }

    /// Packs panel `p` of a tensor into lines that are zero.
    fn pack_panel(&self, tensor: &Tensor<'_>, p: usize, scale_bytes: usize, panel: &mut [Line]) {
        let panel: &mut [u8] = bytemuck::cast_slice_mut(panel);
        let (scales, values) = panel.split_at_mut(scale_bytes);
        for lane in 0..ROWS.min(tensor.rows - p * ROWS) {
            let row = tensor.row(p * ROWS + lane);
            (self.pack_row)(tensor.block_type, row, lane, scales, values);
        }
    }
}

fn layout(block_type: BlockType) -> Option<Layout> {
    fn of<F: Format>() -> Layout {
        Layout {
            scale_cols: F::SCALE_BLOCKS * BLOCK,
            scale_bytes: F::SCALE_BYTES,
            block_bytes: F::BLOCK_BYTES,
            pack_row: pack_row::<F>,
        }
    }
    if block_type.is_float() {
        return Some(Layout {
            scale_cols: 1,
            scale_bytes: 0,
            block_bytes: 0,
            pack_row: pack_float_row,
        });
    }
    match_format!(block_type, F => Some(of::<F>()), _ => None)
}

/// Runs an expression with `F` bound to the [`Format`] of a quantized type.
macro_rules! match_format {
    ($block_type:expr, $f:ident => $then:expr, _ => $otherwise:expr) => {{
        use $crate::exec::cpu::panel as formats;
        use $crate::quant::BlockType as T;
        macro_rules! then {
            ($t:ty) => {{
                type $f = $t;
                $then
            }};
        }
        match $block_type {
            T::Q4_0 => then!(formats::Simple<formats::Nibbles, 3, false>),
            T::Q4_1 => then!(formats::Simple<formats::Nibbles, 0, true>),
            T::Q5_0 => then!(formats::Simple<formats::FiveBits, 4, false>),
            T::Q5_1 => then!(formats::Simple<formats::FiveBits, 0, true>),
            T::Q8_0 => then!(formats::Simple<formats::Bytes, 7, false>),
            T::IQ4_NL => then!(formats::Simple<formats::Nonlinear, 7, false>),
            T::Q4_K => then!(formats::SixBitScales<formats::Nibbles>),
            T::Q5_K => then!(formats::SixBitScales<formats::FiveBits>),
            T::Q6_K => then!(formats::Q6K),
            T::Q2_K => then!(formats::Q2K),
            T::Q3_K => then!(formats::Q3K),
            T::IQ4_XS => then!(formats::Iq4Xs),
            _ => $otherwise,
        }
    }};
}
pub(super) use match_format;

fn pack_float_row(block_type: BlockType, row: &[u8], lane: usize, _: &mut [u8], values: &mut [u8]) {
    let size = block_type.block_bytes();
    for (element, group) in row.chunks_exact(size).zip(values.chunks_exact_mut(ROWS * size)) {
        group[lane * size..][..size].copy_from_slice(element);
    }
}

fn pack_row<F: Format>(
    block_type: BlockType,
    row: &[u8],
    lane: usize,
    scales: &mut [u8],
    values: &mut [u8],
) {
    let (len, bytes) = (block_type.block_len(), block_type.block_bytes());
    let mut buffer = [0; SUPER];
    let q = &mut buffer[..len];
    let blocks = row.chunks_exact(bytes);
    let scales = scales.chunks_exact_mut(F::SCALE_BYTES);
    let planes = values.chunks_exact_mut(len / BLOCK * F::BLOCK_BYTES);
    for ((block, scales), planes) in blocks.zip(scales).zip(planes) {
        F::pack_scales(block_type, block, lane, scales);
        if pack_dwords(block_type, block, lane, planes) {
            continue;
        }
        block_type.values(block, q);
        for (q, plane) in q.chunks_exact(BLOCK).zip(planes.chunks_exact_mut(F::BLOCK_BYTES)) {
            F::Values::pack(q, lane, plane);
        }
    }
}

/// Packs the values of a block whose bytes lie in the file nearly as in a plane, four at a time.
fn pack_dwords(block_type: BlockType, block: &[u8], lane: usize, planes: &mut [u8]) -> bool {
    let word =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let mut put = |v: usize, word: u32| {
        dword(planes, v, lane).copy_from_slice(&word.to_le_bytes());
    };
    match block_type {
        BlockType::Q4_0 => (0..4).for_each(|v| put(v, word(2 + 4 * v))),
        BlockType::Q4_1 => (0..4).for_each(|v| put(v, word(4 + 4 * v))),
        BlockType::Q8_0 => (0..8).for_each(|v| put(v, word(2 + 4 * v) ^ 0x8080_8080)),
        // 32 bytes hold 32 columns in their low halves and the next 32 in their high ones.
        BlockType::Q4_K => {
            for b in 0..8 {
                for v in 0..4 {
                    let at = 16 + 32 * (b / 2) + 4 * v;
                    let (first, second) = match b % 2 {
                        0 => (word(at), word(at + 16) << 4),
                        _ => (word(at) >> 4, word(at + 16)),
                    };
                    put(4 * b + v, first & 0x0f0f_0f0f | second & 0xf0f0_f0f0);
                }
            }
        }
        _ => return false,
    }
    true
}

/// How the values of 32 columns are stored in planes.
pub(super) trait Values {
    /// Bytes for sixteen rows.
    const BYTES: usize;
    /// Whether unpacked values are bytes with an offset of 128, for [`Simd::dot_wide`].
    const WIDE: bool;

    /// Writes the values of one row into its lane.
    fn pack(q: &[u8], lane: usize, plane: &mut [u8]);

    /// Group `g` of eight: byte `i` of a lane is column `4g + i`. (`g` is known when this is
    /// compiled. A group at a time, because the compiler then keeps the order of the kernel's
    /// products; with all eight at once it puts those of one activation row in sequence, and they
    /// wait for each other: a third slower.)
    ///
    /// # Safety
    /// As [`Simd`]'s loads: `plane` points at the lane's dword of a block.
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I;
}

/// The dword of a lane in vector `v` of a plane.
fn dword(plane: &mut [u8], v: usize, lane: usize) -> &mut [u8] {
    &mut plane[v * 64 + lane * 4..][..4]
}

fn pack_nibbles(q: &[u8], lane: usize, plane: &mut [u8]) {
    for v in 0..4 {
        for (i, byte) in dword(plane, v, lane).iter_mut().enumerate() {
            *byte = q[4 * v + i] & 15 | q[16 + 4 * v + i] << 4;
        }
    }
}

fn pack_two_bits(q: &[u8], shift: u32, lane: usize, plane: &mut [u8]) {
    for v in 0..2 {
        for (i, byte) in dword(plane, v, lane).iter_mut().enumerate() {
            *byte = (0..4).fold(0, |b, s| b | (q[16 * v + 4 * s + i] >> shift & 3) << (2 * s));
        }
    }
}

fn pack_bit(q: &[u8], shift: u32, lane: usize, plane: &mut [u8]) {
    for (i, byte) in dword(plane, 0, lane).iter_mut().enumerate() {
        *byte = (0..8).fold(0, |b, s| b | (q[4 * s + i] >> shift & 1) << s);
    }
}

/// Group `g` of a nibble plane.
#[inline(always)]
unsafe fn nibbles<S: Simd>(plane: *const u8, g: usize) -> S::I {
    // SAFETY: the caller's; the plane has four vectors.
    unsafe {
        let w = S::load_i(plane.add(64 * (g % 4)));
        S::and(if g < 4 { w } else { S::shr::<4>(w) }, S::i32(0x0f0f_0f0f))
    }
}

/// Group `g` of a 2-bit plane, at bit `AT` of its bytes (0 or 4).
///
/// A 32-bit shift moves bits between bytes, but never onto those that the mask lets through.
#[inline(always)]
unsafe fn two_bits<S: Simd, const AT: u32>(plane: *const u8, g: usize) -> S::I {
    // SAFETY: the caller's; the plane has two vectors.
    unsafe {
        let w = S::load_i(plane.add(64 * (g / 4)));
        let shifted = match AT as i32 - 2 * (g as i32 % 4) {
            4 => S::shl::<4>(w),
            2 => S::shl::<2>(w),
            0 => w,
            -2 => S::shr::<2>(w),
            -4 => S::shr::<4>(w),
            _ => S::shr::<6>(w),
        };
        S::and(shifted, S::i32(i32::from_le_bytes([3 << AT; 4])))
    }
}

/// Group `g` of a 1-bit plane, at bit `AT` of its bytes (2 or 4).
#[inline(always)]
unsafe fn bits<S: Simd, const AT: u32>(plane: *const u8, g: usize) -> S::I {
    // SAFETY: the caller's; the plane has one vector.
    unsafe {
        let w = S::load_i(plane);
        let shifted = match AT as i32 - g as i32 {
            4 => S::shl::<4>(w),
            3 => S::shl::<3>(w),
            2 => S::shl::<2>(w),
            1 => S::shl::<1>(w),
            0 => w,
            -1 => S::shr::<1>(w),
            -2 => S::shr::<2>(w),
            -3 => S::shr::<3>(w),
            -4 => S::shr::<4>(w),
            _ => S::shr::<5>(w),
        };
        S::and(shifted, S::i32(i32::from_le_bytes([1 << AT; 4])))
    }
}

/// Four bits: a nibble plane.
pub(super) struct Nibbles;

impl Values for Nibbles {
    const BYTES: usize = 256;
    const WIDE: bool = false;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        pack_nibbles(q, lane, plane);
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        // SAFETY: the caller's.
        unsafe { nibbles::<S>(plane, g) }
    }
}

/// Five bits: a nibble plane and a 1-bit plane.
pub(super) struct FiveBits;

impl Values for FiveBits {
    const BYTES: usize = 256 + 64;
    const WIDE: bool = false;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        pack_nibbles(q, lane, plane);
        pack_bit(q, 4, lane, &mut plane[256..]);
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        // SAFETY: the caller's.
        unsafe { S::or(nibbles::<S>(plane, g), bits::<S, 4>(plane.add(256), g)) }
    }
}

/// Six bits: a nibble plane and a 2-bit plane.
pub(super) struct SixBits;

impl Values for SixBits {
    const BYTES: usize = 256 + 128;
    const WIDE: bool = false;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        pack_nibbles(q, lane, plane);
        pack_two_bits(q, 4, lane, &mut plane[256..]);
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        // SAFETY: the caller's.
        unsafe { S::or(nibbles::<S>(plane, g), two_bits::<S, 4>(plane.add(256), g)) }
    }
}

/// Two bits: a 2-bit plane.
pub(super) struct TwoBits;

impl Values for TwoBits {
    const BYTES: usize = 128;
    const WIDE: bool = false;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        pack_two_bits(q, 0, lane, plane);
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        // SAFETY: the caller's.
        unsafe { two_bits::<S, 0>(plane, g) }
    }
}

/// Three bits: a 2-bit plane and a 1-bit plane.
pub(super) struct ThreeBits;

impl Values for ThreeBits {
    const BYTES: usize = 128 + 64;
    const WIDE: bool = false;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        pack_two_bits(q, 0, lane, plane);
        pack_bit(q, 2, lane, &mut plane[128..]);
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        // SAFETY: the caller's.
        unsafe { S::or(two_bits::<S, 0>(plane, g), bits::<S, 2>(plane.add(128), g)) }
    }
}

/// Eight bits with an offset of 128: a byte plane.
pub(super) struct Bytes;

impl Values for Bytes {
    const BYTES: usize = 512;
    const WIDE: bool = true;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        for v in 0..8 {
            dword(plane, v, lane).copy_from_slice(&q[4 * v..][..4]);
        }
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        // SAFETY: the caller's; the plane has eight vectors.
        unsafe { S::load_i(plane.add(64 * g)) }
    }
}

/// Four bits that index [`IQ4_VALUES`]: a nibble plane, unpacked to bytes with an offset of 128.
pub(super) struct Nonlinear;

impl Values for Nonlinear {
    const BYTES: usize = 256;
    const WIDE: bool = true;

    fn pack(q: &[u8], lane: usize, plane: &mut [u8]) {
        pack_nibbles(q, lane, plane);
    }

    #[inline(always)]
    unsafe fn group<S: Simd>(plane: *const u8, g: usize) -> S::I {
        const TABLE: [u8; 16] = {
            let mut table = [0; 16];
            let mut i = 0;
            while i < 16 {
                table[i] = IQ4_VALUES[i] as u8 ^ 0x80;
                i += 1;
            }
            table
        };
        // SAFETY: the caller's.
        unsafe { S::lookup(&TABLE, nibbles::<S>(plane, g)) }
    }
}

/// A quantized type: its values, and its scales.
///
/// weight = scale (value - 2^OFFSET) - minimum, with a scale and a minimum for each of the
/// `SUBS` parts of a block of 32 columns. An `OFFSET` of 0 means none.
pub(super) trait Format {
    /// How values are stored.
    type Values: Values;
    /// Bytes of the values of a block, for sixteen rows.
    const BLOCK_BYTES: usize = Self::Values::BYTES;
    /// Parts of a block with scales of their own: 1 or 2.
    const SUBS: usize;
    /// Whether there are minima.
    const MINIMA: bool;
    /// The binary logarithm of the values' offset; 0 for none.
    const OFFSET: u32;
    /// Blocks that share a set of scales.
    const SCALE_BLOCKS: usize;
    /// Bytes of that set, for sixteen rows.
    const SCALE_BYTES: usize;

    /// Writes the scales of one block of the file into a row's lane.
    fn pack_scales(block_type: BlockType, block: &[u8], lane: usize, scales: &mut [u8]);

    /// Scales and minima (to be added) of block `b` of a set, for the parts of the block.
    ///
    /// # Safety
    /// As [`Simd`]'s loads: `scales` points at the set, `lane` is the first lane to load.
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, b: usize) -> [[S::F; 2]; 2];
}

/// Writes a 2-byte value into its lane of a vector of sixteen.
fn put_f16(vector: &mut [u8], lane: usize, bits: [u8; 2]) {
    vector[2 * lane..][..2].copy_from_slice(&bits);
}

/// Sixteen halves at `p`, from `lane` on.
#[inline(always)]
unsafe fn halves<S: Simd>(p: *const u8, lane: usize) -> S::F {
    // SAFETY: the caller's; unaligned loads.
    unsafe { S::load_f16(p.add(2 * lane).cast()) }
}

/// Blocks of 32 with an f16 scale, and an f16 minimum if `MIN`.
pub(super) struct Simple<V, const OFFSET: u32, const MIN: bool>(std::marker::PhantomData<V>);

impl<V: Values, const OFFSET: u32, const MIN: bool> Format for Simple<V, OFFSET, MIN> {
    type Values = V;
    const SUBS: usize = 1;
    const MINIMA: bool = MIN;
    const OFFSET: u32 = OFFSET;
    const SCALE_BLOCKS: usize = 1;
    const SCALE_BYTES: usize = if MIN { 64 } else { 32 };

    fn pack_scales(_: BlockType, block: &[u8], lane: usize, scales: &mut [u8]) {
        put_f16(scales, lane, [block[0], block[1]]);
        if MIN {
            put_f16(&mut scales[32..], lane, [block[2], block[3]]);
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, _: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let d = halves::<S>(scales, lane);
            let m = if MIN { halves::<S>(scales.add(32), lane) } else { d };
            [[d, m]; 2]
        }
    }
}

/// Super-blocks with d, dmin and 6-bit scales and minima for each 32 columns: Q4_K, Q5_K.
///
/// After d and dmin come eight vectors of bytes, one a block, with the low nibbles of scale
/// and minimum, and four, one for two blocks, with the pairs' high bits (scale, minimum, scale,
/// minimum, two bits each).
pub(super) struct SixBitScales<V>(std::marker::PhantomData<V>);

impl<V: Values> Format for SixBitScales<V> {
    type Values = V;
    const SUBS: usize = 1;
    const MINIMA: bool = true;
    const OFFSET: u32 = 0;
    const SCALE_BLOCKS: usize = 8;
    const SCALE_BYTES: usize = 64 + 12 * 16;

    fn pack_scales(block_type: BlockType, block: &[u8], lane: usize, out: &mut [u8]) {
        let s = block_type.super_scales(block);
        put_f16(out, lane, s.d.to_le_bytes());
        put_f16(&mut out[32..], lane, s.dmin.to_le_bytes());
        let bytes = &mut out[64..];
        for j in 0..8 {
            let (scale, minimum) = (s.scales[j] as u8, s.minima[j]);
            bytes[16 * j + lane] = scale & 15 | minimum << 4;
            bytes[128 + 16 * (j / 2) + lane] |= (scale >> 4 | minimum >> 4 << 2) << (4 * (j % 2));
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, b: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let bytes = scales.add(64 + lane);
            let low = S::load_u8(bytes.add(16 * b));
            let high = S::load_u8(bytes.add(128 + 16 * (b / 2)));
            let high = if b % 2 == 1 { S::shr::<4>(high) } else { high };
            let (four, top) = (S::i32(15), S::i32(0x30));
            let scale = S::or(S::and(low, four), S::and(S::shl::<4>(high), top));
            let minimum = S::or(S::shr::<4>(low), S::and(S::shl::<2>(high), top));
            let d = S::mul(halves::<S>(scales, lane), S::to_f32(scale));
            let dmin = S::sub(S::f32(0.0), halves::<S>(scales.add(32), lane));
            [[d, S::mul(dmin, S::to_f32(minimum))]; 2]
        }
    }
}

/// Super-blocks with d and a signed byte of scale for each 16 columns.
pub(super) struct Q6K;

impl Format for Q6K {
    type Values = SixBits;
    const SUBS: usize = 2;
    const MINIMA: bool = false;
    const OFFSET: u32 = 5;
    const SCALE_BLOCKS: usize = 8;
    const SCALE_BYTES: usize = 32 + 16 * 16;

    fn pack_scales(block_type: BlockType, block: &[u8], lane: usize, out: &mut [u8]) {
        let s = block_type.super_scales(block);
        put_f16(out, lane, s.d.to_le_bytes());
        for j in 0..16 {
            out[32 + 16 * j + lane] = s.scales[j] as u8;
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, b: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let d = halves::<S>(scales, lane);
            let mut parts = [[d; 2]; 2];
            for (j, part) in parts.iter_mut().enumerate() {
                let scale = S::load_i8(scales.add(32 + 16 * (2 * b + j) + lane));
                part[0] = S::mul(d, S::to_f32(scale));
            }
            parts
        }
    }
}

/// Super-blocks with d, dmin and a byte of (scale, minimum) nibbles for each 16 columns.
pub(super) struct Q2K;

impl Format for Q2K {
    type Values = TwoBits;
    const SUBS: usize = 2;
    const MINIMA: bool = true;
    const OFFSET: u32 = 0;
    const SCALE_BLOCKS: usize = 8;
    const SCALE_BYTES: usize = 64 + 16 * 16;

    fn pack_scales(block_type: BlockType, block: &[u8], lane: usize, out: &mut [u8]) {
        let s = block_type.super_scales(block);
        put_f16(out, lane, s.d.to_le_bytes());
        put_f16(&mut out[32..], lane, s.dmin.to_le_bytes());
        for j in 0..16 {
            out[64 + 16 * j + lane] = s.scales[j] as u8 | s.minima[j] << 4;
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, b: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let d = halves::<S>(scales, lane);
            let dmin = S::sub(S::f32(0.0), halves::<S>(scales.add(32), lane));
            let mut parts = [[d; 2]; 2];
            for (j, part) in parts.iter_mut().enumerate() {
                let both = S::load_u8(scales.add(64 + 16 * (2 * b + j) + lane));
                let scale = S::to_f32(S::and(both, S::i32(15)));
                let minimum = S::to_f32(S::shr::<4>(both));
                *part = [S::mul(d, scale), S::mul(dmin, minimum)];
            }
            parts
        }
    }
}

/// Super-blocks with d and a 6-bit scale (+ 32) for each 16 columns.
///
/// After d come eight vectors of bytes, one a block, with the low nibbles of its two scales,
/// and four, one for two blocks, with the high bits of four scales.
pub(super) struct Q3K;

impl Format for Q3K {
    type Values = ThreeBits;
    const SUBS: usize = 2;
    const MINIMA: bool = false;
    const OFFSET: u32 = 2;
    const SCALE_BLOCKS: usize = 8;
    const SCALE_BYTES: usize = 32 + 12 * 16;

    fn pack_scales(block_type: BlockType, block: &[u8], lane: usize, out: &mut [u8]) {
        let s = block_type.super_scales(block);
        put_f16(out, lane, s.d.to_le_bytes());
        let bytes = &mut out[32..];
        for b in 0..8 {
            let [first, second] = [s.scales[2 * b], s.scales[2 * b + 1]].map(|x| (x + 32) as u8);
            bytes[16 * b + lane] = first & 15 | second << 4;
            bytes[128 + 16 * (b / 2) + lane] |= (first >> 4 | second >> 4 << 2) << (4 * (b % 2));
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, b: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let d = halves::<S>(scales, lane);
            let bytes = scales.add(32 + lane);
            let low = S::load_u8(bytes.add(16 * b));
            let high = S::load_u8(bytes.add(128 + 16 * (b / 2)));
            let high = if b % 2 == 1 { S::shr::<4>(high) } else { high };
            let (four, top) = (S::i32(15), S::i32(0x30));
            let low = [S::and(low, four), S::shr::<4>(low)];
            let high = [S::shl::<4>(high), S::shl::<2>(high)];
            let mut parts = [[d; 2]; 2];
            for (j, part) in parts.iter_mut().enumerate() {
                let scale = S::or(low[j], S::and(high[j], top));
                part[0] = S::mul(d, S::to_f32(S::add_i(scale, S::i32(-32))));
            }
            parts
        }
    }
}

/// Super-blocks with d and a 6-bit scale (+ 32) for each 32 columns.
///
/// After d come four vectors of bytes, one for two blocks, with low nibbles, and two, one for
/// four blocks, with high bits.
pub(super) struct Iq4Xs;

impl Format for Iq4Xs {
    type Values = Nonlinear;
    const SUBS: usize = 1;
    const MINIMA: bool = false;
    const OFFSET: u32 = 7;
    const SCALE_BLOCKS: usize = 8;
    const SCALE_BYTES: usize = 32 + 6 * 16;

    fn pack_scales(block_type: BlockType, block: &[u8], lane: usize, out: &mut [u8]) {
        let s = block_type.super_scales(block);
        put_f16(out, lane, s.d.to_le_bytes());
        let bytes = &mut out[32..];
        for j in 0..8 {
            let scale = (s.scales[j] + 32) as u8;
            bytes[16 * (j / 2) + lane] |= (scale & 15) << (4 * (j % 2));
            bytes[64 + 16 * (j / 4) + lane] |= (scale >> 4) << (2 * (j % 4));
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, lane: usize, b: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let bytes = scales.add(32 + lane);
            let low = S::load_u8(bytes.add(16 * (b / 2)));
            let low = if b % 2 == 1 { S::shr::<4>(low) } else { low };
            let high = S::load_u8(bytes.add(64 + 16 * (b / 4)));
            let high = match b % 4 {
                0 => S::shl::<4>(high),
                1 => S::shl::<2>(high),
                2 => high,
                _ => S::shr::<2>(high),
            };
            let scale = S::or(S::and(low, S::i32(15)), S::and(high, S::i32(0x30)));
            let scale = S::to_f32(S::add_i(scale, S::i32(-32)));
            let d = S::mul(halves::<S>(scales, lane), scale);
            [[d, d]; 2]
        }
    }
}
