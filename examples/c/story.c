/*
 * Streams a text, in plain C.
 *
 *     cargo build --release
 *     cc -I include examples/c/story.c -o story -L target/release -lmtad -Wl,-rpath,$PWD/target/release
 *     ./story [-m TARGET.gguf [-d DRAFT.gguf]] [-s SEED] [-n TOKENS] [-l FILE] [-w FILE] [PROMPT]
 *
 * -l goes on with a session that was saved, -w saves the session. Ctrl-C ends the text; what there
 * is of it is kept.
 */
#include <mtad.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static mtad_session *session;

static void interrupt(int signal) {
    (void)signal;
    mtad_session_cancel(session);
}

static int fail(const char *what, const mtad_error *error) {
    fprintf(stderr, "%s: %s\n", what, error->message);
    return EXIT_FAILURE;
}

static int32_t progress(uint64_t done, uint64_t total, void *user_data) {
    (void)user_data;
    fprintf(stderr, "\rloading %3d%%", (int)(100 * done / total));
    return 0;
}

static int32_t print(const mtad_token *token, void *drafted) {
    fwrite(token->text, 1, token->text_length, stdout);
    fflush(stdout);
    *(unsigned *)drafted += (token->flags & MTAD_TOKEN_DRAFTED) != 0;
    return 0;
}

int main(int argc, char **argv) {
    mtad_error error = {.struct_size = sizeof error};
    mtad_pair_options options;
    mtad_request request;
    const char *prompt = "Once upon a time", *load = NULL, *save = NULL;

    if (mtad_abi_version() >> 16 != MTAD_ABI_VERSION >> 16) {
        fprintf(stderr, "libmtad %s does not fit this program\n", mtad_version());
        return EXIT_FAILURE;
    }
    mtad_pair_options_init(&options, sizeof options);
    mtad_request_init(&request, sizeof request);
    options.threads = 1;
    options.progress = progress;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (argv[i][0] != '-') {
            prompt = argv[i];
            continue;
        }
        switch (argv[i++][1]) {
        case 'm': options.target = value; break;
        case 'd': options.draft = value; break;
        case 's': request.seed = strtoull(value, NULL, 10); break;
        case 'n': request.max_tokens = strtoull(value, NULL, 10); break;
        case 'l': load = value; break;
        case 'w': save = value; break;
        default: fprintf(stderr, "what is %s?\n", argv[i - 1]); return 2;
        }
    }

    mtad_pair *pair;
    if (mtad_pair_open(&options, &pair, &error) != MTAD_OK)
        return fail("\ncannot open the pair", &error);
    fputs("\r            \r", stderr);
    mtad_status status = load ? mtad_session_load(pair, NULL, load, &session)
                              : mtad_session_create(pair, NULL, &session);
    if (status != MTAD_OK) {
        mtad_pair_last_error(pair, &error);
        mtad_pair_free(&pair);
        return fail("cannot begin", &error);
    }
    signal(SIGINT, interrupt);

    mtad_statistics statistics = {.struct_size = sizeof statistics};
    unsigned drafted = 0;
    if (!load)
        status = mtad_session_prompt(session, prompt, MTAD_NUL_TERMINATED, 0);
    if (status == MTAD_OK)
        status = mtad_session_generate(session, &request, print, &drafted, &statistics);
    if (status == MTAD_OK && save)
        status = mtad_session_save(session, save);
    puts("");
    if (status == MTAD_OK)
        fprintf(stderr, "%u tokens, %u of them drafted, %.2f per pass of the target\n",
                (unsigned)statistics.tokens, drafted, statistics.block_efficiency);
    mtad_session_last_error(session, &error);
    mtad_session_free(&session);
    mtad_pair_free(&pair);
    return status == MTAD_OK ? EXIT_SUCCESS : fail("it did not work", &error);
}
