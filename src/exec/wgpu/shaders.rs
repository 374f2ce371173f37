//! Shaders: a frame for each operation, joined by text with the block file of a weight type and the
//! way threads exchange sums. A shader is named by what it is joined from.

use crate::quant::BlockType;

/// Positions that one workgroup of an attention takes.
pub(super) const SPLIT: usize = 256;

/// The longest head that attention has room for.
pub(super) const MAX_HEAD: usize = 256;

/// Numbers that one workgroup sorts.
pub(super) const SORTED: usize = 1024;

/// Words of a row's path: how many tree rows it sees, and their places, four to a word.
pub(super) const PATH_WORDS: usize = 1 + 128 / 4;

/// Ranges of columns that a row of weights is cut into, each of which eight threads share. (Of 2, 4 and
/// 8, on an NVIDIA H200: 2 leaves it idle while it waits for memory, 8 makes tiles a fifth slower.)
const RANGES: u32 = 4;

/// Threads that share a few rows of weights: eight in each range.
const GROUP: u32 = 8 * RANGES;

/// The most threads of a product.
pub(super) const MOST_THREADS: u32 = 512;

/// Rows of activations that a product takes at once: the least that is enough, or several times
/// the largest.
pub(super) const COLUMNS: [u32; 4] = [1, 2, 4, 8];

/// Matrices that one product can have.
pub(super) const MOST_OUTPUTS: usize = 3;

/// Weight rows that a thread of a tiled product has, and weight rows of its tile.
const TILED_ROWS: u32 = 4;
pub(super) const TILE_ROWS: u32 = 32;

/// Rows of activations of a tile.
pub(super) const TILE_COLUMNS: u32 = 32;

/// Rows of a chain for which attention reads keys and values once.
pub(super) const QUERIES: u32 = 4;

/// What a binding of a frame is to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Access {
    Read,
    Write,
}

/// An operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Frame {
    Embed,
    RmsNorm,
    LayerNorm,
    Weigh,
    Matmul,
    Tiled,
    Quantize,
    Halve,
    RotateStore,
    Attend,
    Combine,
    Swiglu,
    Relu,
    Gather,
    MoveRows,
    Largest,
    Merge,
    Stream,
}

/// How a product multiplies activations with quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// In single precision.
    F32,
    /// As bytes: activations are rounded to blocks of 32 signed ones.
    Int8,
    /// In half precision, chunks of 32 added up in single: activations are rounded to halves.
    F16,
}

impl Arithmetic {
    /// Its word in `MTAD_GPU`.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::Int8 => "int8",
            Arithmetic::F16 => "f16",
        }
    }
}

/// What a product does with its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Ending {
    /// They go to one buffer, or are added to it.
    One,
    /// They go to up to [`MOST_OUTPUTS`] buffers.
    Three,
    /// They are added to a buffer, which also gets the norm that follows.
    Norm,
    /// They are gate and up of a SwiGLU, whose result goes to a buffer.
    Swiglu,
    /// They are queries, keys and values, which are rotated, and stored in the cache.
    Rotate,
}

impl Ending {
    /// Whether the verb that follows a product is done by it.
    fn is_fused(self) -> bool {
        !matches!(self, Ending::One | Ending::Three)
    }
}

/// What a shader is joined from; fields that a frame has no use for have their least value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shader {
    pub frame: Frame,
    /// The type of the weights.
    pub block: Option<BlockType>,
    /// How activations are multiplied.
    pub arithmetic: Arithmetic,
    /// Rows of activations at once: of a product, or of attention.
    pub columns: u32,
    /// Whether threads exchange sums in registers.
    pub subgroups: bool,
    /// What a product does with its sums.
    pub ending: Ending,
    /// Whether the cache is stored in half precision.
    pub cache_f16: bool,
    /// Pairs of its elements that attention reads at once.
    pub pairs: u32,
}

impl Shader {
    /// A frame that needs nothing else.
    pub fn plain(frame: Frame) -> Self {
        Shader {
            frame,
            block: None,
            arithmetic: Arithmetic::F32,
            columns: 1,
            subgroups: false,
            ending: Ending::One,
            cache_f16: false,
            pairs: 1,
        }
    }

    /// A frame over weights.
    pub fn weights(frame: Frame, block: BlockType) -> Self {
        Shader { block: Some(block), ..Self::plain(frame) }
    }

    /// A frame over the cache.
    pub fn cache(frame: Frame, cache_f16: bool) -> Self {
        Shader { cache_f16, ..Self::plain(frame) }
    }

    /// The bindings of its first group, in order.
    pub fn access(&self) -> &'static [Access] {
        use Access::{Read, Write};
        match self.frame {
            Frame::Combine if self.rounds() => &[Read, Write, Write, Write],
            Frame::Embed
            | Frame::Gather
            | Frame::Combine
            | Frame::Largest
            | Frame::Merge
            | Frame::Stream => &[Read, Write],
            Frame::RmsNorm => &[Read, Read, Write],
            Frame::Weigh => &[Read, Read, Write, Write],
            Frame::LayerNorm if self.rounds() => &[Read, Read, Read, Write, Write, Write],
            Frame::LayerNorm => &[Read, Read, Read, Write],
            Frame::Matmul | Frame::Tiled => match self.ending {
                Ending::One => &[Read, Read, Read, Read, Write],
                Ending::Three | Ending::Swiglu | Ending::Rotate => {
                    &[Read, Read, Read, Read, Write, Write, Write]
                }
                Ending::Norm => &[Read, Read, Read, Read, Write, Read, Write, Write],
            },
            Frame::Quantize | Frame::Halve => &[Read, Write, Write],
            Frame::RotateStore => &[Write, Read, Read, Write, Write],
            Frame::Attend if self.rounds() => &[Read, Read, Read, Write, Write, Write, Write],
            Frame::Attend => &[Read, Read, Read, Write, Write],
            Frame::Swiglu if self.rounds() => &[Write, Read, Write, Write],
            Frame::Swiglu => &[Write, Read],
            Frame::Relu => &[Write],
            Frame::MoveRows => &[Write, Write],
        }
    }

    /// What it is, for labels and tables.
    pub fn name(&self) -> String {
        let mut name = match self.frame {
            Frame::Embed => "embed",
            Frame::RmsNorm => "rms_norm",
            Frame::LayerNorm => "layer_norm",
            Frame::Weigh => "weigh",
            Frame::Matmul => "matmul",
            Frame::Tiled => "tiled",
            Frame::Quantize => "quantize",
            Frame::Halve => "halve",
            Frame::RotateStore => "rotate_store",
            Frame::Attend => "attend",
            Frame::Combine => "combine",
            Frame::Swiglu => "swiglu",
            Frame::Relu => "relu",
            Frame::Gather => "gather",
            Frame::MoveRows => "move_rows",
            Frame::Largest => "largest",
            Frame::Merge => "merge",
            Frame::Stream => "stream",
        }
        .to_owned();
        if let Some(block) = self.block {
            name += &format!(" {block}");
        }
        if self.frame == Frame::Attend && self.columns > 1 {
            name += &format!(" x{}", self.columns);
        }
        if self.is_product() {
            if self.arithmetic != Arithmetic::F32 {
                name += &format!(" {}", self.arithmetic.name());
            }
            name += &format!(" x{}", self.columns);
            name += match self.ending {
                Ending::One | Ending::Three => "",
                Ending::Norm => ", norm",
                Ending::Swiglu => ", swiglu",
                Ending::Rotate => ", rotate_store",
            };
        }
        name
    }

    /// Weight rows that a thread of a product has at once: the more rows of activations there are, the
    /// more it pays to read one once for several rows of weights.
    fn thread_rows(&self) -> u32 {
        match (self.frame, self.ending, self.columns) {
            (Frame::Tiled, ..) => TILED_ROWS,
            (_, Ending::Swiglu, _) => 4,
            (_, _, ..=2) => 2,
            _ => 4,
        }
    }

    /// Groups of threads of a product that have weight rows of their own.
    fn groups(&self) -> u32 {
        let rows = match self.ending {
            // A block of 32 results, from as many rows or twice as many.
            Ending::Norm => 32,
            Ending::Swiglu => 64,
            // 128 threads.
            _ => return 128 / GROUP,
        };
        rows / self.thread_rows()
    }

    /// Weight rows of a workgroup of a product.
    pub fn group_rows(&self) -> usize {
        match self.frame {
            Frame::Tiled => TILE_ROWS as usize,
            _ => (self.groups() * self.thread_rows()) as usize,
        }
    }

    pub fn is_product(&self) -> bool {
        matches!(self.frame, Frame::Matmul | Frame::Tiled)
    }

    /// Its WGSL.
    pub fn source(&self) -> String {
        let Shader { columns, cache_f16, .. } = self;
        let (words, minima, offset) = self.block.map_or((8, false, 0), scales);
        // A piece of a tile is what workgroups have memory for.
        let piece = if self.arithmetic == Arithmetic::Int8 { 8 } else { 2 };
        // Where there are many rows of activations, there is enough to do while a block is on its way.
        let ahead = if self.thread_rows() <= 2 { 2 } else { 1 };
        // (Of 1, 2, 4 and 8, on an NVIDIA H200: more than two need more registers than there are.)
        let batch = (*columns).min(2);
        let lengths = [
            ("ROWS", self.thread_rows()),
            ("COLUMNS", *columns),
            ("EACH", columns / TILED_ROWS),
            ("WORDS", words),
            ("PIECE", piece),
            ("SHARED", 8 / words),
            ("AHEAD", ahead),
            ("BATCH", batch),
            ("PAIRS", self.pairs),
            ("QUERIES", *columns),
            ("SCORES", 4),
            ("KEY_READS", if self.pairs == 4 { 2 } else { 4 }),
            ("VALUES", if self.pairs == 4 { 8 } else { 16 }),
            ("NORMED", 4),
            ("CACHE_WORDS", if *cache_f16 { 1 } else { 2 }),
            ("GROUPS", self.groups()),
        ];
        let mut out = String::new();
        if self.arithmetic == Arithmetic::F16 {
            out += "enable f16;\n";
        }
        for (name, length) in lengths {
            out += &format!("const {name} = {length}u;\n");
        }
        out += &format!(
            "const RANGES = {RANGES}u;\nconst MINIMA = {minima};\n\
             const OFFSET = {offset}i;\nconst CACHE_F16 = {cache_f16};\nconst SPLIT = {SPLIT}u;\n\
             const MAX_HEAD = {MAX_HEAD}u;\nconst SORTED = {SORTED}u;\nconst PATH_WORDS = {PATH_WORDS}u;\n"
        );
        out += include_str!("../../../shaders/pass.wgsl");
        out += match self.frame {
            Frame::Embed => include_str!("../../../shaders/embed.wgsl"),
            Frame::RmsNorm => include_str!("../../../shaders/rms_norm.wgsl"),
            Frame::LayerNorm => include_str!("../../../shaders/layer_norm.wgsl"),
            Frame::Weigh => include_str!("../../../shaders/weigh.wgsl"),
            Frame::Matmul => include_str!("../../../shaders/matmul.wgsl"),
            Frame::Tiled => include_str!("../../../shaders/tiled.wgsl"),
            Frame::Quantize => include_str!("../../../shaders/quantize.wgsl"),
            Frame::Halve => include_str!("../../../shaders/halve.wgsl"),
            Frame::RotateStore => include_str!("../../../shaders/rotate_store.wgsl"),
            Frame::Attend => include_str!("../../../shaders/attend.wgsl"),
            Frame::Combine => include_str!("../../../shaders/combine.wgsl"),
            Frame::Swiglu => include_str!("../../../shaders/swiglu.wgsl"),
            Frame::Relu => include_str!("../../../shaders/relu.wgsl"),
            Frame::Gather => include_str!("../../../shaders/gather.wgsl"),
            Frame::MoveRows => include_str!("../../../shaders/move_rows.wgsl"),
            Frame::Largest => include_str!("../../../shaders/largest.wgsl"),
            Frame::Merge => include_str!("../../../shaders/merge.wgsl"),
            Frame::Stream => include_str!("../../../shaders/stream.wgsl"),
        };
        if self.is_product() {
            out += include_str!("../../../shaders/product.wgsl");
            out += match (self.frame, self.arithmetic) {
                (Frame::Tiled, Arithmetic::F32) => include_str!("../../../shaders/tiled/f32.wgsl"),
                (Frame::Tiled, Arithmetic::Int8) => {
                    include_str!("../../../shaders/tiled/int8.wgsl")
                }
                (Frame::Tiled, Arithmetic::F16) => include_str!("../../../shaders/tiled/f16.wgsl"),
                (_, Arithmetic::F32) => include_str!("../../../shaders/product/f32.wgsl"),
                (_, Arithmetic::Int8) => include_str!("../../../shaders/product/int8.wgsl"),
                (_, Arithmetic::F16) => include_str!("../../../shaders/product/f16.wgsl"),
            };
        }
        let int8 = self.is_product() && self.arithmetic == Arithmetic::Int8;
        if self.is_product() {
            out += match self.ending {
                Ending::One => include_str!("../../../shaders/endings/one.wgsl"),
                Ending::Three => include_str!("../../../shaders/endings/three.wgsl"),
                Ending::Norm => include_str!("../../../shaders/endings/norm.wgsl"),
                Ending::Swiglu => include_str!("../../../shaders/endings/swiglu.wgsl"),
                Ending::Rotate => include_str!("../../../shaders/endings/rotate.wgsl"),
            };
            if !self.ending.is_fused() {
                out += include_str!("../../../shaders/endings/elements.wgsl");
                if self.frame == Frame::Matmul {
                    out += include_str!("../../../shaders/endings/plain.wgsl");
                }
            }
            if matches!(self.ending, Ending::Norm | Ending::Swiglu) {
                out += include_str!("../../../shaders/endings/blocks.wgsl");
            }
            out += match self.arithmetic {
                Arithmetic::F32 => include_str!("../../../shaders/factors/f32.wgsl"),
                Arithmetic::Int8 => include_str!("../../../shaders/factors/int8.wgsl"),
                Arithmetic::F16 => include_str!("../../../shaders/factors/f16.wgsl"),
            };
            if self.frame == Frame::Tiled && !int8 {
                out += include_str!("../../../shaders/tiled/floats.wgsl");
            }
        }
        if self.frame == Frame::RotateStore || self.ending == Ending::Rotate {
            out += include_str!("../../../shaders/rotation.wgsl");
        }
        if self.frame == Frame::Swiglu || self.ending == Ending::Swiglu {
            out += include_str!("../../../shaders/silu.wgsl");
        }
        if int8 || self.rounds() || self.frame == Frame::Quantize {
            out += include_str!("../../../shaders/int8.wgsl");
        }
        if self.frame == Frame::Attend {
            out += match (cache_f16, self.pairs) {
                (true, 4) => include_str!("../../../shaders/cached/f16_4.wgsl"),
                (true, 2) => include_str!("../../../shaders/cached/f16_2.wgsl"),
                (true, _) => include_str!("../../../shaders/cached/f16_1.wgsl"),
                (false, 2) => include_str!("../../../shaders/cached/f32_2.wgsl"),
                (false, _) => include_str!("../../../shaders/cached/f32_1.wgsl"),
            };
        }
        if matches!(self.frame, Frame::Largest | Frame::Merge) {
            out += include_str!("../../../shaders/sort.wgsl");
        }
        if matches!(self.frame, Frame::RmsNorm | Frame::LayerNorm) {
            out += include_str!("../../../shaders/total.wgsl");
        }
        if self.rounds() {
            let first = self.access().len() - 2;
            for (at, name, element) in [(first, "bytes", "u32"), (first + 1, "scales", "f32")] {
                out += &format!(
                    "@group(0) @binding({at}) var<storage, read_write> rounded_{name}: array<{element}>;\n"
                );
            }
            out += include_str!("../../../shaders/rounded/bytes.wgsl");
            if self.frame == Frame::Weigh || self.ending == Ending::Norm {
                out += include_str!("../../../shaders/rounded/squares.wgsl");
            }
        } else if self.may_round() {
            out += include_str!("../../../shaders/rounded/not.wgsl");
        }
        if self.sums() {
            out += match self.subgroups {
                true => include_str!("../../../shaders/threads/subgroups.wgsl"),
                false => include_str!("../../../shaders/threads/shared.wgsl"),
            };
        }
        if let Some(block) = self.block {
            out += include_str!("../../../shaders/bytes.wgsl");
            block_files(block).iter().for_each(|file| out += file);
            if self.arithmetic == Arithmetic::F16 {
                out += include_str!("../../../shaders/quantized_f16.wgsl");
            }
        }
        unrolled(&out, &lengths)
    }

    /// Whether threads exchange sums.
    fn sums(&self) -> bool {
        matches!(self.frame, Frame::Matmul | Frame::RmsNorm) || self.may_round()
    }

    /// Whether it writes activations that products may read.
    fn may_round(&self) -> bool {
        use Frame::{Attend, Combine, LayerNorm, Swiglu, Weigh};
        matches!(self.frame, LayerNorm | Weigh | Swiglu | Attend | Combine)
            || matches!(self.ending, Ending::Norm | Ending::Swiglu)
    }

    /// Whether it writes its activations as bytes too.
    fn rounds(&self) -> bool {
        self.may_round() && self.arithmetic == Arithmetic::Int8
    }

    /// Every shader that can be asked for.
    #[cfg(test)]
    pub fn all() -> Vec<Shader> {
        let mut all = Vec::new();
        for subgroups in [false, true] {
            all.push(Shader { subgroups, ..Shader::plain(Frame::RmsNorm) });
            let weigh = Shader { arithmetic: Arithmetic::Int8, ..Shader::plain(Frame::Weigh) };
            all.push(Shader { subgroups, ..weigh });
            for frame in [Frame::LayerNorm, Frame::Swiglu, Frame::Combine] {
                let arithmetics = [Arithmetic::F32, Arithmetic::Int8];
                all.extend(arithmetics.map(|a| Shader {
                    arithmetic: a,
                    subgroups,
                    ..Shader::plain(frame)
                }));
            }
        }
        for block in BlockType::READABLE {
            all.push(Shader::weights(Frame::Embed, block));
            let arithmetics: &[_] = match block.is_float() {
                true => &[Arithmetic::F32],
                false => &[Arithmetic::F32, Arithmetic::Int8, Arithmetic::F16],
            };
            for &arithmetic in arithmetics {
                let product = |frame, columns, subgroups| Shader {
                    arithmetic,
                    columns,
                    subgroups,
                    ..Shader::weights(frame, block)
                };
                for columns in COLUMNS {
                    all.extend([false, true].map(|s| product(Frame::Matmul, columns, s)));
                }
                let tiled = product(Frame::Tiled, TILE_COLUMNS, false);
                all.extend([Ending::One, Ending::Three].map(|ending| Shader { ending, ..tiled }));
                all.push(Shader { ending: Ending::Three, ..product(Frame::Matmul, 1, false) });
                if arithmetic == Arithmetic::Int8 {
                    for columns in COLUMNS {
                        let fused = product(Frame::Matmul, columns, columns > 1);
                        let endings = [Ending::Norm, Ending::Swiglu, Ending::Rotate];
                        all.extend(endings.map(|ending| Shader { ending, ..fused }));
                        all.push(Shader { ending: Ending::Rotate, cache_f16: true, ..fused });
                    }
                }
            }
        }
        for cache_f16 in [false, true] {
            all.push(Shader::cache(Frame::RotateStore, cache_f16));
            for subgroups in [false, true] {
                let attend = Shader { subgroups, ..Shader::cache(Frame::Attend, cache_f16) };
                for pairs in [1, 2, 4].into_iter().filter(|&pairs| cache_f16 || pairs < 4) {
                    for columns in [1, QUERIES] {
                        all.extend([Arithmetic::F32, Arithmetic::Int8].map(|arithmetic| Shader {
                            arithmetic,
                            pairs,
                            columns,
                            ..attend
                        }));
                    }
                }
            }
        }
        all.push(Shader { arithmetic: Arithmetic::F16, ..Shader::plain(Frame::Halve) });
        let plain = [
            Frame::Quantize,
            Frame::Relu,
            Frame::Gather,
            Frame::MoveRows,
            Frame::Largest,
            Frame::Merge,
            Frame::Stream,
        ];
        all.extend(plain.map(Shader::plain));
        all
    }
}

/// Writes out the loops of a shader that begin at 0 and take a fixed number of turns, sixteen at most.
///
/// Drivers differ in which loops they unroll, and an array that a loop goes through is kept in
/// registers only if they do.
fn unrolled(source: &str, lengths: &[(&str, u32)]) -> String {
    const HEAD: &str = "for (var ";
    let Some(at) = source.find(HEAD) else { return source.to_owned() };
    let (before, loop_) = source.split_at(at);
    let open = loop_.find('{').expect("a loop has a body");
    let close = {
        let mut depth = 0;
        let ends = |(_, c): &(usize, char)| {
            depth += i32::from(*c == '{') - i32::from(*c == '}');
            depth == 0
        };
        open + loop_[open..].char_indices().find(ends).expect("braces match").0
    };
    let (body, after) = (unrolled(&loop_[open..=close], lengths), &loop_[close + 1..]);
    let mut out = before.to_owned();
    match turns(&loop_[HEAD.len()..open], lengths) {
        Some((name, turns)) => {
            turns.for_each(|turn| out += &replaced(&body, name, &format!("{turn}u")));
        }
        None => out += &format!("{}{body}", &loop_[..open]),
    }
    out + &unrolled(after, lengths)
}

/// The variable of a loop and its values, from `i = 0u; i < 8u; i += 2u) `, if they are few.
fn turns<'a>(
    head: &'a str,
    lengths: &[(&str, u32)],
) -> Option<(&'a str, impl Iterator<Item = u32>)> {
    let length = |text: &str| match lengths.iter().find(|(name, _)| *name == text) {
        Some((_, length)) => Some(*length),
        None => text.strip_suffix('u').and_then(|n| n.parse().ok()),
    };
    let mut parts = head.trim().strip_suffix(')')?.split("; ");
    let name = parts.next()?.strip_suffix(" = 0u")?;
    let end = parts.next()?.strip_prefix(name)?.strip_prefix(" < ")?;
    let end = length(end)?;
    let step = match parts.next()?.strip_prefix(name)? {
        "++" => 1,
        other => length(other.strip_prefix(" += ")?)?,
    };
    (end / step <= 16).then(|| (name, (0..end).step_by(step as usize)))
}

/// A text with a word replaced.
fn replaced(text: &str, word: &str, by: &str) -> String {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (token, more) = rest.split_at(end);
        out += if token == word { by } else { token };
        rest = more;
    }
    out
}

/// How many of the eight words of a chunk of weights share a scale, whether they have minima beside
/// their scales, and by how much they are stored larger than they are.
fn scales(block: BlockType) -> (u32, bool, i32) {
    use BlockType::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K};
    let words = match block {
        Q2_K | Q3_K | Q4_K | Q5_K | Q6_K => 4,
        _ => 8,
    };
    let offset = match block {
        Q4_0 => 8,
        Q5_0 => 16,
        Q3_K => 4,
        Q6_K => 32,
        _ => 0,
    };
    (words, matches!(block, Q4_1 | Q5_1 | Q2_K | Q4_K | Q5_K), offset)
}

/// The files that read the blocks of a type.
fn block_files(block: BlockType) -> Vec<&'static str> {
    const QUANTIZED: &str = include_str!("../../../shaders/quantized.wgsl");
    const NATURAL: &str = include_str!("../../../shaders/block/natural.wgsl");
    const PAIRED: &str = include_str!("../../../shaders/block/paired.wgsl");
    const STRIDED: &str = include_str!("../../../shaders/block/strided.wgsl");
    const FIFTH: &str = include_str!("../../../shaders/fifth_bits.wgsl");
    const SIX: &str = include_str!("../../../shaders/six_bits.wgsl");
    const NONLINEAR: &str = include_str!("../../../shaders/nonlinear.wgsl");
    macro_rules! file {
        ($name:literal) => {
            include_str!(concat!("../../../shaders/block/", $name, ".wgsl"))
        };
    }
    match block {
        BlockType::F32 => vec![NATURAL, file!("f32")],
        BlockType::F16 => vec![NATURAL, file!("f16")],
        BlockType::BF16 => vec![NATURAL, file!("bf16")],
        BlockType::Q4_0 => vec![QUANTIZED, NATURAL, file!("q4_0")],
        BlockType::Q4_1 => vec![QUANTIZED, NATURAL, file!("q4_1")],
        BlockType::Q5_0 => vec![QUANTIZED, NATURAL, FIFTH, file!("q5_0")],
        BlockType::Q5_1 => vec![QUANTIZED, NATURAL, FIFTH, file!("q5_1")],
        BlockType::Q8_0 => vec![QUANTIZED, NATURAL, file!("q8_0")],
        BlockType::Q2_K => vec![QUANTIZED, STRIDED, file!("q2_k")],
        BlockType::Q3_K => vec![QUANTIZED, STRIDED, file!("q3_k")],
        BlockType::Q4_K => vec![QUANTIZED, PAIRED, SIX, file!("q4_k")],
        BlockType::Q5_K => vec![QUANTIZED, PAIRED, SIX, file!("q5_k")],
        BlockType::Q6_K => vec![QUANTIZED, STRIDED, file!("q6_k")],
        BlockType::IQ4_NL => vec![QUANTIZED, NATURAL, NONLINEAR, file!("iq4_nl")],
        BlockType::IQ4_XS => vec![QUANTIZED, NATURAL, NONLINEAR, file!("iq4_xs")],
        other => unreachable!("{other} is not readable"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use naga::back::{hlsl, msl, spv};
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    #[test]
    fn short_loops_are_written_out_and_long_ones_are_left() {
        let source = "a for (var r = 0u; r < ROWS; r++) { x[r] = rr + r; } b \
                      for (var t = 0u; t < THREADS; t++) { for (var i = 0u; i < 8u; i += 4u) { f(i); } }";
        let written = "a { x[0u] = rr + 0u; }{ x[1u] = rr + 1u; } b \
                       for (var t = 0u; t < THREADS; t++) { { f(0u); }{ f(4u); } }";
        assert_eq!(unrolled(source, &[("ROWS", 2)]), written);
        let shader = Shader { columns: 8, ..Shader::weights(Frame::Matmul, BlockType::IQ4_XS) };
        let loops = |shader: Shader| shader.source().matches("for (var ").count();
        // Over chunks, and the ranges at the end.
        assert_eq!(loops(shader), 2);
        // Over ranges, chunks, groups of a piece, and the lanes at the end of a range.
        let tiled = Shader { frame: Frame::Tiled, columns: 32, ..shader };
        assert_eq!(loops(tiled), 4);
    }

    /// Through the compiler inside wgpu, to every language that a device may want.
    #[test]
    fn every_shader_compiles_for_vulkan_metal_and_dx12() {
        let capabilities = Capabilities::SUBGROUP
            | Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | Capabilities::SHADER_FLOAT16;
        let mut sizes = (0, 0, 0);
        for shader in Shader::all() {
            let name = format!("{} {:?}", shader.name(), shader);
            let source = shader.source();
            let module = naga::front::wgsl::parse_str(&source)
                .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
            let info = Validator::new(ValidationFlags::all(), capabilities)
                .validate(&module)
                .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));

            let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
            let words = spv::write_vec(&module, &info, &options, None)
                .unwrap_or_else(|e| panic!("{name}: SPIR-V: {e}"));
            let options = msl::Options {
                lang_version: (2, 4),
                fake_missing_bindings: true,
                ..msl::Options::default()
            };
            let (metal, _) =
                msl::write_string(&module, &info, &options, &msl::PipelineOptions::default())
                    .unwrap_or_else(|e| panic!("{name}: MSL: {e}"));
            let options = hlsl::Options {
                shader_model: hlsl::ShaderModel::V6_2,
                fake_missing_bindings: true,
                ..hlsl::Options::default()
            };
            let mut text = String::new();
            hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
                .write(&module, &info, None)
                .unwrap_or_else(|e| panic!("{name}: HLSL: {e}"));
            sizes = (sizes.0 + words.len(), sizes.1 + metal.len(), sizes.2 + text.len());

            let bindings = module.global_variables.iter().filter_map(|(_, v)| v.binding);
            let own = bindings.filter(|binding| binding.group == 0).count();
            assert_eq!(own, shader.access().len(), "{name}: bindings");
        }
        assert!(sizes.0 > 0 && sizes.1 > 0 && sizes.2 > 0);
    }
}
