"""mtad for Python: ctypes over libmtad, with no other dependency.

    from mtad import Pair
    with Pair() as pair, pair.session() as session:
        session.prompt("Once upon a time")
        for token in session.generate(max_tokens=50, seed=11):
            print(token.text, end="", flush=True)

The library is looked for where MTAD_LIBRARY says, then in target/release beside the examples,
then where the system's loader looks. As a program it streams a text:

    python examples/python/mtad.py "Once upon a time" [SEED] [TOKENS]
"""

import ctypes
import ctypes.util
import os
import sys
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_float, c_int32, c_size_t
from ctypes import c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from pathlib import Path

ABI = 1
OK, DONE = 0, 1
NO_LIMIT = c_size_t(-1).value
STOPS = ["none", "max_tokens", "eos", "text", "cancelled", "context", "callback"]


class MtadError(Exception):
    """What went wrong; `code` is the mtad_status."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class _Struct(ctypes.Structure):
    def __init__(self):
        super().__init__()
        self.struct_size = sizeof(self)


class _Error(_Struct):
    _fields_ = [("struct_size", c_size_t), ("code", c_int32), ("message", c_char * 1024)]


class _PairOptions(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("target", c_char_p), ("draft", c_char_p),
        ("target_data", c_void_p), ("target_size", c_size_t),
        ("draft_data", c_void_p), ("draft_size", c_size_t),
        ("device", c_char_p), ("threads", c_uint32), ("flags", c_uint32),
        ("progress", c_void_p), ("log", c_void_p), ("user_data", c_void_p),
    ]


class _SessionOptions(_Struct):
    _fields_ = [("struct_size", c_size_t), ("context", c_size_t), ("cache_type", c_char_p)]


class _Request(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("strategy", c_char_p), ("max_tokens", c_size_t),
        ("seed", c_uint64), ("top_k", c_size_t), ("temperature", c_float), ("top_p", c_float),
        ("min_p", c_float), ("repeat_penalty", c_float), ("gamma", c_size_t),
        ("beam_width", c_size_t), ("tau", c_double), ("fallback", c_double),
        ("rollback", c_double), ("epsilon", c_double), ("delta", c_double),
        ("branching", POINTER(c_size_t)), ("branching_count", c_size_t),
        ("stop", POINTER(c_char_p)), ("stop_count", c_size_t),
        ("with_replacement", c_int32), ("score", c_int32),
    ]


class _Token(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("text", c_void_p), ("text_length", c_size_t),
        ("log_prob", c_double), ("id", c_uint32), ("flags", c_uint32),
    ]


class _Statistics(_Struct):
    _fields_ = [("struct_size", c_size_t)] + [
        (name, c_uint64) for name in ("prompt_tokens", "tokens", "rounds", "drafted", "accepted")
    ] + [
        (name, c_double) for name in (
            "acceptance_rate", "block_efficiency", "min_joint_ratio", "perplexity",
            "draft_seconds", "verify_seconds", "sample_seconds")
    ] + [("stop", c_int32), ("reserved", c_int32)]


def _load():
    beside = Path(__file__).resolve().parents[2] / "target" / "release"
    names = ["libmtad.so", "libmtad.dylib", "mtad.dll"]
    candidates = [os.environ.get("MTAD_LIBRARY"), *(str(beside / name) for name in names)]
    path = next((p for p in candidates if p and os.path.exists(p)), None)
    path = path or ctypes.util.find_library("mtad")
    if path is None:
        raise OSError("libmtad was not found; MTAD_LIBRARY names it")
    library = ctypes.CDLL(path)
    library.mtad_version.restype = c_char_p
    library.mtad_abi_version.restype = c_uint32
    if library.mtad_abi_version() >> 16 != ABI:
        raise OSError(f"{path} has another interface than this module was written for")
    # Everything else takes pointers and sizes, which must not be cut to ints.
    p, n, u = c_void_p, c_size_t, c_uint32
    for name, arguments in {
        "request_init": [p, n], "pair_options_init": [p, n], "session_options_init": [p, n],
        "pair_open": [p, p, p], "pair_last_error": [p, p],
        "tokenize": [p, c_char_p, n, u, p, n, p], "detokenize": [p, p, n, u, p, n, p],
        "session_create": [p, p, p], "session_load": [p, p, c_char_p, p],
        "session_clone": [p, p], "session_save": [p, c_char_p], "session_reset": [p],
        "session_prompt": [p, c_char_p, n, u], "session_tokens": [p, p, n, p],
        "session_logits": [p, p, n, p], "session_cancel": [p], "session_last_error": [p, p],
        "generation_start": [p, p, p], "generation_next": [p, p],
        "generation_statistics": [p, p], "generation_last_error": [p, p],
    }.items():
        function = getattr(library, "mtad_" + name)
        function.argtypes, function.restype = arguments, c_int32
    for name in ("pair_free", "session_free", "generation_free"):
        function = getattr(library, "mtad_" + name)
        function.argtypes, function.restype = [p], None
    return library


_lib = _load()


def version():
    """The version of the library."""
    return _lib.mtad_version().decode()


class _Handle:
    """An opaque handle of some kind: `pair`, `session` or `generation`."""

    kind = ""

    def __init__(self):
        self._handle = c_void_p()

    def _check(self, status):
        if status < 0:
            error = _Error()
            getattr(_lib, f"mtad_{self.kind}_last_error")(self._handle, byref(error))
            message = error.message.decode() if error.code else f"this {self.kind} was closed"
            raise MtadError(status, message)
        return status

    def close(self):
        """Frees it; a second time does nothing."""
        getattr(_lib, f"mtad_{self.kind}_free")(byref(self._handle))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None):
            self.close()


class Pair(_Handle):
    """A target model and perhaps a draft; without a path the built-in ones. Threads may share it."""

    kind = "pair"

    def __init__(self, target=None, draft=None, threads=0):
        super().__init__()
        options, error = _PairOptions(), _Error()
        _lib.mtad_pair_options_init(byref(options), sizeof(options))
        options.target = os.fsencode(target) if target else None
        options.draft = os.fsencode(draft) if draft else None
        options.threads = threads
        status = _lib.mtad_pair_open(byref(options), byref(self._handle), byref(error))
        if status != OK:
            raise MtadError(status, error.message.decode())

    def tokenize(self, text, bos=True, special=False):
        """The tokens of a text."""
        data, count, flags = text.encode(), c_size_t(), bos | special << 1
        arguments = (self._handle, data, len(data), flags)
        self._check(_lib.mtad_tokenize(*arguments, None, 0, byref(count)))
        tokens = (c_uint32 * max(count.value, 1))()
        self._check(_lib.mtad_tokenize(*arguments, tokens, len(tokens), byref(count)))
        return tokens[: count.value]

    def detokenize(self, tokens):
        """The text of tokens."""
        data, length = (c_uint32 * len(tokens))(*tokens), c_size_t()
        arguments = (self._handle, data, len(tokens), 0)
        self._check(_lib.mtad_detokenize(*arguments, None, 0, byref(length)))
        buffer = ctypes.create_string_buffer(length.value + 1)
        self._check(_lib.mtad_detokenize(*arguments, buffer, len(buffer), byref(length)))
        return buffer.raw[: length.value].decode()

    def session(self, path=None, context=0, cache_type="f16"):
        """A new session, or one that was saved to `path`."""
        options, session = _SessionOptions(), Session()
        options.context, options.cache_type = context, cache_type.encode()
        place = byref(session._handle)
        if path is None:
            self._check(_lib.mtad_session_create(self._handle, byref(options), place))
        else:
            file = os.fsencode(path)
            self._check(_lib.mtad_session_load(self._handle, byref(options), file, place))
        return session


@dataclass
class Token:
    """A generated token; `id` is None for text that was held back until the end."""

    text: str
    id: "int | None"
    drafted: bool
    log_prob: "float | None"


class Session(_Handle):
    """A text in the making; one thread at a time. Made by `Pair.session`."""

    kind = "session"

    def prompt(self, text, special=False):
        """Begins a text."""
        data = text.encode()
        self._check(_lib.mtad_session_prompt(self._handle, data, len(data), special << 1))

    def generate(self, max_tokens=256, stop=(), **settings):
        """Goes on with the text: an iterator of tokens. `settings` are fields of mtad_request,
        such as seed, strategy, temperature, tau."""
        return Generation(self, max_tokens, stop, settings)

    def tokens(self):
        """Prompt and generated tokens."""
        count = c_size_t()
        self._check(_lib.mtad_session_tokens(self._handle, None, 0, byref(count)))
        tokens = (c_uint32 * max(count.value, 1))()
        self._check(_lib.mtad_session_tokens(self._handle, tokens, len(tokens), byref(count)))
        return tokens[: count.value]

    def logits(self):
        """The logits of the token that follows the text."""
        count = c_size_t()
        self._check(_lib.mtad_session_logits(self._handle, None, 0, byref(count)))
        logits = (c_float * count.value)()
        self._check(_lib.mtad_session_logits(self._handle, logits, count, byref(count)))
        return list(logits)

    def cancel(self):
        """Stops the generation under way; from any thread."""
        self._check(_lib.mtad_session_cancel(self._handle))

    def clone(self):
        """A session of its own with the same text."""
        twin = Session()
        self._check(_lib.mtad_session_clone(self._handle, byref(twin._handle)))
        return twin

    def reset(self):
        """Forgets the text."""
        self._check(_lib.mtad_session_reset(self._handle))

    def save(self, path):
        """Writes the session to a file, for `Pair.session(path)`."""
        self._check(_lib.mtad_session_save(self._handle, os.fsencode(path)))


class Generation(_Handle):
    """Tokens, one after the other. The session can be used again when it ended or was closed."""

    kind = "generation"

    def __init__(self, session, max_tokens, stop, settings):
        super().__init__()
        request = _Request()
        _lib.mtad_request_init(byref(request), sizeof(request))
        request.max_tokens = NO_LIMIT if max_tokens is None else max_tokens
        stops = [text.encode() for text in stop]
        request.stop, request.stop_count = (c_char_p * len(stops))(*stops), len(stops)
        for name, value in settings.items():
            if name not in (field[0] for field in _Request._fields_):
                raise TypeError(f"there is no setting {name!r}")
            setattr(request, name, value.encode() if isinstance(value, str) else value)
        start = _lib.mtad_generation_start
        session._check(start(session._handle, byref(request), byref(self._handle)))
        self.statistics = None

    def __iter__(self):
        return self

    def __next__(self):
        token = _Token()
        if not self._handle or self._next(token) == DONE:
            self.close()
            raise StopIteration
        flags = token.flags
        return Token(
            text=ctypes.string_at(token.text, token.text_length).decode(),
            id=token.id if flags & 1 else None,
            drafted=bool(flags & 2),
            log_prob=token.log_prob if flags & 4 else None,
        )

    def _next(self, token):
        return self._check(_lib.mtad_generation_next(self._handle, byref(token)))

    def close(self):
        """Ends it. `statistics` then is a dict."""
        if self._handle:
            found = _Statistics()
            if _lib.mtad_generation_statistics(self._handle, byref(found)) == OK:
                names = [name for name, _ in _Statistics._fields_[1:-1]]
                self.statistics = {name: getattr(found, name) for name in names}
                self.statistics["stop"] = STOPS[found.stop]
        super().close()


def main():
    """Streams a text."""
    arguments = dict(enumerate(sys.argv[1:]))
    prompt = arguments.get(0, "Once upon a time")
    seed, tokens = int(arguments.get(1, 0)), int(arguments.get(2, 256))
    with Pair(threads=1) as pair, pair.session() as session:
        session.prompt(prompt)
        generation = session.generate(max_tokens=tokens, seed=seed)
        for token in generation:
            print(token.text, end="", flush=True)
        print()
        print(generation.statistics, file=sys.stderr)


if __name__ == "__main__":
    main()
