//! The structs, callbacks and constants of the C ABI.
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_void};

use super::memory::Versioned;

/// The version of this interface. The upper 16 bits change when a program must be compiled, and
/// perhaps changed, anew; the lower ones when something was added.
pub const MTAD_ABI_VERSION: u32 = (1 << 16) + 1;

/// A length: the text ends with a NUL.
///
/// cbindgen:ignore
pub const MTAD_NUL_TERMINATED: usize = usize::MAX;

/// max_tokens: until the text or the context ends.
///
/// cbindgen:ignore
pub const MTAD_NO_LIMIT: usize = usize::MAX;

/// mtad_pair_options.flags: open the built-in target without its draft.
pub const MTAD_NO_DRAFT: u32 = 1;
/// mtad_pair_options.flags: read files into memory instead of mapping them. (Version 1.1.)
pub const MTAD_NO_MMAP: u32 = 2;

/// Flags of texts: begin with the token that begins a text, if the model expects one.
pub const MTAD_ADD_BOS: u32 = 1;
/// Flags of texts: take names of control tokens, such as `</s>`, for those tokens.
pub const MTAD_SPECIAL: u32 = 2;
/// Flags of texts: the tokens continue a text, so that a space at their start is part of it.
pub const MTAD_CONTINUATION: u32 = 4;

/// mtad_token.flags: there is a token. Text that was held back is let go at the end without one.
pub const MTAD_TOKEN_HAS_ID: u32 = 1;
/// mtad_token.flags: the draft proposed it and the target accepted it; otherwise it is the
/// target's own.
pub const MTAD_TOKEN_DRAFTED: u32 = 2;
/// mtad_token.flags: log_prob is there.
pub const MTAD_TOKEN_SCORED: u32 = 4;

/// The level of a message: what is being done.
pub const MTAD_LOG_INFO: i32 = 0;
/// The level of a message: something that may not be meant.
pub const MTAD_LOG_WARNING: i32 = 1;

/// Told of loading: bytes done, bytes in all, user_data. Returns 0 to go on, anything else to
/// stop.
pub type mtad_progress_callback =
    Option<unsafe extern "C" fn(done: u64, total: u64, user_data: *mut c_void) -> i32>;

/// Told what a log would hold: level, message, user_data. The message is gone when it returns.
pub type mtad_log_callback =
    Option<unsafe extern "C" fn(level: i32, message: *const c_char, user_data: *mut c_void)>;

/// Told of each token, which is gone when it returns. Returns 0 to go on, anything else to stop
/// after this token.
pub type mtad_token_callback =
    Option<unsafe extern "C" fn(token: *const mtad_token, user_data: *mut c_void) -> i32>;

/// What went wrong.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_error {
    /// sizeof(mtad_error).
    pub struct_size: usize,
    /// The mtad_status; MTAD_OK if nothing went wrong.
    pub code: i32,
    /// For people: what was found, where, and what would do. UTF-8, ends with a NUL.
    pub message: [c_char; 1024],
}

/// How a pair is opened. Paths are UTF-8; `builtin:target` and `builtin:draft` name the models
/// that are part of the library.
///
/// Files are mapped for as long as the pair or one of its sessions is there: a file must not be cut
/// short or rewritten meanwhile, or the process gets SIGBUS, or weights change. Replacing it by
/// renaming another one does no harm; MTAD_NO_MMAP rules it out.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_pair_options {
    /// sizeof(mtad_pair_options).
    pub struct_size: usize,
    /// The target, a GGUF file. NULL and no target_data: the built-in pair.
    pub target: *const c_char,
    /// The draft, a GGUF file, or NULL.
    pub draft: *const c_char,
    /// The target in memory, instead of `target`. It is copied.
    pub target_data: *const c_void,
    /// Its bytes.
    pub target_size: usize,
    /// The draft in memory, instead of `draft`. It is copied.
    pub draft_data: *const c_void,
    /// Its bytes.
    pub draft_size: usize,
    /// Where the models run; NULL is `cpu`.
    pub device: *const c_char,
    /// CPU threads; 0 is one for each physical core.
    pub threads: u32,
    /// MTAD_NO_DRAFT, MTAD_NO_MMAP.
    pub flags: u32,
    /// Told of loading, on the thread that opens the pair; may be NULL.
    pub progress: mtad_progress_callback,
    /// Told what there is to say, on any thread that uses the pair or its sessions, until all of
    /// them are freed; may be NULL.
    pub log: mtad_log_callback,
    /// Passed to both.
    pub user_data: *mut c_void,
}

/// What a pair is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_pair_info {
    /// sizeof(mtad_pair_info).
    pub struct_size: usize,
    /// Tokens of the vocabulary; there are as many logits in a row, or a few more.
    pub vocabulary: usize,
    /// Logits in a row.
    pub logits: usize,
    /// Positions that the target was trained for.
    pub context: usize,
    /// Seconds that loading took.
    pub load_seconds: f64,
    /// Whether there is a draft: 0 or 1.
    pub has_draft: i32,
    /// The token that begins a text, or -1.
    pub bos: i32,
    /// The token that ends a text, or -1.
    pub eos: i32,
    /// 0.
    pub reserved: i32,
}

/// How a session keeps its rows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_session_options {
    /// sizeof(mtad_session_options).
    pub struct_size: usize,
    /// The most tokens that prompt and text may have together; 0 is what the target was trained
    /// for.
    pub context: usize,
    /// How keys and values are kept: `f16` (NULL) or `f32`.
    pub cache_type: *const c_char,
}

/// What to generate. The fields have the meanings of the options of `mtad run`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_request {
    /// sizeof(mtad_request).
    pub struct_size: usize,
    /// How tokens are chosen: `greedy`, `sample`, `speculative`, `mtad` ... NULL is mtad with a
    /// draft and sample without.
    pub strategy: *const c_char,
    /// The most tokens, or MTAD_NO_LIMIT.
    pub max_tokens: usize,
    /// Seed of all draws. The first generation after a prompt begins its numbers, later ones go on
    /// with them.
    pub seed: u64,
    /// Draw from so many of the most probable tokens; 0 is off.
    pub top_k: usize,
    /// Divides logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Draw from the most probable tokens that together have this probability; 1 is off.
    pub top_p: f32,
    /// Drop tokens less probable than this times the most probable one; 0 is off.
    pub min_p: f32,
    /// Makes recent tokens less probable; 1 is off.
    pub repeat_penalty: f32,
    /// Tokens that the draft proposes per round.
    pub gamma: usize,
    /// Beams.
    pub beam_width: usize,
    /// The least joint probability ratio, target to draft, of accepted blocks.
    pub tau: f64,
    /// bild: the draft hands over below this probability.
    pub fallback: f64,
    /// bild: roll back where -ln p is above this.
    pub rollback: f64,
    /// typical: accept above this probability ...
    pub epsilon: f64,
    /// ... or above this times exp(-entropy).
    pub delta: f64,
    /// specinfer: children of each node of the tree, depth by depth; NULL is 4, 2, 2.
    pub branching: *const usize,
    /// How many depths.
    pub branching_count: usize,
    /// Texts that end the generation and are not part of it; UTF-8, each ends with a NUL.
    pub stop: *const *const c_char,
    /// How many.
    pub stop_count: usize,
    /// Not 0: draw beams and candidates with replacement.
    pub with_replacement: i32,
    /// Not 0: tokens have log-probabilities under the target, before any warping.
    pub score: i32,
}

/// A generated token.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_token {
    /// sizeof(mtad_token).
    pub struct_size: usize,
    /// The text that is complete with it: UTF-8 with a NUL behind it. Empty in the middle of a
    /// character, or while it might be the start of a stop text.
    pub text: *const c_char,
    /// Its bytes, without the NUL. (A text may have a NUL in it.)
    pub text_length: usize,
    /// ln p under the target, if it was asked for.
    pub log_prob: f64,
    /// The token, if there is one.
    pub id: u32,
    /// MTAD_TOKEN_HAS_ID, MTAD_TOKEN_DRAFTED, MTAD_TOKEN_SCORED.
    pub flags: u32,
}

/// Why a generation ended.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mtad_stop {
    /// It has not.
    MTAD_STOP_NONE = 0,
    /// As many tokens as were asked for.
    MTAD_STOP_MAX_TOKENS = 1,
    /// The model ended its text.
    MTAD_STOP_EOS = 2,
    /// A stop text appeared.
    MTAD_STOP_TEXT = 3,
    /// It was cancelled.
    MTAD_STOP_CANCELLED = 4,
    /// The context is full.
    MTAD_STOP_CONTEXT = 5,
    /// The callback asked to stop.
    MTAD_STOP_CALLBACK = 6,
}

/// Counts and times of a generation. What there is not is NaN.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_statistics {
    /// sizeof(mtad_statistics).
    pub struct_size: usize,
    /// Tokens before it.
    pub prompt_tokens: u64,
    /// Tokens of the text; some may not be handed out yet.
    pub tokens: u64,
    /// Rounds: with a draft each is one pass of the target.
    pub rounds: u64,
    /// Tokens that were drafted.
    pub drafted: u64,
    /// Drafted tokens that were accepted.
    pub accepted: u64,
    /// Accepted / drafted.
    pub acceptance_rate: f64,
    /// Tokens per pass of the target.
    pub block_efficiency: f64,
    /// The smallest joint probability ratio, target to draft, of an accepted block.
    pub min_joint_ratio: f64,
    /// exp(-mean ln p), if tokens were scored.
    pub perplexity: f64,
    /// Seconds of drafting.
    pub draft_seconds: f64,
    /// Seconds of the target's passes.
    pub verify_seconds: f64,
    /// Seconds of accepting and drawing.
    pub sample_seconds: f64,
    /// An mtad_stop.
    pub stop: i32,
    /// 0.
    pub reserved: i32,
}

/// Energy, by the meters of the machine.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct mtad_energy {
    /// sizeof(mtad_energy).
    pub struct_size: usize,
    /// How long it was measured.
    pub seconds: f64,
    /// What was consumed.
    pub joules: f64,
    /// How far that may be off, in joules.
    pub uncertainty: f64,
    /// Joules of evaluating prompts.
    pub prefill_joules: f64,
    /// Joules of drafting.
    pub draft_joules: f64,
    /// Joules of the target's passes.
    pub verify_joules: f64,
    /// Joules of accepting and drawing.
    pub sample_joules: f64,
    /// Joules of the time between.
    pub other_joules: f64,
}

/// Says that structs begin with their size and may hold any bytes.
macro_rules! versioned {
    ($($name:ident)*) => {$(
        // SAFETY: `repr(C)` with `struct_size` first; numbers, raw pointers and nullable function
        // pointers, which are only used as what the caller says they are.
        unsafe impl Versioned for $name {
            const NAME: &'static str = stringify!($name);
        }
    )*};
}

versioned!(mtad_error mtad_pair_options mtad_pair_info mtad_session_options mtad_request);
versioned!(mtad_token mtad_statistics mtad_energy);

impl Default for mtad_error {
    fn default() -> Self {
        mtad_error { struct_size: size_of::<Self>(), code: 0, message: [0; 1024] }
    }
}
