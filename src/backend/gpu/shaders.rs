//! Shaders: a frame for each operation, joined by text with the block file of a weight type and the
//! way threads exchange sums. A shader is named by what it is joined from.

use crate::quant::BlockType;

/// Positions that one workgroup of an attention takes.
pub(super) const SPLIT: usize = 256;

/// The longest head that attention has room for.
pub(super) const MAX_HEAD: usize = 256;

/// Words of a row's path: how many tree rows it sees, and their places, four to a word.
pub(super) const PATH_WORDS: usize = 1 + 128 / 4;

/// Weight rows that a thread of a product has at once.
pub(super) const ROWS: u32 = 2;

/// Weight rows of a workgroup of a product.
pub(super) const TILE_ROWS: u32 = 4 * ROWS;

/// Rows of activations that a product takes at once: the least that is enough, or several times
/// the largest.
pub(super) const COLUMNS: [u32; 4] = [1, 2, 4, 8];

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
    Matmul,
    Quantize,
    MatmulInt8,
    RotateStore,
    Attend,
    Combine,
    Swiglu,
    Relu,
    Gather,
    MoveRows,
    Largest,
}

/// What a shader is joined from; fields that a frame has no use for have their least value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shader {
    pub frame: Frame,
    /// The type of the weights.
    pub block: Option<BlockType>,
    /// Rows of activations at once.
    pub columns: u32,
    /// Threads that exchange sums in registers; 1 is none.
    pub subgroup: u32,
    /// Whether the cache is stored in half precision.
    pub cache_f16: bool,
}

impl Shader {
    /// A frame that needs nothing else.
    pub fn plain(frame: Frame) -> Self {
        Shader { frame, block: None, columns: 1, subgroup: 1, cache_f16: false }
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
            Frame::Embed | Frame::Gather | Frame::Combine | Frame::Largest => &[Read, Write],
            Frame::RmsNorm => &[Read, Read, Write],
            Frame::LayerNorm => &[Read, Read, Read, Write],
            Frame::Matmul => &[Read, Read, Read, Write],
            Frame::Quantize => &[Read, Write, Write],
            Frame::MatmulInt8 => &[Read, Read, Read, Read, Write],
            Frame::RotateStore => &[Write, Read, Read, Write, Write],
            Frame::Attend => &[Read, Read, Read, Write, Write],
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
            Frame::Matmul => "matmul",
            Frame::Quantize => "quantize",
            Frame::MatmulInt8 => "matmul_int8",
            Frame::RotateStore => "rotate_store",
            Frame::Attend => "attend",
            Frame::Combine => "combine",
            Frame::Swiglu => "swiglu",
            Frame::Relu => "relu",
            Frame::Gather => "gather",
            Frame::MoveRows => "move_rows",
            Frame::Largest => "largest",
        }
        .to_owned();
        if let Some(block) = self.block {
            name += &format!(" {block}");
        }
        if matches!(self.frame, Frame::Matmul | Frame::MatmulInt8) {
            name += &format!(" x{}", self.columns);
        }
        name
    }

    /// Its WGSL.
    pub fn source(&self) -> String {
        let Shader { columns, cache_f16, .. } = self;
        let mut out = format!(
            "const COLUMNS = {columns}u;\nconst ROWS = {ROWS}u;\nconst CACHE_F16 = {cache_f16};\n\
             const SPLIT = {SPLIT}u;\nconst MAX_HEAD = {MAX_HEAD}u;\nconst PATH_WORDS = {PATH_WORDS}u;\n"
        );
        out += include_str!("../../../shaders/pass.wgsl");
        out += match self.frame {
            Frame::Embed => include_str!("../../../shaders/embed.wgsl"),
            Frame::RmsNorm => include_str!("../../../shaders/rms_norm.wgsl"),
            Frame::LayerNorm => include_str!("../../../shaders/layer_norm.wgsl"),
            Frame::Matmul => include_str!("../../../shaders/matmul.wgsl"),
            Frame::Quantize => include_str!("../../../shaders/quantize.wgsl"),
            Frame::MatmulInt8 => include_str!("../../../shaders/matmul_int8.wgsl"),
            Frame::RotateStore => include_str!("../../../shaders/rotate_store.wgsl"),
            Frame::Attend => include_str!("../../../shaders/attend.wgsl"),
            Frame::Combine => include_str!("../../../shaders/combine.wgsl"),
            Frame::Swiglu => include_str!("../../../shaders/swiglu.wgsl"),
            Frame::Relu => include_str!("../../../shaders/relu.wgsl"),
            Frame::Gather => include_str!("../../../shaders/gather.wgsl"),
            Frame::MoveRows => include_str!("../../../shaders/move_rows.wgsl"),
            Frame::Largest => include_str!("../../../shaders/largest.wgsl"),
        };
        if matches!(self.frame, Frame::Matmul | Frame::MatmulInt8) {
            out += include_str!("../../../shaders/product.wgsl");
        }
        if self.sums() {
            if self.subgroup > 1 {
                out += &format!("const SUBGROUP = {}u;\n", self.subgroup);
                out += include_str!("../../../shaders/threads/subgroups.wgsl");
            } else {
                out += include_str!("../../../shaders/threads/shared.wgsl");
            }
        }
        if let Some(block) = self.block {
            out += include_str!("../../../shaders/bytes.wgsl");
            block_files(block).iter().for_each(|file| out += file);
        }
        unrolled(&out, *columns)
    }

    /// Whether threads add up sums.
    pub fn sums(&self) -> bool {
        use Frame::{LayerNorm, Matmul, MatmulInt8, RmsNorm};
        matches!(self.frame, Matmul | MatmulInt8 | RmsNorm | LayerNorm)
    }

    /// Every shader that can be asked for, with subgroups of each size.
    #[cfg(test)]
    pub fn all() -> Vec<Shader> {
        let mut all = Vec::new();
        for subgroup in [1, 4, 8, 16, 32] {
            let norms = [Frame::RmsNorm, Frame::LayerNorm];
            all.extend(norms.map(|norm| Shader { subgroup, ..Shader::plain(norm) }));
            for block in BlockType::READABLE {
                for columns in COLUMNS {
                    let frames: &[_] = match block.is_float() {
                        true => &[Frame::Matmul],
                        false => &[Frame::Matmul, Frame::MatmulInt8],
                    };
                    all.extend(frames.iter().map(|&frame| Shader {
                        subgroup,
                        columns,
                        ..Shader::weights(frame, block)
                    }));
                }
            }
        }
        all.extend(BlockType::READABLE.map(|block| Shader::weights(Frame::Embed, block)));
        for cache_f16 in [false, true] {
            all.push(Shader::cache(Frame::RotateStore, cache_f16));
            all.push(Shader::cache(Frame::Attend, cache_f16));
        }
        let plain = [
            Frame::Quantize,
            Frame::Combine,
            Frame::Swiglu,
            Frame::Relu,
            Frame::Gather,
            Frame::MoveRows,
            Frame::Largest,
        ];
        all.extend(plain.map(Shader::plain));
        all
    }
}

/// Writes out the loops of a shader that begin at 0 and take a fixed number of turns, eight at most.
///
/// Drivers differ in which loops they unroll, and an array that a loop goes through is kept in
/// registers only if they do.
fn unrolled(source: &str, columns: u32) -> String {
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
    let (body, after) = (unrolled(&loop_[open..=close], columns), &loop_[close + 1..]);
    let mut out = before.to_owned();
    match turns(&loop_[HEAD.len()..open], columns) {
        Some((name, turns)) => {
            turns.for_each(|turn| out += &replaced(&body, name, &format!("{turn}u")));
        }
        None => out += &format!("{}{body}", &loop_[..open]),
    }
    out + &unrolled(after, columns)
}

/// The variable of a loop and its values, from `i = 0u; i < 8u; i += 2u) `, if they are few.
fn turns(head: &str, columns: u32) -> Option<(&str, impl Iterator<Item = u32>)> {
    let number = |text: &str| text.strip_suffix('u').and_then(|n| n.parse().ok());
    let mut parts = head.trim().strip_suffix(')')?.split("; ");
    let name = parts.next()?.strip_suffix(" = 0u")?;
    let end = match parts.next()?.strip_prefix(name)?.strip_prefix(" < ")? {
        "ROWS" => ROWS,
        "COLUMNS" => columns,
        other => number(other)?,
    };
    let step = match parts.next()?.strip_prefix(name)? {
        "++" => 1,
        other => number(other.strip_prefix(" += ")?)?,
    };
    (end / step <= 8).then(|| (name, (0..end).step_by(step as usize)))
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
        assert_eq!(unrolled(source, 1), written);
        let shader = Shader { columns: 8, ..Shader::weights(Frame::Matmul, BlockType::IQ4_XS) };
        let source = shader.source();
        let loops: Vec<_> = source.matches("for (var ").collect();
        // Over chunks, outputs, and the pieces of a sum.
        assert_eq!(loops.len(), 3, "{source}");
    }

    /// Through the compiler inside wgpu, to every language that a device may want.
    #[test]
    fn every_shader_compiles_for_vulkan_metal_and_dx12() {
        let capabilities = Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        let mut sizes = (0, 0, 0);
        for shader in Shader::all() {
            let name = format!("{} subgroup {}", shader.name(), shader.subgroup);
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
                shader_model: hlsl::ShaderModel::V6_0,
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
