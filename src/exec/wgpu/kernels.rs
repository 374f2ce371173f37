//! Kernels: a WGSL file for each operation, joined by text with what reads the blocks of a weight type, what
//! becomes of a product's sums, and the way threads exchange them. A [`Kernel`] names all that it is joined from.

use crate::exec::CacheType;
use crate::graph::{Activation, Gating, NormKind};
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

/// Rows of activations ("batch rows") that a product without tiles takes at once: the least that is enough, or
/// several times the largest.
pub(super) const BATCH_ROWS: [u32; 4] = [1, 2, 4, 8];

/// Matrices that one product can have.
pub(super) const MOST_OUTPUTS: usize = 3;

/// Weight rows that a thread of a tiled product has, and weight rows and batch rows of its tile.
const TILED_ROWS: u32 = 4;
pub(super) const TILE_ROWS: u32 = 32;
pub(super) const TILE_BATCH_ROWS: u32 = 32;

/// Rows of a chain for which attention reads keys and values once.
pub(super) const QUERIES: u32 = 4;

/// What a binding of a kernel is to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Access {
    Read,
    Write,
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

/// What is computed of each element of a buffer, and perhaps of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Function {
    Gate(Gate),
    Activate(Activation),
    Add,
    Scale,
    SoftCap,
}

/// A [`Gating`] without its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Gate {
    Activated(Activation),
    Clamped,
}

impl From<Gating> for Gate {
    fn from(gating: Gating) -> Self {
        match gating {
            Gating::Activated(activation) => Gate::Activated(activation),
            Gating::Clamped { .. } => Gate::Clamped,
        }
    }
}

fn activation_file(activation: Activation) -> &'static str {
    match activation {
        Activation::Relu => "functions/relu",
        Activation::Silu => "functions/silu",
        Activation::Gelu => "functions/gelu",
        Activation::GeluTanh => "functions/gelu_tanh",
    }
}

impl Gate {
    fn files(self) -> String {
        match self {
            Gate::Activated(activation) => {
                format!("functions/gated {}", activation_file(activation))
            }
            Gate::Clamped => "functions/clamped".to_owned(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Gate::Activated(Activation::Silu) => "swiglu",
            Gate::Activated(Activation::Gelu) => "geglu",
            Gate::Activated(Activation::GeluTanh) => "geglu_tanh",
            Gate::Activated(Activation::Relu) => "reglu",
            Gate::Clamped => "clamped swiglu",
        }
    }
}

impl Function {
    fn files(self) -> String {
        match self {
            Function::Gate(gate) => format!("functions/gate {}", gate.files()),
            Function::Activate(activation) => {
                format!("functions/activate {}", activation_file(activation))
            }
            Function::Add => "functions/add".to_owned(),
            Function::Scale => "functions/scale".to_owned(),
            Function::SoftCap => "functions/soft_cap".to_owned(),
        }
    }
}

/// What a product does with its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Epilogue {
    /// They go to one buffer, or are added to it.
    One,
    /// They go to up to [`MOST_OUTPUTS`] buffers.
    Three,
    /// They are added to a buffer, whose norm is written as bytes.
    Norm,
    /// They are gates and what is gated; the result goes to a buffer.
    Gate(Gate),
    /// They are queries, keys and values, which are rotated, and stored in the cache.
    Rope(CacheType),
}

/// A product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Matmul {
    /// The type of the weights.
    pub block: BlockType,
    pub arithmetic: Arithmetic,
    /// Batch rows at once; [`TILE_BATCH_ROWS`] where there are tiles.
    pub batch_rows: u32,
    pub epilogue: Epilogue,
}

impl Matmul {
    pub fn is_tiled(&self) -> bool {
        self.batch_rows == TILE_BATCH_ROWS
    }

    /// Weight rows that a thread has at once: the more batch rows there are, the more it pays to read one once
    /// for several rows of weights.
    fn thread_rows(&self) -> u32 {
        match (self.epilogue, self.batch_rows) {
            (_, TILE_BATCH_ROWS) => TILED_ROWS,
            (Epilogue::Gate(_), _) => 4,
            (_, ..=2) => 2,
            _ => 4,
        }
    }

    /// Groups of threads that have weight rows of their own.
    fn groups(&self) -> u32 {
        let rows = match self.epilogue {
            // A block of 32 results, from as many rows or twice as many.
            Epilogue::Norm => 32,
            Epilogue::Gate(_) => 64,
            // 128 threads.
            _ => return 128 / GROUP,
        };
        rows / self.thread_rows()
    }

    /// Weight rows of a workgroup.
    pub fn group_rows(&self) -> usize {
        let rows = if self.is_tiled() { TILE_ROWS } else { self.groups() * self.thread_rows() };
        rows as usize
    }

    /// The files that it is joined from, without those of its blocks.
    fn files(&self) -> String {
        let arithmetic = self.arithmetic.name();
        let form = if self.is_tiled() { "matmul_tiled" } else { "matmul_vec" };
        let mut files = format!("{form} {form}/{arithmetic} matmul factors/{arithmetic}");
        files += &match self.epilogue {
            Epilogue::One => " epilogues/one epilogues/elements".to_owned(),
            Epilogue::Three => " epilogues/three epilogues/elements".to_owned(),
            Epilogue::Norm => " epilogues/norm epilogues/blocks".to_owned(),
            Epilogue::Gate(gate) => format!(" epilogues/gate epilogues/blocks {}", gate.files()),
            Epilogue::Rope(_) => " epilogues/rope_append_kv rotation".to_owned(),
        };
        if !self.is_tiled() && matches!(self.epilogue, Epilogue::One | Epilogue::Three) {
            files += " epilogues/plain";
        }
        files += match self.arithmetic {
            Arithmetic::F32 => "",
            Arithmetic::Int8 => " int8",
            Arithmetic::F16 => " quantized_f16",
        };
        if self.is_tiled() && self.arithmetic != Arithmetic::Int8 {
            files += " matmul_tiled/floats";
        }
        files
    }
}

/// A kernel, by what it is joined from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Embed(BlockType),
    /// An RMSNorm of whole rows, with weights.
    RmsNorm,
    /// The same as bytes, without the factors of the rows, which products apply.
    RmsNormScale,
    /// A LayerNorm of whole rows, with weights and biases; `bytes`: written as bytes as well.
    LayerNorm {
        bytes: bool,
    },
    /// Any other norm.
    GroupNorm {
        kind: NormKind,
        weight: bool,
        bias: bool,
    },
    Quantize,
    CastF16,
    Matmul(Matmul),
    RopeAppendKv(CacheType),
    /// `pairs` pairs of elements are read at once, for `queries` rows.
    Attend {
        cache: CacheType,
        pairs: u32,
        queries: u32,
        bytes: bool,
    },
    AttendReduce {
        bytes: bool,
    },
    Elementwise {
        function: Function,
        bytes: bool,
    },
    SelectRows,
    MoveRows,
    TopK,
    TopKMerge,
    Stream,
}

impl Kernel {
    /// The bindings of its first group, in order.
    pub fn access(&self) -> &'static [Access] {
        use Access::{Read as R, Write as W};
        let bytes = self.writes_bytes();
        match self {
            Kernel::AttendReduce { .. } if bytes => &[R, W, W, W],
            Kernel::Embed(_)
            | Kernel::SelectRows
            | Kernel::AttendReduce { .. }
            | Kernel::TopK
            | Kernel::TopKMerge
            | Kernel::Stream => &[R, W],
            Kernel::RmsNorm => &[R, R, W],
            Kernel::RmsNormScale => &[R, R, W, W],
            Kernel::LayerNorm { .. } if bytes => &[R, R, R, W, W, W],
            Kernel::LayerNorm { .. } | Kernel::GroupNorm { .. } => &[R, R, R, W],
            Kernel::Matmul(matmul) => match matmul.epilogue {
                Epilogue::One => &[R, R, R, R, W],
                Epilogue::Three | Epilogue::Gate(_) | Epilogue::Rope(_) => &[R, R, R, R, W, W, W],
                Epilogue::Norm => &[R, R, R, R, W, R, W, W],
            },
            Kernel::Quantize | Kernel::CastF16 => &[R, W, W],
            Kernel::RopeAppendKv(_) => &[W, R, R, W, W],
            Kernel::Attend { .. } if bytes => &[R, R, R, W, W, W, W],
            Kernel::Attend { .. } => &[R, R, R, W, W],
            Kernel::Elementwise { .. } if bytes => &[W, R, W, W],
            Kernel::Elementwise { .. } => &[W, R],
            Kernel::MoveRows => &[W, W],
        }
    }

    /// What it is, for labels and tables.
    pub fn name(&self) -> String {
        let files = self.files();
        let own = files.split(' ').next().unwrap_or_default();
        match self {
            Kernel::Matmul(Matmul { block, arithmetic, batch_rows, epilogue }) => {
                let arithmetic = match arithmetic {
                    Arithmetic::F32 => String::new(),
                    other => format!(" {}", other.name()),
                };
                let epilogue = match epilogue {
                    Epilogue::One | Epilogue::Three => "",
                    Epilogue::Norm => ", norm",
                    Epilogue::Gate(gate) => &format!(", {}", gate.name()),
                    Epilogue::Rope(_) => ", rope_append_kv",
                };
                format!("{own} {block}{arithmetic} x{batch_rows}{epilogue}")
            }
            Kernel::Embed(block) => format!("embed {block}"),
            Kernel::Attend { queries, .. } if *queries > 1 => format!("attend x{queries}"),
            Kernel::Elementwise { function: Function::Gate(gate), .. } => gate.name().to_owned(),
            Kernel::Elementwise { function, .. } => function.files().replace("functions/", ""),
            _ => own.to_owned(),
        }
    }

    /// Roughly how many multiplications one of its workgroups does; `cols` are those of a product's weights.
    pub fn group_cost(&self, cols: usize) -> usize {
        match self {
            Kernel::Matmul(matmul) => matmul.group_rows() * matmul.batch_rows as usize * cols,
            Kernel::Attend { queries, .. } => 2 * SPLIT * MAX_HEAD * *queries as usize,
            _ => 1024,
        }
    }

    /// The files that it is joined from, its own first.
    fn files(&self) -> String {
        let mut files = match *self {
            Kernel::Embed(_) => "embed".to_owned(),
            Kernel::RmsNorm => "rms_norm total".to_owned(),
            Kernel::RmsNormScale => "rms_norm_scale int8".to_owned(),
            Kernel::LayerNorm { .. } => "layer_norm total".to_owned(),
            Kernel::GroupNorm { .. } => "group_norm".to_owned(),
            Kernel::Quantize => "quantize int8".to_owned(),
            Kernel::CastF16 => "cast_f16".to_owned(),
            Kernel::Matmul(matmul) => matmul.files(),
            Kernel::RopeAppendKv(_) => "rope_append_kv rotation".to_owned(),
            Kernel::Attend { cache, pairs, .. } => {
                format!("attend sink cached/{}_{pairs}", cache.name())
            }
            Kernel::AttendReduce { .. } => "attend_reduce sink".to_owned(),
            Kernel::Elementwise { function, .. } => format!("elementwise {}", function.files()),
            Kernel::SelectRows => "select_rows".to_owned(),
            Kernel::MoveRows => "move_rows".to_owned(),
            Kernel::TopK => "top_k sort".to_owned(),
            Kernel::TopKMerge => "top_k_merge sort".to_owned(),
            Kernel::Stream => "stream".to_owned(),
        };
        files += match (self.writes_bytes(), self.may_write_bytes()) {
            (true, _) if matches!(self, Kernel::Matmul(_) | Kernel::RmsNormScale) => {
                " rounded/bytes"
            }
            (true, _) => " rounded/bytes int8",
            (false, true) => " rounded/not",
            (false, false) => "",
        };
        if matches!(
            self,
            Kernel::RmsNormScale | Kernel::Matmul(Matmul { epilogue: Epilogue::Norm, .. })
        ) {
            files += " rounded/squares";
        }
        files + &self.block().map_or(String::new(), block_files)
    }

    /// The type of its weights, if it reads any in blocks.
    fn block(&self) -> Option<BlockType> {
        match self {
            Kernel::Embed(block) | Kernel::Matmul(Matmul { block, .. }) => Some(*block),
            _ => None,
        }
    }

    /// Whether it writes activations that products may read as bytes.
    fn may_write_bytes(&self) -> bool {
        match self {
            Kernel::LayerNorm { .. }
            | Kernel::Attend { .. }
            | Kernel::AttendReduce { .. }
            | Kernel::Elementwise { .. } => true,
            _ => self.writes_bytes(),
        }
    }

    /// Whether it writes its results as bytes (too).
    fn writes_bytes(&self) -> bool {
        match *self {
            Kernel::RmsNormScale => true,
            Kernel::LayerNorm { bytes }
            | Kernel::Attend { bytes, .. }
            | Kernel::AttendReduce { bytes }
            | Kernel::Elementwise { bytes, .. } => bytes,
            Kernel::Matmul(matmul) => matches!(matmul.epilogue, Epilogue::Norm | Epilogue::Gate(_)),
            _ => false,
        }
    }

    /// Whether threads exchange sums.
    fn exchanges(&self) -> bool {
        matches!(self, Kernel::RmsNorm)
            || matches!(self, Kernel::Matmul(matmul) if !matmul.is_tiled())
            || self.may_write_bytes()
    }

    /// Its WGSL: with `subgroups` threads exchange sums in registers, else through memory.
    pub fn source(&self, subgroups: bool) -> String {
        let (mut rows, mut batch_rows, mut groups) = (1, 1, 1);
        let (mut arithmetic, mut cache) = (Arithmetic::F32, CacheType::F16);
        let (mut pairs, mut queries) = (1, 1);
        match *self {
            Kernel::Matmul(matmul) => {
                rows = matmul.thread_rows();
                groups = matmul.groups();
                (batch_rows, arithmetic) = (matmul.batch_rows, matmul.arithmetic);
                if let Epilogue::Rope(stored) = matmul.epilogue {
                    cache = stored;
                }
            }
            Kernel::RopeAppendKv(stored) => cache = stored,
            Kernel::Attend { pairs: p, queries: q, .. } => (pairs, queries) = (p, q),
            _ => {}
        }
        let cache_f16 = cache == CacheType::F16;
        let (words, minima, offset) = self.block().map_or((8, false, 0), scales);
        let lengths = [
            ("ROWS", rows),
            ("BATCH_ROWS", batch_rows),
            ("EACH", batch_rows / TILED_ROWS),
            ("WORDS", words),
            // A piece of a tile is what workgroups have memory for.
            ("PIECE", if arithmetic == Arithmetic::Int8 { 8 } else { 2 }),
            ("SHARED", 8 / words),
            // Where there are many batch rows, there is enough to do while a block is on its way.
            ("AHEAD", if rows <= 2 { 2 } else { 1 }),
            // (Of 1, 2, 4 and 8, on an NVIDIA H200: more than two need more registers than there are.)
            ("FETCHED", batch_rows.min(2)),
            ("PAIRS", pairs),
            ("QUERIES", queries),
            ("SCORES", 4),
            ("KEY_READS", if pairs == 4 { 2 } else { 4 }),
            ("VALUES", if pairs == 4 { 8 } else { 16 }),
            ("NORMED", 4),
            ("CACHE_WORDS", if cache_f16 { 1 } else { 2 }),
            ("GROUPS", groups),
        ];
        let mut out = String::new();
        if arithmetic == Arithmetic::F16 || *self == Kernel::CastF16 {
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
        if let Kernel::GroupNorm { kind, weight, bias } = self {
            let layer = *kind == NormKind::Layer;
            out += &format!(
                "const LAYER = {layer};\nconst HAS_WEIGHT = {weight};\nconst HAS_BIAS = {bias};\n"
            );
        }
        if self.writes_bytes() {
            let first = self.access().len() - 2;
            for (at, name, element) in [(first, "bytes", "u32"), (first + 1, "scales", "f32")] {
                out += &format!(
                    "@group(0) @binding({at}) var<storage, read_write> rounded_{name}: array<{element}>;\n"
                );
            }
        }
        out += file("pass");
        self.files().split(' ').for_each(|name| out += file(name));
        if self.exchanges() {
            out += file(if subgroups { "threads/subgroups" } else { "threads/shared" });
        }
        unrolled(&out, &lengths)
    }
}

/// All WGSL files, by their names.
macro_rules! files {
    ($($name:literal)*) => {
        const FILES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../../shaders/", $name, ".wgsl")))),*];
    };
}

files! {
    "attend" "attend_reduce" "bytes" "cast_f16" "elementwise" "embed" "fifth_bits" "group_norm" "int8" "layer_norm" "matmul" "matmul_tiled"
    "matmul_vec" "move_rows" "nonlinear" "pass" "quantize" "quantized" "quantized_f16" "rms_norm" "rms_norm_scale" "rope_append_kv" "rotation"
    "select_rows" "sink" "six_bits" "sort" "stream" "top_k" "top_k_merge" "total"
    "block/bf16" "block/f16" "block/f32" "block/iq4_nl" "block/iq4_xs" "block/natural" "block/paired" "block/q2_k" "block/q3_k" "block/q4_0"
    "block/q4_1" "block/q4_k" "block/q5_0" "block/q5_1" "block/q5_k" "block/q6_k" "block/q8_0" "block/strided"
    "cached/f16_1" "cached/f16_2" "cached/f16_4" "cached/f32_1" "cached/f32_2"
    "epilogues/blocks" "epilogues/elements" "epilogues/gate" "epilogues/norm" "epilogues/one" "epilogues/plain" "epilogues/rope_append_kv"
    "epilogues/three" "factors/f16" "factors/f32" "factors/int8"
    "functions/activate" "functions/add" "functions/clamped" "functions/gate" "functions/gated" "functions/gelu" "functions/gelu_tanh"
    "functions/relu" "functions/scale" "functions/silu" "functions/soft_cap"
    "matmul_tiled/f16" "matmul_tiled/f32" "matmul_tiled/floats" "matmul_tiled/int8" "matmul_vec/f16" "matmul_vec/f32" "matmul_vec/int8"
    "rounded/bytes" "rounded/not" "rounded/squares" "threads/shared" "threads/subgroups"
}

fn file(name: &str) -> &'static str {
    FILES
        .iter()
        .find(|(found, _)| *found == name)
        .expect("kernels are joined from files that are there")
        .1
}

/// All text that kernels are made from: compiled ones are of no use to another version of it.
pub(super) fn all_text() -> String {
    let files = FILES.iter().map(|(_, text)| *text);
    files.chain([include_str!("kernels.rs")]).collect()
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
    use BlockType::*;
    let (words, minima) = match block {
        F32 | F16 | BF16 | Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS => (8, false),
        Q4_1 | Q5_1 => (8, true),
        Q2_K | Q4_K | Q5_K => (4, true),
        Q3_K | Q6_K => (4, false),
        other => unreachable!("{other} is not readable"),
    };
    // (Bytes of Q8_0 have a sign.)
    (words, minima, if block == Q8_0 { 0 } else { i32::from(block.offset()) })
}

/// The files that read the blocks of a type.
fn block_files(block: BlockType) -> String {
    use BlockType::*;
    let files = match block {
        F32 | F16 | BF16 => "block/natural",
        Q4_0 | Q4_1 | Q8_0 => "quantized block/natural",
        Q5_0 | Q5_1 => "quantized block/natural fifth_bits",
        IQ4_NL | IQ4_XS => "quantized block/natural nonlinear",
        Q2_K | Q3_K | Q6_K => "quantized block/strided",
        Q4_K | Q5_K => "quantized block/paired six_bits",
        other => unreachable!("{other} is not readable"),
    };
    format!(" bytes {files} block/{}", block.name().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::wgpu::tests::all_kernels;
    use naga::back::{hlsl, msl, spv};
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    /// Every kernel that can be asked for.
    fn all_kinds() -> Vec<Kernel> {
        use Activation::{Gelu, GeluTanh, Relu, Silu};
        let activations = [Relu, Silu, Gelu, GeluTanh];
        let gates = [&activations.map(Gate::Activated)[..], &[Gate::Clamped]].concat();
        let cache_types = CacheType::ALL.map(|(cache, _)| cache);
        let mut all = vec![
            Kernel::RmsNorm,
            Kernel::RmsNormScale,
            Kernel::Quantize,
            Kernel::CastF16,
            Kernel::SelectRows,
            Kernel::MoveRows,
            Kernel::TopK,
            Kernel::TopKMerge,
            Kernel::Stream,
        ];
        let functions = gates.iter().map(|gate| Function::Gate(*gate));
        let functions = functions.chain(activations.map(Function::Activate));
        let functions = functions.chain([Function::Add, Function::Scale, Function::SoftCap]);
        for function in functions {
            all.extend([false, true].map(|bytes| Kernel::Elementwise { function, bytes }));
        }
        for bytes in [false, true] {
            all.extend([Kernel::LayerNorm { bytes }, Kernel::AttendReduce { bytes }]);
            for (weight, bias) in [(false, false), (true, false), (false, true), (true, true)] {
                let kind = if bytes { NormKind::Rms } else { NormKind::Layer };
                all.push(Kernel::GroupNorm { kind, weight, bias });
            }
            for cache in cache_types {
                let pairs: &[u32] = if cache == CacheType::F16 { &[1, 2, 4] } else { &[1, 2] };
                for &pairs in pairs {
                    all.extend([1, QUERIES].map(|queries| Kernel::Attend {
                        cache,
                        pairs,
                        queries,
                        bytes,
                    }));
                }
            }
        }
        all.extend(cache_types.map(Kernel::RopeAppendKv));
        for block in BlockType::READABLE {
            all.push(Kernel::Embed(block));
            let arithmetics: &[_] = match block.is_float() {
                true => &[Arithmetic::F32],
                false => &[Arithmetic::F32, Arithmetic::Int8, Arithmetic::F16],
            };
            for &arithmetic in arithmetics {
                for batch_rows in BATCH_ROWS.into_iter().chain([TILE_BATCH_ROWS]) {
                    let mut epilogues = vec![Epilogue::One, Epilogue::Three];
                    if arithmetic == Arithmetic::Int8 && batch_rows != TILE_BATCH_ROWS {
                        epilogues.push(Epilogue::Norm);
                        epilogues.extend(cache_types.map(Epilogue::Rope));
                        // (All gates with one type and width; they differ in one function.)
                        let all = block == BlockType::Q4_0 && batch_rows == 1;
                        let gates = if all { &gates[..] } else { &gates[1..2] };
                        epilogues.extend(gates.iter().map(|gate| Epilogue::Gate(*gate)));
                    }
                    let matmul = |epilogue| Matmul { block, arithmetic, batch_rows, epilogue };
                    all.extend(epilogues.into_iter().map(|e| Kernel::Matmul(matmul(e))));
                }
            }
        }
        all
    }

    #[test]
    fn short_loops_are_written_out_and_long_ones_are_left() {
        let source = "a for (var r = 0u; r < ROWS; r++) { x[r] = rr + r; } b \
                      for (var t = 0u; t < THREADS; t++) { for (var i = 0u; i < 8u; i += 4u) { f(i); } }";
        let written = "a { x[0u] = rr + 0u; }{ x[1u] = rr + 1u; } b \
                       for (var t = 0u; t < THREADS; t++) { { f(0u); }{ f(4u); } }";
        assert_eq!(unrolled(source, &[("ROWS", 2)]), written);
        let (block, arithmetic) = (BlockType::IQ4_XS, Arithmetic::F32);
        let loops = |batch_rows| {
            let matmul = Matmul { block, arithmetic, batch_rows, epilogue: Epilogue::One };
            Kernel::Matmul(matmul).source(false).matches("for (var ").count()
        };
        // Over chunks, and the ranges at the end.
        assert_eq!(loops(8), 2);
        // Over ranges, chunks, groups of a piece, and the lanes at the end of a range.
        assert_eq!(loops(TILE_BATCH_ROWS), 4);
    }

    #[test]
    fn every_file_is_part_of_some_kernel() {
        let mut used = "pass threads/shared threads/subgroups".to_owned();
        all_kinds().iter().for_each(|kernel| used += &format!(" {}", kernel.files()));
        let used: Vec<_> = used.split(' ').collect();
        let mut names: Vec<_> = FILES.iter().map(|(name, _)| *name).collect();
        assert!(names.iter().all(|name| used.contains(name)), "{names:?}, not {used:?}");
        // And there are no others.
        let mut found = Vec::new();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/shaders");
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => found.extend(entry.read_dir().unwrap().map(|e| e.unwrap().path())),
                false => found.push(entry),
            }
        }
        let name = |path: &std::path::PathBuf| {
            let path = path.strip_prefix(folder).unwrap().with_extension("");
            path.to_str().unwrap().replace('\\', "/")
        };
        let mut found: Vec<_> = found.iter().map(name).collect();
        names.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, names);
    }

    /// Through the compiler inside wgpu, to every language that a device may want.
    #[test]
    fn every_shader_compiles_for_vulkan_metal_and_dx12() {
        let capabilities = Capabilities::SUBGROUP
            | Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | Capabilities::SHADER_FLOAT16;
        let mut sizes = (0, 0, 0);
        let mut kernels: Vec<_> = all_kinds().into_iter().map(|kernel| (kernel, false)).collect();
        for (i, kernel) in all_kinds().into_iter().enumerate() {
            // (Of products, one in five with subgroups, unless all are asked for.)
            let wanted = all_kernels() || i % 5 == 0 || !matches!(kernel, Kernel::Matmul(_));
            kernels.extend((kernel.exchanges() && wanted).then_some((kernel, true)));
        }
        for (kernel, subgroups) in kernels {
            let name = format!("{} {kernel:?}", kernel.name());
            let source = kernel.source(subgroups);
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
            assert_eq!(own, kernel.access().len(), "{name}: bindings");
        }
        assert!(sizes.0 > 0 && sizes.1 > 0 && sizes.2 > 0);
    }
}
