/*
 * Calls every function as nobody should, and some as everybody does. Prints what is not as it
 * must be and returns 1 then.
 *
 *     torture FOLDER TARGET.gguf
 */
#include <math.h>
#include <mtad.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define EXPECT(call, code)                                                                      \
    do {                                                                                        \
        int found_ = (call);                                                                    \
        if (found_ != (int)(code)) {                                                            \
            failures++;                                                                         \
            fprintf(stderr, "line %d: %s is %d (%s), not %s\n", __LINE__, #call, found_,        \
                    mtad_status_text(found_), #code);                                           \
        }                                                                                       \
    } while (0)
#define TRUE(what) EXPECT(!!(what), 1)
#define NT MTAD_NUL_TERMINATED

static const char *BAD = "not \xff\xfe UTF-8";
static const char *PROMPT = "Once upon a time";

/* A text that grows. */
typedef struct {
    char text[8192];
    size_t length;
    int tokens, stop_after, cancel_after;
    mtad_session *session;
} story;

static int32_t hear(const mtad_token *token, void *user_data) {
    story *s = user_data;
    TRUE(token->struct_size == sizeof *token && token->text[token->text_length] == 0);
    memcpy(s->text + s->length, token->text, token->text_length + 1);
    s->length += token->text_length;
    s->tokens++;
    if (s->session) {
        size_t count;
        EXPECT(mtad_session_tokens(s->session, NULL, 0, &count), MTAD_ERROR_BUSY);
        EXPECT(mtad_session_reset(s->session), MTAD_ERROR_BUSY);
        if (s->tokens == s->cancel_after)
            EXPECT(mtad_session_cancel(s->session), MTAD_OK);
    }
    return s->tokens == s->stop_after;
}

static int32_t stop_loading(uint64_t done, uint64_t total, void *user_data) {
    TRUE(done <= total);
    return --*(int *)user_data == 0;
}

static void count_messages(int32_t level, const char *message, void *user_data) {
    TRUE(message[0] != 0 && (level == MTAD_LOG_INFO || level == MTAD_LOG_WARNING));
    ++*(int *)user_data;
}

static void nulls(void) {
    size_t n;
    char text[8];
    uint32_t token = 1;
    mtad_error error = {.struct_size = sizeof error};
    mtad_pair *pair = NULL;
    mtad_session *session = NULL;
    mtad_generation *generation = NULL;

    mtad_pair_free(NULL);
    mtad_session_free(NULL);
    mtad_generation_free(NULL);
    mtad_pair_free(&pair);
    mtad_session_free(&session);
    mtad_generation_free(&generation);
    EXPECT(mtad_devices(NULL, 0, NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_devices(NULL, 9, &n, &error), MTAD_ERROR_NULL);
    EXPECT(error.code, MTAD_ERROR_NULL);
    EXPECT(mtad_pair_options_init(NULL, sizeof(mtad_pair_options)), MTAD_ERROR_NULL);
    EXPECT(mtad_session_options_init(NULL, sizeof(mtad_session_options)), MTAD_ERROR_NULL);
    EXPECT(mtad_request_init(NULL, sizeof(mtad_request)), MTAD_ERROR_NULL);
    EXPECT(mtad_pair_open(NULL, NULL, &error), MTAD_ERROR_NULL);
    EXPECT(mtad_pair_open(NULL, NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_pair_get_info(NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_tokenize(NULL, "a", 1, 0, &token, 1, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_detokenize(NULL, &token, 1, 0, text, 8, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_pair_last_error(NULL, &error), MTAD_ERROR_NULL);
    EXPECT(mtad_session_create(NULL, NULL, &session), MTAD_ERROR_NULL);
    EXPECT(mtad_session_load(NULL, NULL, "x", &session), MTAD_ERROR_NULL);
    EXPECT(mtad_session_clone(NULL, &session), MTAD_ERROR_NULL);
    EXPECT(mtad_session_reset(NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_save(NULL, "x"), MTAD_ERROR_NULL);
    EXPECT(mtad_session_prompt(NULL, "a", 1, 0), MTAD_ERROR_NULL);
    EXPECT(mtad_session_prompt_tokens(NULL, &token, 1), MTAD_ERROR_NULL);
    EXPECT(mtad_session_tokens(NULL, &token, 1, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_session_logits(NULL, NULL, 0, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_session_cancel(NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_energy_begin(NULL, NULL, 10), MTAD_ERROR_NULL);
    EXPECT(mtad_session_energy_end(NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_last_error(NULL, &error), MTAD_ERROR_NULL);
    EXPECT(mtad_session_generate(NULL, NULL, hear, NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_start(NULL, NULL, &generation), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_next(NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_statistics(NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_cancel(NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_last_error(NULL, &error), MTAD_ERROR_NULL);
    TRUE(!pair && !session && !generation);
    for (int status = -20; status < 5; status++)
        TRUE(mtad_status_text(status)[0]);
}

/* The same with handles that are there and everything else NULL. */
static void half_nulls(mtad_pair *pair, mtad_session *session) {
    size_t n;
    mtad_generation *generation;
    EXPECT(mtad_pair_get_info(pair, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_tokenize(pair, NULL, 1, 0, NULL, 0, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_tokenize(pair, NULL, NT, 0, NULL, 0, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_tokenize(pair, "a", NT, 0, NULL, 0, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_tokenize(pair, NULL, 0, 0, NULL, 0, &n), MTAD_OK);
    EXPECT(mtad_detokenize(pair, NULL, 3, 0, NULL, 0, &n), MTAD_ERROR_NULL);
    EXPECT(mtad_pair_last_error(pair, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_create(pair, NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_load(pair, NULL, "x", NULL), MTAD_ERROR_NULL);
    mtad_session *none;
    EXPECT(mtad_session_load(pair, NULL, NULL, &none), MTAD_ERROR_NULL);
    TRUE(!none);
    EXPECT(mtad_session_clone(session, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_save(session, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_prompt(session, NULL, 4, 0), MTAD_ERROR_NULL);
    EXPECT(mtad_session_prompt_tokens(session, NULL, 4), MTAD_ERROR_NULL);
    EXPECT(mtad_session_tokens(session, NULL, 0, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_logits(session, NULL, 0, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_energy_end(session, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_last_error(session, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_start(session, NULL, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    EXPECT(mtad_generation_start(session, NULL, &generation), MTAD_OK);
    EXPECT(mtad_generation_next(generation, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_statistics(generation, NULL), MTAD_ERROR_NULL);
    EXPECT(mtad_generation_last_error(generation, NULL), MTAD_ERROR_NULL);
    mtad_generation_free(&generation);
    mtad_generation_free(&generation);
    EXPECT(mtad_generation_next(generation, NULL), MTAD_ERROR_NULL);
}

static void sizes(mtad_pair *pair, mtad_session *session) {
    const size_t wrong[] = {0, 1, sizeof(size_t), (size_t)-1, 1 << 20};
    union {
        mtad_pair_options options;
        mtad_session_options session;
        mtad_request request;
        mtad_error error;
        unsigned char bytes[2048];
    } u;
    mtad_pair *other;
    mtad_session *twin;
    mtad_generation *generation;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        mtad_pair_info info = {.struct_size = wrong[i]};
        mtad_token token = {.struct_size = wrong[i]};
        mtad_statistics statistics = {.struct_size = wrong[i]};
        mtad_energy energy = {.struct_size = wrong[i]};
        memset(&u, 0, sizeof u);
        u.request.struct_size = wrong[i];
        EXPECT(mtad_pair_open(&u.options, &other, NULL), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_session_create(pair, &u.session, &twin), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_session_generate(session, &u.request, NULL, NULL, NULL), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_session_generate(session, NULL, NULL, NULL, &statistics), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_pair_last_error(pair, &u.error), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_pair_get_info(pair, &info), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_pair_options_init(&u.options, wrong[i]), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_session_options_init(&u.session, wrong[i]), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_request_init(&u.request, wrong[i]), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_session_energy_end(session, &energy), MTAD_ERROR_UNAVAILABLE);
        EXPECT(mtad_generation_start(session, NULL, &generation), MTAD_OK);
        EXPECT(mtad_generation_next(generation, &token), MTAD_ERROR_STRUCT_SIZE);
        EXPECT(mtad_generation_statistics(generation, &statistics), MTAD_ERROR_STRUCT_SIZE);
        mtad_generation_free(&generation);
    }
    /* A struct of a later header, which says nothing new; and one that does. */
    EXPECT(mtad_request_init(&u.request, sizeof u), MTAD_OK);
    u.request.max_tokens = 1;
    EXPECT(mtad_session_generate(session, &u.request, NULL, NULL, NULL), MTAD_OK);
    u.bytes[sizeof(mtad_request)] = 1;
    EXPECT(mtad_session_generate(session, &u.request, NULL, NULL, NULL), MTAD_ERROR_STRUCT_SIZE);
}

static void absurd(mtad_pair *pair, mtad_session *session, const char *folder) {
    mtad_error error = {.struct_size = sizeof error};
    mtad_pair_options options;
    mtad_session_options how;
    mtad_request request;
    mtad_pair *other;
    mtad_session *twin;
    size_t n;
    char path[512], text[64];
    uint32_t tokens[64], high = 1u << 31;

    EXPECT(mtad_tokenize(pair, BAD, NT, 0, tokens, 64, &n), MTAD_ERROR_UTF8);
    EXPECT(mtad_pair_last_error(pair, &error), MTAD_OK);
    TRUE(error.code == MTAD_ERROR_UTF8 && strstr(error.message, "byte 4"));
    EXPECT(mtad_tokenize(pair, "a", (size_t)-2, 0, tokens, 64, &n), MTAD_ERROR_INVALID);
    EXPECT(mtad_tokenize(pair, PROMPT, NT, 0xffff, tokens, 64, &n), MTAD_ERROR_INVALID);
    EXPECT(mtad_tokenize(pair, PROMPT, NT, 0, tokens, 1, &n), MTAD_ERROR_BUFFER);
    EXPECT(mtad_tokenize(pair, PROMPT, NT, MTAD_ADD_BOS, tokens, n + 1, &n), MTAD_OK);
    EXPECT(mtad_detokenize(pair, tokens, n, 0, text, 3, NULL), MTAD_ERROR_BUFFER);
    EXPECT(mtad_detokenize(pair, tokens, n, 0, text, 64, &n), MTAD_OK);
    TRUE(!strcmp(text, PROMPT) && n == strlen(PROMPT));
    EXPECT(mtad_detokenize(pair, &high, 1, 0, text, 64, &n), MTAD_OK);
    EXPECT(mtad_detokenize(pair, tokens, (size_t)1 << 62, 0, text, 64, &n), MTAD_ERROR_INVALID);
    EXPECT(mtad_detokenize(pair, (uint32_t *)((char *)tokens + 1), 1, 0, text, 64, &n), MTAD_ERROR_INVALID);

    EXPECT(mtad_session_prompt(session, BAD, NT, 0), MTAD_ERROR_UTF8);
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 64), MTAD_ERROR_INVALID);
    EXPECT(mtad_session_prompt_tokens(session, &high, 1), MTAD_ERROR_INVALID);
    EXPECT(mtad_session_prompt_tokens(session, tokens, 0), MTAD_ERROR_INVALID);
    EXPECT(mtad_session_save(session, BAD), MTAD_ERROR_UTF8);
    EXPECT(mtad_session_save(session, ""), MTAD_ERROR_INVALID);
    EXPECT(mtad_session_save(session, "/no/such/folder/session"), MTAD_ERROR_IO);
    EXPECT(mtad_session_load(pair, NULL, "/no/such/session", &twin), MTAD_ERROR_IO);
    snprintf(path, sizeof path, "%s/garbage", folder);
    FILE *file = fopen(path, "w");
    fputs("garbage", file);
    fclose(file);
    EXPECT(mtad_session_load(pair, NULL, path, &twin), MTAD_ERROR_FORMAT);

    EXPECT(mtad_session_energy_begin(session, "nonsense", 10), MTAD_ERROR_INVALID);
    EXPECT(mtad_session_energy_begin(session, BAD, 10), MTAD_ERROR_UTF8);
    snprintf(text, sizeof text, "file:");
    snprintf(path, sizeof path, "file:%s/watts", folder);
    file = fopen(path + strlen(text), "w");
    fputs("12.5 W\n", file);
    fclose(file);
    EXPECT(mtad_session_energy_begin(session, path, NAN), MTAD_ERROR_INVALID);

    EXPECT(mtad_session_options_init(&how, sizeof how), MTAD_OK);
    how.cache_type = "f64";
    EXPECT(mtad_session_create(pair, &how, &twin), MTAD_ERROR_INVALID);
    how.cache_type = BAD;
    EXPECT(mtad_session_create(pair, &how, &twin), MTAD_ERROR_UTF8);
    how.cache_type = "f32";
    how.context = (size_t)-1;
    EXPECT(mtad_session_create(pair, &how, &twin), MTAD_OK);
    EXPECT(mtad_session_generate(twin, NULL, NULL, NULL, NULL), MTAD_ERROR_INVALID);
    EXPECT(mtad_session_logits(twin, (float[1]){0}, 1, &n), MTAD_ERROR_BUFFER);
    EXPECT(mtad_session_prompt(twin, PROMPT, NT, 0), MTAD_OK);
    mtad_session_free(&twin);
    how.context = 2;
    EXPECT(mtad_session_create(pair, &how, &twin), MTAD_OK);
    EXPECT(mtad_session_prompt(twin, PROMPT, NT, 0), MTAD_ERROR_CONTEXT);
    mtad_session_free(&twin);
    EXPECT(mtad_session_prompt(twin, PROMPT, NT, 0), MTAD_ERROR_NULL);

#define WITH(wanted, ...)                                                                      \
    do {                                                                                        \
        EXPECT(mtad_request_init(&request, sizeof request), MTAD_OK);                           \
        request.max_tokens = 2;                                                                 \
        request.__VA_ARGS__;                                                                    \
        EXPECT(mtad_session_generate(session, &request, NULL, NULL, NULL), wanted);             \
    } while (0)
    const char *stops[] = {"a", NULL}, *bad_stops[] = {BAD}, *empty[] = {""};
    const size_t branching[] = {0, 1};
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    WITH(MTAD_ERROR_INVALID, strategy = "nonsense");
    WITH(MTAD_ERROR_UTF8, strategy = BAD);
    WITH(MTAD_ERROR_INVALID, gamma = 0);
    WITH(MTAD_ERROR_INVALID, gamma = (size_t)-1);
    WITH(MTAD_ERROR_INVALID, beam_width = (size_t)-1);
    WITH(MTAD_ERROR_INVALID, temperature = NAN);
    WITH(MTAD_ERROR_INVALID, temperature = -1);
    WITH(MTAD_ERROR_INVALID, top_p = 7);
    WITH(MTAD_ERROR_INVALID, repeat_penalty = -INFINITY);
    WITH(MTAD_ERROR_INVALID, tau = -1);
    WITH(MTAD_ERROR_INVALID, epsilon = NAN);
    WITH(MTAD_OK, top_k = (size_t)-1);
    WITH(MTAD_OK, max_tokens = 0);
    WITH(MTAD_OK, with_replacement = -77);
    WITH(MTAD_ERROR_NULL, branching_count = 3);
    WITH(MTAD_ERROR_INVALID, branching = branching, request.branching_count = 2);
    WITH(MTAD_ERROR_NULL, stop_count = 1);
    WITH(MTAD_ERROR_NULL, stop = stops, request.stop_count = 2);
    WITH(MTAD_ERROR_UTF8, stop = bad_stops, request.stop_count = 1);
    WITH(MTAD_ERROR_INVALID, stop = empty, request.stop_count = 1);
#undef WITH
#define WITH(wanted, ...)                                                                      \
    do {                                                                                        \
        EXPECT(mtad_pair_options_init(&options, sizeof options), MTAD_OK);                      \
        options.__VA_ARGS__;                                                                    \
        EXPECT(mtad_pair_open(&options, &other, &error), wanted);                                \
        EXPECT(error.code, wanted);                                                             \
        TRUE(!other && error.message[0]);                                                       \
    } while (0)
    WITH(MTAD_ERROR_IO, target = "/no/such/model.gguf");
    WITH(MTAD_ERROR_UTF8, target = BAD);
    WITH(MTAD_ERROR_INVALID, target = "builtin:nonsense");
    WITH(MTAD_ERROR_INVALID, draft = "builtin:draft");
    WITH(MTAD_ERROR_FORMAT, target_data = "garbage");
    WITH(MTAD_ERROR_FORMAT, target_data = "garbage", options.target_size = 7);
    WITH(MTAD_ERROR_NULL, target_size = 7);
    WITH(MTAD_ERROR_INVALID, target_data = "x", options.target = "y");
    WITH(MTAD_ERROR_INVALID, device = "abacus");
    WITH(MTAD_ERROR_UTF8, device = BAD);
    WITH(MTAD_ERROR_INVALID, threads = (uint32_t)-1);
    WITH(MTAD_ERROR_INVALID, flags = (uint32_t)-1);
    int after = 1;
    WITH(MTAD_ERROR_CANCELLED, user_data = &after, options.progress = stop_loading);
    after = 9;
    WITH(MTAD_ERROR_CANCELLED, user_data = &after, options.progress = stop_loading);
}

/* What everybody does: texts with stops at every place, both ways of asking, clones, files. */
static void regular(mtad_pair *pair, mtad_session *session, const char *folder) {
    enum { N = 16 };
    mtad_request request;
    mtad_statistics statistics = {.struct_size = sizeof statistics};
    mtad_session *twin, *restored;
    mtad_generation *generation;
    story whole = {.session = session};
    char path[512];
    size_t count, logits_count;
    snprintf(path, sizeof path, "%s/torture.session", folder);

    EXPECT(mtad_request_init(&request, sizeof request), MTAD_OK);
    request.max_tokens = N;
    request.seed = 3;
    request.score = 1;
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    EXPECT(mtad_session_generate(session, &request, hear, &whole, &statistics), MTAD_OK);
    EXPECT(statistics.stop, MTAD_STOP_MAX_TOKENS);
    TRUE(statistics.tokens == N && whole.tokens == N && statistics.perplexity > 1);

    for (int at = 1; at <= N; at++) {
        story s = {.stop_after = at};
        EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
        EXPECT(mtad_session_generate(session, &request, hear, &s, &statistics), MTAD_OK);
        EXPECT(statistics.stop, MTAD_STOP_CALLBACK);
        EXPECT(mtad_session_save(session, path), MTAD_OK);
        EXPECT(mtad_session_load(pair, NULL, path, &restored), MTAD_OK);
        EXPECT(mtad_session_clone(session, &twin), MTAD_OK);
        request.max_tokens = N - at;
        story t = s, u = s;
        s.stop_after = t.stop_after = u.stop_after = 0;
        EXPECT(mtad_session_generate(restored, &request, hear, &t, &statistics), MTAD_OK);
        EXPECT(mtad_session_generate(twin, &request, hear, &u, NULL), MTAD_OK);
        EXPECT(mtad_session_generate(session, &request, hear, &s, NULL), MTAD_OK);
        TRUE(!strcmp(s.text, whole.text) && !strcmp(t.text, whole.text) && !strcmp(u.text, whole.text));
        request.max_tokens = N;
        mtad_session_free(&restored);
        mtad_session_free(&twin);
    }

    story cancelled = {.session = session, .cancel_after = 2};
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    EXPECT(mtad_session_generate(session, &request, hear, &cancelled, &statistics), MTAD_OK);
    EXPECT(statistics.stop, MTAD_STOP_CANCELLED);

    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    EXPECT(mtad_generation_start(session, &request, &generation), MTAD_OK);
    mtad_generation *second;
    EXPECT(mtad_generation_start(session, &request, &second), MTAD_ERROR_BUSY);
    EXPECT(mtad_session_reset(session), MTAD_ERROR_BUSY);
    EXPECT(mtad_session_save(session, path), MTAD_ERROR_BUSY);
    story pulled = {.length = 0};
    mtad_token token = {.struct_size = sizeof token};
    while (mtad_generation_next(generation, &token) == MTAD_OK) {
        TRUE(token.flags & MTAD_TOKEN_SCORED && token.log_prob <= 0);
        hear(&token, &pulled);
    }
    EXPECT(mtad_generation_next(generation, &token), MTAD_DONE);
    TRUE(!strcmp(pulled.text, whole.text));
    EXPECT(mtad_generation_statistics(generation, &statistics), MTAD_OK);
    EXPECT(statistics.stop, MTAD_STOP_MAX_TOKENS);
    EXPECT(mtad_generation_cancel(generation), MTAD_OK);
    mtad_generation_free(&generation);

    EXPECT(mtad_session_tokens(session, NULL, 0, &count), MTAD_OK);
    TRUE(count > N);
    EXPECT(mtad_session_logits(session, NULL, 0, &logits_count), MTAD_OK);
    float *logits = malloc(logits_count * sizeof *logits);
    EXPECT(mtad_session_logits(session, logits, logits_count, &logits_count), MTAD_OK);
    TRUE(isfinite(logits[0]) && isfinite(logits[logits_count - 1]));
    free(logits);

    /* Energy, by a meter that always shows 12.5 W. */
    mtad_energy energy = {.struct_size = sizeof energy};
    snprintf(path, sizeof path, "file:%s/watts", folder);
    EXPECT(mtad_session_energy_begin(session, path, 200), MTAD_OK);
    for (int i = 0; i < 60; i++) {
        EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
        EXPECT(mtad_session_generate(session, &request, NULL, NULL, NULL), MTAD_OK);
    }
    EXPECT(mtad_session_energy_end(session, &energy), MTAD_OK);
    TRUE(fabs(energy.joules / energy.seconds - 12.5) < 0.1 && energy.verify_joules > 0);
    EXPECT(mtad_session_energy_end(session, &energy), MTAD_ERROR_UNAVAILABLE);

    /* A generation outlives its session's and its pair's handles. */
    EXPECT(mtad_session_clone(session, &twin), MTAD_OK);
    EXPECT(mtad_generation_start(twin, &request, &generation), MTAD_OK);
    mtad_session_free(&twin);
    EXPECT(mtad_generation_next(generation, &token), MTAD_OK);
    mtad_generation_free(&generation);
    EXPECT(mtad_session_reset(session), MTAD_OK);
    EXPECT(mtad_session_tokens(session, NULL, 0, &count), MTAD_OK);
    EXPECT(count, 0);
}

static void *write_story(void *pair) {
    story *s = calloc(1, sizeof *s);
    mtad_session *session;
    mtad_request request;
    mtad_request_init(&request, sizeof request);
    request.max_tokens = 30;
    EXPECT(mtad_session_create(pair, NULL, &session), MTAD_OK);
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    EXPECT(mtad_session_generate(session, &request, hear, s, NULL), MTAD_OK);
    mtad_session_free(&session);
    return s;
}

static void *quarrel(void *session) {
    for (int i = 0; i < 20; i++) {
        size_t count;
        int status = mtad_session_prompt(session, PROMPT, NT, 0);
        TRUE(status == MTAD_OK || status == MTAD_ERROR_BUSY);
        status = mtad_session_tokens(session, NULL, 0, &count);
        TRUE(status == MTAD_OK || status == MTAD_ERROR_BUSY);
    }
    return NULL;
}

static void *cancel_often(void *generation) {
    for (int i = 0; i < 1000; i++)
        EXPECT(mtad_generation_cancel(generation), MTAD_OK);
    return NULL;
}

static void threads(mtad_pair *pair, mtad_session *session) {
    pthread_t thread[4];
    story *stories[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&thread[i], NULL, write_story, pair);
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], (void **)&stories[i]);
    for (int i = 0; i < 4; i++)
        TRUE(stories[i]->tokens == 30 && !strcmp(stories[i]->text, stories[0]->text));
    for (int i = 0; i < 4; i++)
        free(stories[i]);

    for (int i = 0; i < 4; i++)
        pthread_create(&thread[i], NULL, quarrel, session);
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);

    /* Cancelled while it generates: it ends, though it has no limit but the context. */
    mtad_request request;
    mtad_generation *generation;
    mtad_token token = {.struct_size = sizeof token};
    mtad_statistics statistics = {.struct_size = sizeof statistics};
    mtad_request_init(&request, sizeof request);
    request.max_tokens = MTAD_NO_LIMIT;
    request.strategy = "sample";
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    EXPECT(mtad_generation_start(session, &request, &generation), MTAD_OK);
    EXPECT(mtad_generation_next(generation, &token), MTAD_OK);
    pthread_create(&thread[0], NULL, cancel_often, generation);
    while (mtad_generation_next(generation, &token) == MTAD_OK)
        ;
    pthread_join(thread[0], NULL);
    EXPECT(mtad_generation_statistics(generation, &statistics), MTAD_OK);
    EXPECT(statistics.stop, MTAD_STOP_CANCELLED);
    mtad_generation_free(&generation);
}

/* The target from memory, freed at once; its session outlives the pair. */
static void from_memory(const char *path) {
    FILE *file = fopen(path, "rb");
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *data = malloc(size);
    TRUE(fread(data, 1, size, file) == size);
    fclose(file);

    mtad_pair_options options;
    mtad_session_options how;
    mtad_pair *pair;
    mtad_session *session;
    int messages = 0;
    mtad_pair_options_init(&options, sizeof options);
    options.target_data = data;
    options.target_size = size;
    options.threads = 1;
    options.log = count_messages;
    options.user_data = &messages;
    EXPECT(mtad_pair_open(&options, &pair, NULL), MTAD_OK);
    memset(data, 0xff, size);
    free(data);
    mtad_pair_info info = {.struct_size = sizeof info};
    EXPECT(mtad_pair_get_info(pair, &info), MTAD_OK);
    TRUE(!info.has_draft && info.vocabulary > 100 && info.context > 10);
    mtad_session_options_init(&how, sizeof how);
    how.context = info.context + 1;
    EXPECT(mtad_session_create(pair, &how, &session), MTAD_OK);
    EXPECT(messages, 2);
    mtad_pair_free(&pair);
    EXPECT(mtad_pair_get_info(pair, &info), MTAD_ERROR_NULL);
    EXPECT(mtad_session_prompt(session, PROMPT, NT, 0), MTAD_OK);
    mtad_request request;
    mtad_request_init(&request, sizeof request);
    request.max_tokens = 5;
    EXPECT(mtad_session_generate(session, &request, NULL, NULL, NULL), MTAD_OK);
    request.strategy = "mtad";
    EXPECT(mtad_session_generate(session, &request, NULL, NULL, NULL), MTAD_ERROR_INVALID);
    mtad_session_free(&session);
}

int main(int argc, char **argv) {
    mtad_pair_options options;
    mtad_pair *pair;
    mtad_session *session;
    char devices[4096];
    size_t length;
    if (argc != 3)
        return 2;
    EXPECT(mtad_abi_version(), MTAD_ABI_VERSION);
    EXPECT(mtad_devices(devices, sizeof devices, &length, NULL), MTAD_OK);
    TRUE(strstr(devices, "\"cpu\"") && length == strlen(devices));
    nulls();
    EXPECT(mtad_pair_options_init(&options, sizeof options), MTAD_OK);
    options.threads = 1;
    EXPECT(mtad_pair_open(&options, &pair, NULL), MTAD_OK);
    EXPECT(mtad_session_create(pair, NULL, &session), MTAD_OK);
    half_nulls(pair, session);
    sizes(pair, session);
    absurd(pair, session, argv[1]);
    regular(pair, session, argv[1]);
    threads(pair, session);
    from_memory(argv[2]);
    mtad_session_free(&session);
    mtad_pair_free(&pair);
    return failures > 0;
}
