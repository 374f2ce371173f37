//! How text is cut into words before merging: `tokenizer.ggml.pre` names it.
//!
//! Cuts are made one after another, each within the parts that the one before it left. They are
//! the expressions of the models' authors in the form in which llama.cpp applies them, so that
//! ids are the same: where it reads `\p{Lu}` and `\p{Ll}` as any letter, or takes the case of
//! ASCII letters only, so does the table.
//!
//! Expressions run on automata, which know no look-ahead. The only one that matters is that of
//! `\s+(?!\S)`: white space leaves its last character to the word behind it. [`Spaces`] does that
//! by hand, in linear time and without limits.

use regex_automata::meta::{BuildError, Regex};
use regex_automata::{Anchored, Input};

/// One cut.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Every match is a part, and so is what lies between matches.
    Each(&'static str),
    /// The same, with white space as one more, last alternative.
    Words(&'static str, Spaces),
    /// Digits in threes from the right. What stands before them goes with the first of them.
    Triples,
    /// `(?=(\d{3})+(?!\d))`: in front of every group of three ASCII digits from the right.
    AsciiTriples,
}

/// How white space that no other alternative took is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spaces {
    /// `\s+(?!\S)|\s+`: whole, but for the character before a word.
    Whole,
    /// `\s{512}(?!\S)|\s{256}(?!\S)|..|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}`: likewise, in powers of 2.
    Powers,
}

/// How the words are spelled for merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Each byte as a printable character.
    Bytes,
    /// As text with `▁` for a space, and bytes for what has no token.
    Text,
}

/// Names that cut alike.
struct Kind {
    names: &'static [&'static str],
    cuts: &'static [Cut],
}

use Cut::{AsciiTriples, Each, Triples, Words};
use Spaces::{Powers, Whole};

const GPT2: Cut = Words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+", Whole);

/// English contractions, in either case.
macro_rules! contractions {
    () => {
        r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    };
}

/// Llama 3's words and those of its relatives: what begins them, and numbers.
macro_rules! llama3 {
    ($before:expr, $numbers:literal) => {
        concat!(
            $before,
            r"[^\r\n\p{L}\p{N}]?\p{L}+|",
            $numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        )
    };
}

const LLAMA3: &str = llama3!(concat!(contractions!(), "|"), r"\p{N}{1,3}");
const QWEN2: &str = llama3!(concat!(contractions!(), "|"), r"\p{N}");

/// Words of lower- and upper-case letters, which may overlap; what may follow them; numbers.
macro_rules! cased {
    ($upper:literal, $lower:literal, $after:expr, $numbers:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?",
            $upper,
            "*",
            $lower,
            "+",
            $after,
            r"|[^\r\n\p{L}\p{N}]?",
            $upper,
            "+",
            $lower,
            "*",
            $after,
            "|",
            $numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
        )
    };
}

/// A contraction may end a word.
macro_rules! contracted {
    () => {
        concat!("(?:", contractions!(), ")?")
    };
}

/// Punctuation with the Latin letters behind it, words with marks, punctuation.
const LATIN_MARKS: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
);

/// Chinese characters and kana.
const CHINESE_JAPANESE: Cut = Each(r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+");

/// Scripts from U+0800 on, Chinese characters and Hangul.
const EASTERN: Cut = Each(r"[[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]--\s]+");

/// Everything but white space, a bar, round brackets and the marks that end sentences.
const UNTIL_PUNCTUATION: Cut =
    Each(r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C})]+");

/// Cased letters, as DeepSeek lists them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}",
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}",
    r"\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}",
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}",
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}",
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}",
    r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}",
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}",
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}",
    r"\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}",
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}",
    r"\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}]+"
);

/// Kimi's words: Chinese characters apart from other letters.
const KIMI: &str = concat!(
    "[",
    r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}",
    r"\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{2CEB0}-\x{2EBEF}\x{2F800}-\x{2FA1F}",
    r"]+|[^\r\n\p{L}\p{N}]?[\p{L}--[",
    r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}",
    r"\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{2CEB0}-\x{2EBEF}\x{2F800}-\x{2FA1F}",
    r"]]+",
    contracted!(),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
);

/// Lines and what is between them.
const LINES: Cut = Each(r"[^\n]+|\n+");

/// Every name, with those that cut alike together.
const KINDS: &[Kind] = &[
    Kind {
        names: &["default"],
        cuts: &[Each(r"[\p{P}$+<=>^~|]+"), GPT2, Each(r"\p{N}+"), Each("[0-9][0-9][0-9]")],
    },
    Kind {
        names: &[
            "gpt-2",
            "a.x-4.0",
            "exaone4",
            "gigachat",
            "granite-docling",
            "jais",
            "jina-de",
            "jina-es",
            "jina-v1-en",
            "jina-v2-code",
            "jina-v2-de",
            "jina-v2-es",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "phi-2",
            "roberta-bpe",
            "trillion",
        ],
        cuts: &[GPT2],
    },
    Kind {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "chatglm-bpe",
            "dbrx",
            "falcon-h1",
            "falcon3",
            "glm4",
            "glm5",
            "jina-v5-nano",
            "lfm2",
            "midm-2.0",
            "pixtral",
            "smaug-bpe",
        ],
        cuts: &[Words(LLAMA3, Whole)],
    },
    Kind { names: &["jais-2"], cuts: &[Words(LLAMA3, Powers)] },
    Kind {
        names: &["minicpm5"],
        cuts: &[
            Each(r"\p{N}{1,3}"),
            Words(llama3!(concat!(contractions!(), "|"), r"\p{N}+"), Whole),
        ],
    },
    // (`\s*[\r\n]`, as Ling has it, takes as much as `\s*[\r\n]+`.)
    Kind {
        names: &[
            "qwen2",
            "bailingmoe",
            "bailingmoe2",
            "deepseek-r1-qwen",
            "f2llmv2",
            "grok-2",
            "hunyuan",
            "kormo",
            "llada-moe",
            "megrez",
            "solar-open",
            "stablelm2",
        ],
        cuts: &[Words(QWEN2, Whole)],
    },
    Kind { names: &["laguna"], cuts: &[LINES, Words(QWEN2, Whole)] },
    Kind { names: &["ufakzeka"], cuts: &[Words(llama3!("", r"\p{N}"), Whole)] },
    Kind {
        names: &["qwen35"],
        cuts: &[Words(
            concat!(
                contractions!(),
                r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                r"|\s*[\r\n]+"
            ),
            Whole,
        )],
    },
    Kind {
        names: &["seed-coder"],
        cuts: &[Words(
            concat!(
                contractions!(),
                r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
            ),
            Whole,
        )],
    },
    Kind {
        names: &["exaone-moe"],
        cuts: &[Words(
            concat!(
                contractions!(),
                r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
            ),
            Whole,
        )],
    },
    Kind {
        names: &["tekken"],
        cuts: &[Words(cased!(r"[\p{L}--[a-z]]", r"[\p{L}--[A-Z]]", "", r"\p{N}"), Whole)],
    },
    Kind {
        names: &["gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie"],
        cuts: &[Words(
            cased!(r"[\p{L}--[a-z]]", r"[\p{L}--[A-Z]]", contracted!(), r"\p{N}{1,3}"),
            Whole,
        )],
    },
    Kind {
        names: &["granite-embed-multi-97m"],
        cuts: &[Words(
            cased!(r"[\p{L}\p{M}--[a-z]]", r"[\p{L}\p{M}--[A-Z]]", contracted!(), r"\p{N}{1,3}"),
            Whole,
        )],
    },
    Kind { names: &["kimi-k2"], cuts: &[Words(KIMI, Whole)] },
    Kind {
        names: &["tiny_aya", "cohere2moe"],
        cuts: &[
            Triples,
            Words(cased!(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", contracted!(), r"\p{N}{1,3}"), Whole),
        ],
    },
    Kind {
        names: &["youtu"],
        cuts: &[
            Each(concat!(
                r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+",
                r"|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}",
                r"\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+",
                r"|[\x{3105}-\x{312F}]+|[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
            )),
            Words(cased!(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", contracted!(), r"\p{N}"), Whole),
        ],
    },
    Kind { names: &["superbpe"], cuts: &[Each(r"\p{N}+"), AsciiTriples] },
    Kind {
        names: &[
            "starcoder",
            "codeshell",
            "command-r",
            "exaone",
            "mellum2",
            "minerva-7b",
            "refact",
            "smollm",
        ],
        cuts: &[Each(r"\p{N}"), GPT2],
    },
    Kind { names: &["falcon"], cuts: &[Each(r"[\p{P}$+<=>^~|`]+"), GPT2, Each("[0-9][0-9][0-9]")] },
    Kind {
        names: &["chameleon"],
        cuts: &[
            Each("<sentinel:[0-9]+>"),
            Each("IMGIMG[A-I]{1,4}Z"),
            Each(r"[\t\n]|    |  "),
            Each(r"\p{N}"),
            Each(r"[\p{P}!-/:-@\[-`{-~]"),
            GPT2,
        ],
    },
    Kind { names: &["bloom", "gpt3-finnish", "poro-chat"], cuts: &[UNTIL_PUNCTUATION] },
    Kind { names: &["viking"], cuts: &[UNTIL_PUNCTUATION, Each(r"\p{N}")] },
    Kind {
        names: &["deepseek-llm"],
        cuts: &[
            Each(r"[\r\n]"),
            Each(DEEPSEEK_LETTERS),
            Each(concat!(
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}",
                r"\x{3001}-\x{3002}]+"
            )),
            Each(r"\s+$"),
            EASTERN,
            Each(r"\p{N}+"),
        ],
    },
    Kind {
        names: &["deepseek-coder"],
        cuts: &[Each(r"[\r\n]"), Each(r"\s?\p{L}+"), Each(r"\s?\p{P}+"), EASTERN, Each(r"\p{N}")],
    },
    Kind {
        names: &["deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"],
        cuts: &[Each(r"\p{N}{1,3}"), CHINESE_JAPANESE, Words(LATIN_MARKS, Whole)],
    },
    Kind {
        names: &["spark2_5"],
        cuts: &[
            Each(r"\p{N}{1,3}"),
            CHINESE_JAPANESE,
            Words(
                concat!(
                    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
                    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]"
                ),
                Whole,
            ),
            Each(r"\p{N}"),
        ],
    },
    Kind {
        names: &["afmoe"],
        cuts: &[
            Triples,
            Each(concat!(
                r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}",
                r"\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}\x{0E40}-\x{0E7F}",
                r"\x{0E80}-\x{0EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}",
                r"\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
            )),
            Words(LATIN_MARKS, Whole),
        ],
    },
    Kind { names: &AS_TEXT, cuts: &[LINES] },
];

/// Names whose texts are spelled as text rather than as bytes.
const AS_TEXT: [&str; 3] = ["gemma4", "granite-embed-multi-311m", "sarvam-moe"];

/// Names that take a word which is a token before any merge.
const WHOLE_WORDS: [&str; 15] = [
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "glm4",
    "glm5",
    "minicpm5",
    "youtu",
    "granite-embed-multi-97m",
];

/// Names whose texts begin with a token unless the file says otherwise.
const WITH_BOS: [&str; 13] = [
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
    "gemma4",
    "granite-embed-multi-311m",
];

/// A pre-tokenizer by its name, with what else the name decides.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    cuts: Vec<Compiled>,
    /// How words are spelled.
    pub spelling: Spelling,
    /// Whether a word that is a token is taken before any merge.
    pub whole_words: bool,
    /// Whether texts begin with a token unless the file says otherwise.
    pub with_bos: bool,
    /// Whether a run of line ends that is a token is taken before any merge.
    pub whole_lines: bool,
}

#[derive(Debug)]
enum Compiled {
    Each(Regex),
    Words {
        regex: Regex,
        spaces: Spaces,
        /// Another alternative takes white space that ends in a line's end.
        keeps_line_ends: bool,
    },
    Triples,
    AsciiTriples,
}

impl PreTokenizer {
    /// The pre-tokenizer of that name; `None` if there is none.
    pub fn named(name: &str) -> Option<Self> {
        let kind = KINDS.iter().find(|kind| kind.names.contains(&name))?;
        let cuts = kind.cuts.iter().map(Compiled::new).collect::<Result<_, _>>();
        let has = |names: &[&str]| names.contains(&name);
        Some(PreTokenizer {
            cuts: cuts.expect("the table's expressions are sound: a test compiles them all"),
            spelling: if has(&AS_TEXT) { Spelling::Text } else { Spelling::Bytes },
            whole_words: has(&WHOLE_WORDS),
            with_bos: has(&WITH_BOS),
            whole_lines: has(&["gemma4", "granite-embed-multi-311m"]),
        })
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KINDS.iter().flat_map(|kind| kind.names).copied()
    }

    /// Gives every word of `text` to `take`, in order and without gaps.
    pub fn split<'t>(&self, text: &'t str, take: &mut dyn FnMut(&'t str)) {
        split(&self.cuts, text, take);
    }
}

fn split<'t>(cuts: &[Compiled], text: &'t str, take: &mut dyn FnMut(&'t str)) {
    match cuts.split_first() {
        None if text.is_empty() => {}
        None => take(text),
        Some((cut, rest)) => cut.apply(text, &mut |part| split(rest, part, take)),
    }
}

impl Compiled {
    fn new(cut: &Cut) -> Result<Self, Box<BuildError>> {
        Ok(match *cut {
            Cut::Each(pattern) => Compiled::Each(Regex::new(pattern)?),
            Cut::Words(pattern, spaces) => Compiled::Words {
                regex: Regex::new(&format!(r"{pattern}|\s+"))?,
                spaces,
                keeps_line_ends: pattern.contains(r"\s*[\r\n]"),
            },
            Cut::Triples => Compiled::Triples,
            Cut::AsciiTriples => Compiled::AsciiTriples,
        })
    }

    fn apply<'t>(&self, text: &'t str, take: &mut dyn FnMut(&'t str)) {
        match self {
            Compiled::Each(regex) => isolate(regex, text, take),
            Compiled::Words { regex, spaces, keeps_line_ends } => {
                words(regex, *spaces, *keeps_line_ends, text, take);
            }
            Compiled::Triples => triples(text, take),
            Compiled::AsciiTriples => ascii_triples(text, take),
        }
    }
}

/// Cuts `text` at both ends of every match.
fn isolate<'t>(regex: &Regex, text: &'t str, take: &mut dyn FnMut(&'t str)) {
    let mut done = 0;
    for found in regex.find_iter(text) {
        if done < found.start() {
            take(&text[done..found.start()]);
        }
        if !found.is_empty() {
            take(&text[found.range()]);
        }
        done = found.end();
    }
    if done < text.len() {
        take(&text[done..]);
    }
}

/// Cuts `text` into matches and what lies between them.
///
/// White space in front of a word gives its last character back, so that the word can take it.
/// Only `\s+` ends in white space, or, where line ends are kept, in other white space than those:
/// the last character tells that it was this alternative which matched.
fn words<'t>(
    regex: &Regex,
    spaces: Spaces,
    keeps_line_ends: bool,
    text: &'t str,
    take: &mut dyn FnMut(&'t str),
) {
    let mut at = 0;
    while at < text.len() {
        let here = Input::new(text).range(at..).anchored(Anchored::Yes);
        let mut end = match regex.search_half(&here) {
            Some(end) => end.offset(),
            // No alternative begins here: up to the next match it is a part.
            None => {
                let next = regex.search(&Input::new(text).range(at..));
                let end = next.map_or(text.len(), |found| found.start());
                take(&text[at..end]);
                at = end;
                continue;
            }
        };
        let last = text[at..end].chars().next_back().unwrap_or('x');
        let is_space = last.is_whitespace() && !(keeps_line_ends && matches!(last, '\r' | '\n'));
        if is_space {
            if end < text.len() && end > at + last.len_utf8() {
                end -= last.len_utf8();
            }
            if spaces == Spaces::Powers {
                at = powers(text, at, end, take);
                continue;
            }
        }
        take(&text[at..end]);
        at = end;
    }
}

/// Cuts white space into pieces of 512, 256 .. 4, 2, 1 characters; returns `end`.
fn powers<'t>(text: &'t str, mut at: usize, end: usize, take: &mut dyn FnMut(&'t str)) -> usize {
    let mut left = text[at..end].chars().count();
    while left > 0 {
        let count = (1 << left.ilog2()).min(512);
        let len: usize = text[at..end].chars().take(count).map(char::len_utf8).sum();
        take(&text[at..at + len]);
        at += len;
        left -= count;
    }
    end
}

/// Cuts runs of digits into groups of three from the right. What stands before a run goes with its
/// first group.
fn triples<'t>(text: &'t str, take: &mut dyn FnMut(&'t str)) {
    let mut done = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((start, c)) = chars.next() {
        if !c.is_numeric() {
            continue;
        }
        // Where each digit of the run begins.
        let mut digits = vec![start];
        while let Some((at, _)) = chars.next_if(|&(_, c)| c.is_numeric()) {
            digits.push(at);
        }
        let end = chars.peek().map_or(text.len(), |&(at, _)| at);
        let first = (digits.len() - 1) % 3 + 1;
        for end in digits[first..].iter().step_by(3).copied().chain([end]) {
            take(&text[done..end]);
            done = end;
        }
    }
    if done < text.len() {
        take(&text[done..]);
    }
}

/// Cuts in front of every group of three digits that a run of them has from the right.
fn ascii_triples<'t>(text: &'t str, take: &mut dyn FnMut(&'t str)) {
    let bytes = text.as_bytes();
    let (mut done, mut at) = (0, 0);
    while at < bytes.len() {
        let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        for cut in (at + digits % 3..at + digits).step_by(3).filter(|&cut| cut > 0) {
            if done < cut {
                take(&text[done..cut]);
                done = cut;
            }
        }
        at += digits.max(1);
    }
    if done < text.len() {
        take(&text[done..]);
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::utils::SysRegex;

    use super::*;

    fn cut(name: &str, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        let pre = PreTokenizer::named(name).unwrap();
        pre.split(text, &mut |word| words.push(word.to_owned()));
        assert_eq!(words.concat(), text);
        words
    }

    #[test]
    fn every_name_has_a_kind_and_only_one() {
        let names: Vec<_> = PreTokenizer::names().collect();
        assert_eq!(names.len(), 90);
        for (i, name) in names.iter().enumerate() {
            assert!(PreTokenizer::named(name).is_some(), "{name}");
            assert!(!names[..i].contains(name), "{name} is there twice");
        }
        for name in AS_TEXT.iter().chain(&WHOLE_WORDS).chain(&WITH_BOS) {
            assert!(names.contains(name), "{name}");
        }
        assert!(PreTokenizer::named("").is_none() && PreTokenizer::named("gpt2").is_none());
    }

    #[test]
    fn spaces_go_to_the_word_behind_them() {
        let text = "I'll  go\n\n now,\t\t12345   ";
        let words = ["I", "'ll", " ", " go", "\n\n", " now", ",", "\t", "\t", "12345", "   "];
        assert_eq!(cut("gpt-2", text), words);
        let words = ["I", "'ll", " ", " go", "\n\n", " now", ",", "\t", "\t", "123", "45", "   "];
        assert_eq!(cut("llama-bpe", text), words);
        let words = [
            "I", "'ll", " ", " go", "\n\n", " now", ",", "\t", "\t", "1", "2", "3", "4", "5", "   ",
        ];
        assert_eq!(cut("qwen2", text), words);
        assert_eq!(cut("gpt-2", "\n\nx"), ["\n", "\n", "x"]);
        assert_eq!(cut("llama-bpe", "\n\nx"), ["\n\n", "x"]);
        assert_eq!(cut("llama-bpe", " \n  x!\n\ny'S"), [" \n", " ", " x", "!\n\n", "y", "'S"]);
    }

    #[test]
    fn the_default_cuts_punctuation_and_numbers_apart() {
        let words = ["don", "'", "t", " ", "123", "4", " a", " ", "+=", "  ", "...", "½", "x"];
        assert_eq!(cut("default", "don't 1234 a +=  ...½x"), words);
    }

    /// For every two kinds whose expressions differ a text that they cut differently, so that no
    /// kind can stand in for another. These texts do it for all of them.
    const TELLING: [&str; 6] = [
        "McDonald's ÉCOLE'S  12345 x+=y`z\u{301}é  \n\n  中文かな １２３٣ don't.Stop(a)/b\n/\n",
        "a \r\n\t\tb  12  한국어。 ok\u{301}k 3rd 1234567! ~!\n  $5.00 ІІ ſ   \n   x  ",
        "<sentinel:12>IMGIMGABZ \t(x|y)…z ;a:b 12½ 2\n\nb\u{200d}  c          d",
        "l'Élan K'S don'T ΑΒγ ab c'ree 中a文b3",
        "(_.x)\r\n//\n!\n\n #tag a/b/ 99999 ๓๔๕๖ ㄅㄆ ㄱ ！…“x”",
        "ab1234 \u{301}x  9 + \u{e000} \u{301}  क्षि the quick 42 fox\u{a0}\u{a0}y '\u{301}s",
    ];

    #[test]
    fn kinds_differ() {
        let first = |kind: &Kind| kind.names[0];
        for (i, a) in KINDS.iter().enumerate() {
            for b in &KINDS[..i] {
                let differs = TELLING.iter().any(|text| cut(first(a), text) != cut(first(b), text));
                assert!(differs, "{} and {} cut these texts alike", first(a), first(b));
            }
        }
    }

    #[test]
    fn digits_go_in_threes_from_the_right() {
        assert_eq!(cut("superbpe", "a 1234567b"), ["a ", "1", "234", "567", "b"]);
        assert_eq!(cut("superbpe", "٣٣٣٣ 123 4567²"), ["٣٣٣٣", " ", "123", " ", "4", "567²"]);
        assert_eq!(cut("cohere2moe", "ab 1234567b"), ["ab", " ", "1", "234", "567", "b"]);
        assert_eq!(cut("afmoe", "ab 1234567"), ["ab", " ", "1", "234", "567"]);
    }

    #[test]
    fn long_white_space_goes_in_powers_of_two() {
        let lengths = |n: usize, behind: &str| -> Vec<usize> {
            let text = " ".repeat(n) + behind;
            cut("jais-2", &text).iter().map(|word| word.chars().count()).collect()
        };
        assert_eq!(lengths(7, ""), [4, 2, 1]);
        assert_eq!(lengths(8, "x"), [4, 2, 1, 2]);
        assert_eq!(lengths(1, "5"), [1, 1]);
        assert_eq!(lengths(1300, ""), [512, 512, 256, 16, 4]);
    }

    /// Applies patterns one after another, each within the parts that the one before it left.
    fn cut_by_all(patterns: &[SysRegex], text: &str) -> Vec<String> {
        let mut parts = vec![text.to_owned()];
        for pattern in patterns {
            let mut cut = Vec::new();
            for part in &parts {
                let mut done = 0;
                for (start, end) in pattern.find_iter(part) {
                    cut.extend([&part[done..start], &part[start..end]].map(str::to_owned));
                    done = end;
                }
                cut.push(part[done..].to_owned());
            }
            cut.retain(|part| !part.is_empty());
            parts = cut;
        }
        parts
    }

    /// Texts of bits that expressions treat in different ways.
    fn random_texts() -> impl Iterator<Item = String> {
        const BITS: [&str; 30] = [
            " ", "  ", "   ", "\t", "\n", "\r\n", "\u{a0}", "\u{2003}", "a", "Wörter", "かな",
            "'s", "'", "'LL", "1", "23", "4567", "½", "٣", "!", "...", "+=", "$", "_", "🦙",
            "\u{301}", "ª", "`", "^", "x",
        ];
        let mut state = 1u64;
        (0..5000).map(move |_| {
            let mut text = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                text.push_str(BITS[(state >> 33) as usize % BITS.len()]);
            }
            text
        })
    }

    /// The expressions as published, with look-ahead, where the table's say the same.
    #[test]
    fn words_are_those_of_the_published_patterns() {
        const GPT2: &str =
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        const LLAMA3: &str = concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        const QWEN2: &str = concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        const QWEN35: &str = concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?",
            r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        const JAIS2: &str = concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|",
            r"\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|",
            r"\s{1,2}(?!\S)|\s{1}"
        );
        const DEEPSEEK3: [&str; 3] = [
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"##,
                r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        ];
        const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];
        let published: [(&str, &[&str]); 8] = [
            ("gpt-2", &[GPT2]),
            ("llama-bpe", &[LLAMA3]),
            ("jais-2", &[JAIS2]),
            ("qwen2", &[QWEN2]),
            ("qwen35", &[QWEN35]),
            ("deepseek-v3", &DEEPSEEK3),
            ("smollm", &[r"\p{N}", GPT2]),
            ("default", &DEFAULT),
        ];
        for (name, patterns) in published {
            let pre = PreTokenizer::named(name).unwrap();
            let patterns: Vec<_> = patterns.iter().map(|p| SysRegex::new(p).unwrap()).collect();
            for text in random_texts() {
                let mut words = Vec::new();
                pre.split(&text, &mut |word| words.push(word.to_owned()));
                assert_eq!(words, cut_by_all(&patterns, &text), "{name}: {text:?}");
            }
        }
    }
}
