#!/usr/bin/env python3
"""How fast a server with OpenAI's interface answers many clients at once, and whether it stands what they do.

    benches/serve_load.py --url http://127.0.0.1:8080 [--url other=http://127.0.0.1:8081] [--clients 1,2,4,8] [--turns 3]
    benches/serve_load.py --url http://127.0.0.1:8080 --soak 30 --pid PID

Clients take requests off one list, each the next when it has its answer: the same prompts and seeds for each server,
which take turns. A table, and with --out a file of JSON, of each server and number of clients:

  tokens/s    tokens of all answers, by the second
  first       time from the request to the first text
  per token   of each answer, the time from the first text to the last, by the tokens between
  gap         time between two pieces of text as a reader sees them; joint decoding sends several tokens in a piece

--body NAME=JSON adds members to the requests of one server, such as mtad='{"strategy": "speculative"}'.

--soak has clients that go away, send what is no request, ask for too much and cut streams, beside others that mean it.
It fails if anything is answered with 5xx, if the server ends, if those that mean it are not answered, or if something
still runs after all have gone.
"""
import argparse
import collections
import http.client
import json
import os
import queue
import random
import re
import socket
import statistics
import sys
import threading
import time
from urllib.parse import urlsplit

BEGINNINGS = [
    "Once upon a time there was a little girl who",
    "Tom and his dog went to the park. They",
    "The cat sat on the mat and looked at",
    "It was raining, and nobody wanted to",
    "One day a bird found a shiny stone. She",
    "Lily wanted to bake a cake for her mother, but",
    "The old tree in the garden had a secret:",
    "Ben was afraid of the dark. Every night he",
]


class Server:
    def __init__(self, name, url, args, body=None):
        parts = urlsplit(url)
        self.name, self.url, self.body = name, url, body or {}
        self.host, self.port, self.base = parts.hostname, parts.port or 80, parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if args.api_key:
            self.headers["Authorization"] = f"Bearer {args.api_key}"
        self.path = f"{self.base}/v1/" + ("chat/completions" if args.chat else "completions")
        self.chat = args.chat
        status, _, text = self.ask("GET", f"{self.base}/v1/models")
        if status != 200:
            sys.exit(f"{url}: {status} {text}")
        self.model = json.loads(text)["data"][0]["id"]

    def connect(self, timeout=300):
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(self, method, path, body=None):
        connection = self.connect()
        try:
            connection.request(method, path, body, self.headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def request(self, prompt, **options):
        said = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        return json.dumps({"model": self.model, **said, **options, **self.body})

    def metric(self, name):
        """A figure of /metrics; None where there is no such thing."""
        status, _, text = self.ask("GET", f"{self.base}/metrics")
        lines = [line for line in text.splitlines() if re.match(rf"{name}[ {{]", line)] if status == 200 else []
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None


def events(answer):
    """The data of server-sent events."""
    while line := answer.readline():
        if line.startswith(b"data: "):
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def text_of(choice):
    return choice.get("text") or choice.get("delta", {}).get("content")


def timed(connection, server, body):
    """One answer: when its pieces came, and how many tokens it has."""
    begun = time.perf_counter()
    connection.request("POST", server.path, body, server.headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{server.name}: {answer.status} {answer.read().decode()}")
    times, tokens = [], None
    for event in events(answer):
        if "error" in event:
            raise RuntimeError(f"{server.name}: {event}")
        if any(text_of(choice) for choice in event.get("choices", [])):
            times.append(time.perf_counter())
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    answer.read()
    # A server that does not tell sends a token in each piece.
    return begun, times, len(times) if tokens is None else tokens


def measure(server, clients, args, turn):
    """All requests of a turn by so many clients."""
    waiting = queue.SimpleQueue()
    for i in range(args.requests * clients):
        prompt = BEGINNINGS[i % len(BEGINNINGS)] * (1 + args.prompt_words // 9)
        options = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": 1000 * turn + i}
        waiting.put(server.request(prompt, stream=True, stream_options={"include_usage": True}, **options))
    found, faults = [], []

    def client():
        connection = server.connect()
        while True:
            try:
                body = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                found.append(timed(connection, server, body))
            except Exception as fault:
                faults.append(fault)
                return
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if faults:
        sys.exit(str(faults[0]))
    told = [(start, times, tokens) for start, times, tokens in found if times]
    return {
        "tokens": sum(tokens for *_, tokens in found),
        "seconds": seconds,
        "first": [times[0] - start for start, times, _ in told],
        "per_token": [(times[-1] - times[0]) / (tokens - 1) for _, times, tokens in told if tokens > 1],
        "gap": [b - a for _, times, _ in told for a, b in zip(times, times[1:])],
    }


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def compare(servers, args):
    counts = [int(n) for n in args.clients.split(",")]
    for server in servers:
        # What is paid once is not measured.
        measure(server, 1, argparse.Namespace(**{**vars(args), "requests": 2}), 0)
    turns = collections.defaultdict(list)
    for turn in range(1, args.turns + 1):
        for clients in counts:
            for server in servers if turn % 2 else reversed(servers):
                turns[server.name, clients].append(measure(server, clients, args, turn))
        print(f"turn {turn}/{args.turns}", file=sys.stderr)
    rows = []
    for clients in counts:
        for server in servers:
            measured = turns[server.name, clients]
            rates = [one["tokens"] / one["seconds"] for one in measured]
            row = {"server": server.name, "clients": clients, "tokens_per_second": statistics.median(rates)}
            row |= {"tokens_per_second_of_turns": rates, "answers": sum(len(one["first"]) for one in measured)}
            for name in ("first", "per_token", "gap"):
                values = [1000 * value for one in measured for value in one[name]]
                row[f"{name}_ms_median"] = statistics.median(values) if values else float("nan")
                row[f"{name}_ms_p99"] = percentile(values, 0.99)
            rows.append(row)
    print(f"{'':>20} {'':>10} {'first, ms':>18} {'per token, ms':>18} {'gap, ms':>18}")
    print(f"{'server':>12} {'clients':>7} {'tokens/s':>10}" + f" {'median':>9} {'p99':>8}" * 3)
    for row in rows:
        figures = [row[f"{name}_ms_{which}"] for name in ("first", "per_token", "gap") for which in ("median", "p99")]
        told = "".join(f" {value:{9 if i % 2 == 0 else 8}.2f}" for i, value in enumerate(figures))
        print(f"{row['server']:>12} {row['clients']:>7} {row['tokens_per_second']:>10.1f}{told}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"options": vars(args), "rows": rows}, file, indent=1)


# What a server is to stand.

MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"prompt": 5}',
    b'{"prompt": "a", "n": -1}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "strategy": "none"}',
    b'{"prompt": [4000000000]}',
    b'{"messages": "a"}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": ' + b"[" * 5000,
    b'{"prompt": "a", "max_tokens": 5} trailing',
]


class Soak:
    def __init__(self, server, args):
        self.server, self.args = server, args
        self.statuses, self.done = collections.Counter(), collections.Counter()
        self.faults, self.lock, self.ends = [], threading.Lock(), threading.Event()

    def count(self, what, status=None):
        with self.lock:
            self.done[what] += 1
            if status is not None:
                self.statuses[status] += 1

    def body(self, rng, **options):
        words = "".join(rng.choice(BEGINNINGS) + " " for _ in range(rng.randint(1, 4)))
        options = {"max_tokens": rng.choice([1, 8, 40, 120]), "seed": rng.randrange(2**31), **options}
        return self.server.request(words, temperature=rng.choice([0, 0.7, 1]), n=rng.choice([1, 1, 1, 2]), **options)

    def raw(self, request, read=0):
        """Sends bytes, reads some, which it gives, and is gone."""
        with socket.create_connection((self.server.host, self.server.port), timeout=120) as stream:
            stream.sendall(request)
            return stream.recv(read) if read else b""

    def http(self, body, length=None):
        headers = "".join(f"{name}: {value}\r\n" for name, value in self.server.headers.items())
        length = len(body) if length is None else length
        head = f"POST {self.server.path} HTTP/1.1\r\nHost: {self.server.host}\r\n{headers}Content-Length: {length}\r\n\r\n"
        return head.encode() + body

    def whole(self, rng):
        status, headers, text = self.server.ask("POST", self.server.path, self.body(rng))
        self.count("whole", status)
        if status == 429:
            time.sleep(min(5, int(headers["Retry-After"])) * rng.random())
        elif status != 200 or not json.loads(text)["choices"]:
            raise RuntimeError(f"{status} {text}")

    def stream(self, rng, cut=False):
        connection = self.server.connect()
        try:
            connection.request("POST", self.server.path, self.body(rng, stream=True), self.server.headers)
            answer = connection.getresponse()
            self.count("streams cut" if cut else "streams", answer.status)
            if answer.status == 429:
                time.sleep(rng.random())
                return
            left = rng.randint(1, 6)
            ends = 0
            for event in events(answer):
                if "error" in event:
                    raise RuntimeError(f"in a stream: {event}")
                ends += sum(1 for choice in event["choices"] if choice["finish_reason"])
                left -= 1
                if cut and left == 0:
                    return
            if not cut and ends == 0:
                raise RuntimeError("a stream without an end")
        finally:
            connection.close()

    def vanish(self, rng):
        request = self.http(self.body(rng, stream=rng.random() < 0.5, max_tokens=1000).encode())
        match rng.randrange(3):
            case 0:
                self.raw(request[: rng.randrange(1, len(request))])
            case 1:
                self.raw(request)
            case _:
                self.raw(request, rng.choice([1, 200]))
        self.count("clients gone")

    def malformed(self, rng):
        status, _, text = self.server.ask("POST", self.server.path, rng.choice(MALFORMED))
        self.count("malformed", status)
        if status < 400:
            raise RuntimeError(f"{status} for a body that is none")

    def oversized(self, rng):
        if rng.random() < 0.5:
            status, _, text = self.server.ask("POST", self.server.path, self.server.request("one " * 50_000))
            self.count("oversized", status)
            if not 400 <= status < 500:
                raise RuntimeError(f"{status} for a prompt that has no room")
        else:
            found = re.match(rb"HTTP/1.1 (\d+)", self.raw(self.http(b"{", length=2**40), 100))
            self.count("oversized", int(found[1]))

    def other(self, rng):
        method, path = rng.choice([("GET", "/nowhere"), ("PUT", "/v1/models"), ("GET", "/health"), ("GET", "/v1/models")])
        self.count("others", self.server.ask(method, self.server.base + path)[0])

    def client(self, number):
        rng = random.Random(self.args.seed + number)
        ways = [self.whole, self.stream, self.vanish, lambda rng: self.stream(rng, cut=True), self.malformed]
        ways += [self.oversized, self.other]
        while not self.ends.is_set():
            [way] = rng.choices(ways, [4, 4, 2, 2, 1, 1, 1])
            try:
                way(rng)
            except (OSError, RuntimeError, http.client.HTTPException, LookupError, TypeError, ValueError) as fault:
                with self.lock:
                    self.faults.append(f"{getattr(way, '__name__', 'stream cut')}: {type(fault).__name__} {fault}")
                time.sleep(0.2)

    def resident(self):
        """Mebibytes in memory, and open files."""
        with open(f"/proc/{self.args.pid}/status") as file:
            [kib] = re.findall(r"VmRSS:\s+(\d+)", file.read())
        return int(kib) / 1024, len(os.listdir(f"/proc/{self.args.pid}/fd"))

    def tell(self, begun):
        line = f"{time.monotonic() - begun:7.0f} s"
        if self.args.pid:
            mib, files = self.resident()
            self.memory.append(mib)
            line += f"  {mib:8.1f} MiB  {files:4} files"
        running, waiting = (self.server.metric(f"mtad_{name}") for name in ("running", "waiting"))
        with self.lock:
            statuses = "  ".join(f"{status}: {n}" for status, n in sorted(self.statuses.items()))
            print(f"{line}  running {running}  waiting {waiting}  {statuses}  faults: {len(self.faults)}", flush=True)

    def run(self):
        self.memory = []
        begun = time.monotonic()
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(self.args.soak_clients)]
        for thread in threads:
            thread.start()
        try:
            while (left := begun + 60 * self.args.soak - time.monotonic()) > 0:
                time.sleep(min(30, left))
                self.tell(begun)
        finally:
            self.ends.set()
            for thread in threads:
                thread.join()
        end = time.monotonic() + 30
        busy = True
        while busy and time.monotonic() < end:
            busy = any(self.server.metric(f"mtad_{name}") for name in ("running", "waiting"))
            time.sleep(0.1)
        self.tell(begun)
        print("  ".join(f"{what}: {n}" for what, n in sorted(self.done.items())))
        if len(self.memory) > 2:
            print(f"memory: {self.memory[0]:.1f} MiB at first, {max(self.memory):.1f} at most, {self.memory[-1]:.1f} in the end")
        for fault, n in collections.Counter(self.faults).most_common(10):
            print(f"fault, {n} times: {fault}")
        errors = sum(n for status, n in self.statuses.items() if status >= 500)
        if busy:
            print("something still runs, though all clients are gone")
        if errors:
            print(f"{errors} answers with 5xx")
        return not (busy or errors or self.faults)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", required=True, metavar="[NAME=]URL")
    parser.add_argument("--body", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--clients", default="1,2,4,8")
    parser.add_argument("--requests", type=int, default=8, help="of each client in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1)
    parser.add_argument("--prompt-words", type=int, default=9)
    parser.add_argument("--chat", action="store_true", help="chats rather than completions")
    parser.add_argument("--api-key")
    parser.add_argument("--out", metavar="FILE", help="figures as JSON")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--soak-clients", type=int, default=8)
    parser.add_argument("--pid", type=int, help="the server's process, whose memory is told")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    bodies = {name: json.loads(text) for name, text in (one.split("=", 1) for one in args.body)}
    servers = []
    for i, one in enumerate(args.url):
        name, url = one.split("=", 1) if re.match(r"[\w.-]+=", one) else (f"server{i + 1}", one)
        servers.append(Server(name, url, args, bodies.pop(name, None)))
    if bodies:
        sys.exit(f"--body names no server: {', '.join(bodies)}")
    if args.soak:
        sys.exit(0 if Soak(servers[0], args).run() else 1)
    compare(servers, args)


if __name__ == "__main__":
    main()
