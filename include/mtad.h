/*
 * mtad: multi-token joint decoding on pairs of quantized GGUF models.
 *
 * A pair is a large target and a small draft. A session is a text in the making, with its caches.
 *
 *     mtad_pair *pair;
 *     mtad_session *session;
 *     mtad_pair_open(NULL, &pair, NULL);                     // the built-in pair
 *     mtad_session_create(pair, NULL, &session);
 *     mtad_session_prompt(session, "Once upon a time", MTAD_NUL_TERMINATED, 0);
 *     mtad_session_generate(session, NULL, callback, NULL, NULL);
 *     mtad_session_free(&session);
 *     mtad_pair_free(&pair);
 *
 * Errors. Functions return a mtad_status: MTAD_OK, MTAD_DONE or an error below 0. A handle keeps
 * code and text of its last error (..._last_error). After MTAD_ERROR_PANIC, a fault of the library,
 * a handle only says so and waits to be freed. A NULL where a pointer must be is an error, never a
 * crash; freeing NULL does nothing. Freeing sets the handle to NULL through its pointer; copies of
 * a handle that was freed must not be used, which no library can detect.
 *
 * Structs begin with struct_size. The ..._init functions set it with all defaults; in structs that
 * a function fills in, and that have no ..._init, set it to sizeof before. Larger structs of later
 * headers are taken if what this library does not know of them is zero.
 *
 * Memory. No allocation changes hands: what comes out is copied to buffers of the caller's, whose
 * needed size a call with NULL and 0 asks for (MTAD_ERROR_BUFFER: too small), or it is lent until
 * the time that is stated. What goes in is copied before a function returns, GGUF files in memory
 * too. Buffers must be aligned as their type is.
 *
 * Texts are UTF-8, in both directions, paths included. A length of MTAD_NUL_TERMINATED stands for
 * strlen.
 *
 * Threads. A pair may be shared by any number of threads. A session, and a generation, may be used
 * by one thread at a time, whichever; a second one gets MTAD_ERROR_BUSY. ..._cancel may be called
 * from any thread. Nobody may use what is being freed. Callbacks run on the thread that made the
 * call, and must return by `return` (no longjmp, no exception).
 *
 * The library prints nothing, handles no signals, and needs no environment; the variable MTAD_CPU
 * names an instruction set other than the best one. Panics inside it are caught and not printed,
 * for which the first call sets the panic hook of the Rust code in the same library. Loading wakes
 * worker threads that serve the process to its end, so the library must stay loaded once it was
 * used (no dlclose).
 *
 * Stability. Names, numbers and the layout of structs in this header stay as they are as long as
 * the upper 16 bits of MTAD_ABI_VERSION do. Structs may grow at their end, functions and values of
 * enumerations may be added, which adds to the lower 16 bits. Versions of the library follow
 * semver.org; before 1.0 each 0.x may break what a 0.y promised. Texts of messages are not stable.
 */

#ifndef MTAD_H
#define MTAD_H

#include <stddef.h>
#include <stdint.h>
// A length: the text ends with a NUL.
#define MTAD_NUL_TERMINATED SIZE_MAX

// max_tokens: until the text or the context ends.
#define MTAD_NO_LIMIT SIZE_MAX

// The version of this interface. The upper 16 bits change when a program must be compiled, and
// perhaps changed, anew; the lower ones when something was added.
#define MTAD_ABI_VERSION ((1 << 16) + 1)

// mtad_pair_options.flags: open the built-in target without its draft.
#define MTAD_NO_DRAFT 1

// mtad_pair_options.flags: read files into memory instead of mapping them. (Version 1.1.)
#define MTAD_NO_MMAP 2

// Flags of texts: begin with the token that begins a text, if the model expects one.
#define MTAD_ADD_BOS 1

// Flags of texts: take names of control tokens, such as `</s>`, for those tokens.
#define MTAD_SPECIAL 2

// Flags of texts: the tokens continue a text, so that a space at their start is part of it.
#define MTAD_CONTINUATION 4

// mtad_token.flags: there is a token. Text that was held back is let go at the end without one.
#define MTAD_TOKEN_HAS_ID 1

// mtad_token.flags: the draft proposed it and the target accepted it; otherwise it is the
// target's own.
#define MTAD_TOKEN_DRAFTED 2

// mtad_token.flags: log_prob is there.
#define MTAD_TOKEN_SCORED 4

// The level of a message: what is being done.
#define MTAD_LOG_INFO 0

// The level of a message: something that may not be meant.
#define MTAD_LOG_WARNING 1

// What a function returns: MTAD_OK, MTAD_DONE, or an error below 0.
enum mtad_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // It is done.
  MTAD_OK = 0,
  // There is nothing more: the generation has ended.
  MTAD_DONE = 1,
  // An argument is outside its range, or arguments contradict each other.
  MTAD_ERROR_INVALID = -1,
  // A pointer that must be there is NULL.
  MTAD_ERROR_NULL = -2,
  // A text is not UTF-8.
  MTAD_ERROR_UTF8 = -3,
  // A struct_size is not that of any version of the struct.
  MTAD_ERROR_STRUCT_SIZE = -4,
  // A buffer is too small; what is needed was said.
  MTAD_ERROR_BUFFER = -5,
  // The operating system refused to read or write.
  MTAD_ERROR_IO = -6,
  // A file is not what it claims to be: cut short, damaged, inconsistent.
  MTAD_ERROR_FORMAT = -7,
  // A sound file asks for something that this version does not do, or is of another model.
  MTAD_ERROR_UNSUPPORTED = -8,
  // Draft and target do not speak the same tokens.
  MTAD_ERROR_VOCABULARY = -9,
  // Prompt and text have no room in the context.
  MTAD_ERROR_CONTEXT = -10,
  // The device went away. The tokens so far are still valid.
  MTAD_ERROR_DEVICE = -11,
  // A callback asked to stop.
  MTAD_ERROR_CANCELLED = -12,
  // Another thread, or a generation that was not freed, uses the session.
  MTAD_ERROR_BUSY = -13,
  // There is no such figure: no meter can be read, nothing was measured.
  MTAD_ERROR_UNAVAILABLE = -14,
  // A fault of the library. The handle does nothing any more but say so; free it.
  MTAD_ERROR_PANIC = -15,
  // There is not as much memory as is needed.
  MTAD_ERROR_MEMORY = -16,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mtad_status mtad_status;
#else
typedef int32_t mtad_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Why a generation ended.
enum mtad_stop
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // It has not.
  MTAD_STOP_NONE = 0,
  // As many tokens as were asked for.
  MTAD_STOP_MAX_TOKENS = 1,
  // The model ended its text.
  MTAD_STOP_EOS = 2,
  // A stop text appeared.
  MTAD_STOP_TEXT = 3,
  // It was cancelled.
  MTAD_STOP_CANCELLED = 4,
  // The context is full.
  MTAD_STOP_CONTEXT = 5,
  // The callback asked to stop.
  MTAD_STOP_CALLBACK = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mtad_stop mtad_stop;
#else
typedef int32_t mtad_stop;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A generation under way that is asked for its tokens. It holds its session until it is freed.
typedef struct mtad_generation mtad_generation;

// A target model and perhaps a draft. Threads may share it.
typedef struct mtad_pair mtad_pair;

// A text in the making, with its caches. One thread at a time may use it.
typedef struct mtad_session mtad_session;

// What went wrong.
typedef struct {
  // sizeof(mtad_error).
  size_t struct_size;
  // The mtad_status; MTAD_OK if nothing went wrong.
  int32_t code;
  // For people: what was found, where, and what would do. UTF-8, ends with a NUL.
  char message[1024];
} mtad_error;

// Told of loading: bytes done, bytes in all, user_data. Returns 0 to go on, anything else to
// stop.
typedef int32_t (*mtad_progress_callback)(uint64_t done, uint64_t total, void *user_data);

// Told what a log would hold: level, message, user_data. The message is gone when it returns.
typedef void (*mtad_log_callback)(int32_t level, const char *message, void *user_data);

// How a pair is opened. Paths are UTF-8; `builtin:target` and `builtin:draft` name the models
// that are part of the library.
//
// Files are mapped for as long as the pair or one of its sessions is there: a file must not be cut
// short or rewritten meanwhile, or the process gets SIGBUS, or weights change. Replacing it by
// renaming another one does no harm; MTAD_NO_MMAP rules it out.
typedef struct {
  // sizeof(mtad_pair_options).
  size_t struct_size;
  // The target, a GGUF file. NULL and no target_data: the built-in pair.
  const char *target;
  // The draft, a GGUF file, or NULL.
  const char *draft;
  // The target in memory, instead of `target`. It is copied.
  const void *target_data;
  // Its bytes.
  size_t target_size;
  // The draft in memory, instead of `draft`. It is copied.
  const void *draft_data;
  // Its bytes.
  size_t draft_size;
  // Where the models run; NULL is `cpu`.
  const char *device;
  // CPU threads; 0 is one for each physical core.
  uint32_t threads;
  // MTAD_NO_DRAFT, MTAD_NO_MMAP.
  uint32_t flags;
  // Told of loading, on the thread that opens the pair; may be NULL.
  mtad_progress_callback progress;
  // Told what there is to say, on any thread that uses the pair or its sessions, until all of
  // them are freed; may be NULL.
  mtad_log_callback log;
  // Passed to both.
  void *user_data;
} mtad_pair_options;

// What a pair is.
typedef struct {
  // sizeof(mtad_pair_info).
  size_t struct_size;
  // Tokens of the vocabulary; there are as many logits in a row, or a few more.
  size_t vocabulary;
  // Logits in a row.
  size_t logits;
  // Positions that the target was trained for.
  size_t context;
  // Seconds that loading took.
  double load_seconds;
  // Whether there is a draft: 0 or 1.
  int32_t has_draft;
  // The token that begins a text, or -1.
  int32_t bos;
  // The token that ends a text, or -1.
  int32_t eos;
  // 0.
  int32_t reserved;
} mtad_pair_info;

// How a session keeps its rows.
typedef struct {
  // sizeof(mtad_session_options).
  size_t struct_size;
  // The most tokens that prompt and text may have together; 0 is what the target was trained
  // for.
  size_t context;
  // How keys and values are kept: `f16` (NULL) or `f32`.
  const char *cache_type;
} mtad_session_options;

// Energy, by the meters of the machine.
typedef struct {
  // sizeof(mtad_energy).
  size_t struct_size;
  // How long it was measured.
  double seconds;
  // What was consumed.
  double joules;
  // How far that may be off, in joules.
  double uncertainty;
  // Joules of evaluating prompts.
  double prefill_joules;
  // Joules of drafting.
  double draft_joules;
  // Joules of the target's passes.
  double verify_joules;
  // Joules of accepting and drawing.
  double sample_joules;
  // Joules of the time between.
  double other_joules;
} mtad_energy;

// What to generate. The fields have the meanings of the options of `mtad run`.
typedef struct {
  // sizeof(mtad_request).
  size_t struct_size;
  // How tokens are chosen: `greedy`, `sample`, `speculative`, `mtad` ... NULL is mtad with a
  // draft and sample without.
  const char *strategy;
  // The most tokens, or MTAD_NO_LIMIT.
  size_t max_tokens;
  // Seed of all draws. The first generation after a prompt begins its numbers, later ones go on
  // with them.
  uint64_t seed;
  // Draw from so many of the most probable tokens; 0 is off.
  size_t top_k;
  // Divides logits; 0 takes the most probable token.
  float temperature;
  // Draw from the most probable tokens that together have this probability; 1 is off.
  float top_p;
  // Drop tokens less probable than this times the most probable one; 0 is off.
  float min_p;
  // Makes recent tokens less probable; 1 is off.
  float repeat_penalty;
  // Tokens that the draft proposes per round.
  size_t gamma;
  // Beams.
  size_t beam_width;
  // The least joint probability ratio, target to draft, of accepted blocks.
  double tau;
  // bild: the draft hands over below this probability.
  double fallback;
  // bild: roll back where -ln p is above this.
  double rollback;
  // typical: accept above this probability ...
  double epsilon;
  // ... or above this times exp(-entropy).
  double delta;
  // specinfer: children of each node of the tree, depth by depth; NULL is 4, 2, 2.
  const size_t *branching;
  // How many depths.
  size_t branching_count;
  // Texts that end the generation and are not part of it; UTF-8, each ends with a NUL.
  const char *const *stop;
  // How many.
  size_t stop_count;
  // Not 0: draw beams and candidates with replacement.
  int32_t with_replacement;
  // Not 0: tokens have log-probabilities under the target, before any warping.
  int32_t score;
} mtad_request;

// A generated token.
typedef struct {
  // sizeof(mtad_token).
  size_t struct_size;
  // The text that is complete with it: UTF-8 with a NUL behind it. Empty in the middle of a
  // character, or while it might be the start of a stop text.
  const char *text;
  // Its bytes, without the NUL. (A text may have a NUL in it.)
  size_t text_length;
  // ln p under the target, if it was asked for.
  double log_prob;
  // The token, if there is one.
  uint32_t id;
  // MTAD_TOKEN_HAS_ID, MTAD_TOKEN_DRAFTED, MTAD_TOKEN_SCORED.
  uint32_t flags;
} mtad_token;

// Told of each token, which is gone when it returns. Returns 0 to go on, anything else to stop
// after this token.
typedef int32_t (*mtad_token_callback)(const mtad_token *token, void *user_data);

// Counts and times of a generation. What there is not is NaN.
typedef struct {
  // sizeof(mtad_statistics).
  size_t struct_size;
  // Tokens before it.
  uint64_t prompt_tokens;
  // Tokens of the text; some may not be handed out yet.
  uint64_t tokens;
  // Rounds: with a draft each is one pass of the target.
  uint64_t rounds;
  // Tokens that were drafted.
  uint64_t drafted;
  // Drafted tokens that were accepted.
  uint64_t accepted;
  // Accepted / drafted.
  double acceptance_rate;
  // Tokens per pass of the target.
  double block_efficiency;
  // The smallest joint probability ratio, target to draft, of an accepted block.
  double min_joint_ratio;
  // exp(-mean ln p), if tokens were scored.
  double perplexity;
  // Seconds of drafting.
  double draft_seconds;
  // Seconds of the target's passes.
  double verify_seconds;
  // Seconds of accepting and drawing.
  double sample_seconds;
  // An mtad_stop.
  int32_t stop;
  // 0.
  int32_t reserved;
} mtad_statistics;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the interface that the library has, as MTAD_ABI_VERSION. A program should refuse
// a library whose upper 16 bits differ from those it was compiled with, or whose lower ones are
// less.
uint32_t mtad_abi_version(void);

// The version of the library, such as `0.1.0`. It is there as long as the library is.
const char *mtad_version(void);

// What a status means, in English. It is there as long as the library is.
const char *mtad_status_text(int32_t status);

// The devices that models can run on, as JSON: {"devices": [{"name", "description", ...}]}.
// `length` is set to the bytes of the text without its NUL; `buffer` may be NULL with `size` 0 to
// ask for them.
mtad_status mtad_devices(char *buffer, size_t size, size_t *length, mtad_error *error);

// Fills in the defaults: the built-in pair on the CPU. `size` is sizeof(mtad_pair_options).
mtad_status mtad_pair_options_init(mtad_pair_options *options, size_t size);

// Opens a pair. `*pair` is NULL unless it returns MTAD_OK. `options` may be NULL for the
// defaults; `error` may be NULL, or says what went wrong.
mtad_status mtad_pair_open(const mtad_pair_options *options, mtad_pair **pair, mtad_error *error);

// What the pair is. The caller sets info->struct_size.
mtad_status mtad_pair_get_info(const mtad_pair *pair, mtad_pair_info *info);

// The tokens of a text. `count` is set to how many there are; `tokens` may be NULL with `room` 0
// to ask for it. `flags`: MTAD_ADD_BOS, MTAD_SPECIAL.
mtad_status mtad_tokenize(const mtad_pair *pair,
                          const char *text,
                          size_t length,
                          uint32_t flags,
                          uint32_t *tokens,
                          size_t room,
                          size_t *count);

// The text of tokens, without control tokens; MTAD_SPECIAL shows those by their names. `length`
// is set to its bytes without the NUL; `buffer` may be NULL with `size` 0 to ask for it. Bytes
// that are no character become U+FFFD, ids outside the vocabulary are no text. `flags`:
// MTAD_SPECIAL, MTAD_CONTINUATION.
mtad_status mtad_detokenize(const mtad_pair *pair,
                            const uint32_t *tokens,
                            size_t count,
                            uint32_t flags,
                            char *buffer,
                            size_t size,
                            size_t *length);

// The last error of a call on this pair, MTAD_OK if there was none. The caller sets
// error->struct_size.
mtad_status mtad_pair_last_error(const mtad_pair *pair, mtad_error *error);

// Frees a pair and sets `*pair` to NULL. Its sessions stay usable: what they need is freed with
// the last of them.
void mtad_pair_free(mtad_pair **pair);

// Fills in the defaults. `size` is sizeof(mtad_session_options).
mtad_status mtad_session_options_init(mtad_session_options *options, size_t size);

// A new session, with no text. `*session` is NULL unless it returns MTAD_OK; errors are the
// pair's. `options` may be NULL.
mtad_status mtad_session_create(const mtad_pair *pair,
                                const mtad_session_options *options,
                                mtad_session **session);

// A session from a file that mtad_session_save wrote with the same models. It goes on with the
// same text. Otherwise as mtad_session_create.
mtad_status mtad_session_load(const mtad_pair *pair,
                              const mtad_session_options *options,
                              const char *path,
                              mtad_session **session);

// A session of its own with the same text, caches and random numbers.
mtad_status mtad_session_clone(const mtad_session *session, mtad_session **clone);

// Forgets the text.
mtad_status mtad_session_reset(mtad_session *session);

// Writes the session to a file: the text as far as it was handed out, the caches, where the
// random numbers are. The file appears under its name when it is complete.
mtad_status mtad_session_save(mtad_session *session, const char *path);

// Begins a text: evaluates a prompt, except what it shares with the last text. Tokens that begin
// a text are added as the model expects them. `flags`: MTAD_SPECIAL. MTAD_ERROR_CANCELLED if
// mtad_session_cancel stopped it: the prompt is the session's text then, and a generation
// evaluates what is missing.
mtad_status mtad_session_prompt(mtad_session *session,
                                const char *text,
                                size_t length,
                                uint32_t flags);

// The same with tokens, which are taken as they are.
mtad_status mtad_session_prompt_tokens(mtad_session *session, const uint32_t *tokens, size_t count);

// Prompt and generated tokens, as far as they were handed out. `count` is set to how many there
// are; `tokens` may be NULL with `room` 0 to ask for it.
mtad_status mtad_session_tokens(mtad_session *session,
                                uint32_t *tokens,
                                size_t room,
                                size_t *count);

// The target's logits for the token that follows the text, one for each token of the vocabulary.
// `count` is set to how many there are; `logits` may be NULL with `room` 0 to ask for it (which
// evaluates nothing).
mtad_status mtad_session_logits(mtad_session *session, float *logits, size_t room, size_t *count);

// Stops the prompt that is being evaluated, within a second or so, or the generation that is under
// way, after its round; if there is neither, it does nothing. The one function of a session
// that any thread may call at any time before the session is freed.
mtad_status mtad_session_cancel(const mtad_session *session);

// Begins to measure energy, `rate` times a second, with the meter or the family of meters that
// `mtad devices --meters` shows under that name, `file:PATH` or `cmd:COMMAND`; NULL is all that
// there are. A measurement that was under way is thrown away.
mtad_status mtad_session_energy_begin(mtad_session *session, const char *meter, double rate);

// Ends the measurement. MTAD_ERROR_UNAVAILABLE if there is no figure, and mtad_session_last_error
// says why: it never is 0 joules. The caller sets energy->struct_size.
mtad_status mtad_session_energy_end(mtad_session *session, mtad_energy *energy);

// The last error of a call on this session, MTAD_OK if there was none. The caller sets
// error->struct_size.
mtad_status mtad_session_last_error(const mtad_session *session, mtad_error *error);

// Frees a session and sets `*session` to NULL. A generation of it stays usable.
void mtad_session_free(mtad_session **session);

// Fills in the defaults: those of `mtad run`, with seed 0. `size` is sizeof(mtad_request).
mtad_status mtad_request_init(mtad_request *request, size_t size);

// Goes on with the session's text and tells each token to `callback` (which may be NULL), on this
// thread, until there is a reason to stop; `statistics` (which may be NULL) has the reason. Tokens
// that were not told are not lost: the next generation begins with them. `request` may be NULL.
// The callback must return, by `return`, and must not use the session but for
// mtad_session_cancel.
mtad_status mtad_session_generate(mtad_session *session,
                                  const mtad_request *request,
                                  mtad_token_callback callback,
                                  void *user_data,
                                  mtad_statistics *statistics_out);

// Goes on with the session's text, for mtad_generation_next to ask for. `*generation` is NULL
// unless it returns MTAD_OK; errors are the session's. The session is busy until the generation
// is freed. `request` may be NULL.
mtad_status mtad_generation_start(mtad_session *session,
                                  const mtad_request *request,
                                  mtad_generation **generation);

// The next token; MTAD_DONE if there is none. Its text is there until the next call on this
// generation. The caller sets token->struct_size.
mtad_status mtad_generation_next(mtad_generation *generation, mtad_token *token);

// Counts and times so far. The caller sets statistics->struct_size.
mtad_status mtad_generation_statistics(const mtad_generation *generation,
                                       mtad_statistics *statistics);

// Stops the generation after its round. Any thread may call it at any time before the generation
// is freed.
mtad_status mtad_generation_cancel(const mtad_generation *generation);

// The last error of a call on this generation, MTAD_OK if there was none. The caller sets
// error->struct_size.
mtad_status mtad_generation_last_error(const mtad_generation *generation, mtad_error *error);

// Frees a generation and sets `*generation` to NULL; its session can be used again, and goes on
// after the last token that was handed out.
void mtad_generation_free(mtad_generation **generation);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MTAD_H */
