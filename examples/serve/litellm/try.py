#!/usr/bin/env python3
"""Two `mtad serve` behind LiteLLM's proxy; one is killed amid 40 requests. No request that had not begun to stream is lost.

    python try.py [--mtad PATH] [--litellm PATH]

All of it listens on this machine alone, and ends with the script.
"""
import argparse
import collections
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

KEY, PROXY_KEY = "key-of-the-servers", "sk-key-of-the-proxy"
REQUESTS, CLIENTS, KILLED_AFTER = 40, 8, 10


def serve(mtad):
    """A server, and where it listens."""
    options = ["serve", "--port", "0", "--device", "cpu", "--api-key", KEY, "--parallel", "4"]
    process = subprocess.Popen([mtad, *options], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.match(r"listening on (http://\S+)", line):
            # What else it says must not fill the pipe.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1]
    sys.exit(f"{mtad} did not start")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def ask(port, seed, stream):
    """One request: `whole`, `cut` if its stream ended early, or what was refused."""
    body = {
        "model": "mtad", "messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 100, "seed": seed,
        # (Slow, so that the kill falls in the midst of some.)
        "strategy": "beam", "beam_width": 12, "stream": stream,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {PROXY_KEY}"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    text, begun = "", False
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        server = answer.headers.get("x-litellm-model-api-base", "?")
        if answer.status != 200:
            return f"lost: {answer.status} {answer.read().decode()[:300]}", server, text
        if not stream:
            choice = json.loads(answer.read())["choices"][0]
            return ("whole" if choice["finish_reason"] else "lost: no end"), server, choice["message"]["content"]
        ended = False
        while line := answer.readline():
            if line.startswith(b"data: {"):
                begun, event = True, json.loads(line[6:])
                for choice in event.get("choices", []):
                    text += choice["delta"].get("content") or ""
                    ended |= bool(choice.get("finish_reason"))
        if ended:
            return "whole", server, text
        return ("cut" if begun else "lost: a stream of nothing"), server, text
    except (OSError, http.client.HTTPException, ValueError, KeyError) as fault:
        return ("cut" if begun else f"lost: {fault!r}"), "?", text
    finally:
        connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtad", default="mtad")
    parser.add_argument("--litellm", default="litellm")
    args = parser.parse_args()
    # Whoever ends this ends all that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    processes = []
    try:
        (first, url), (second, other) = serve(args.mtad), serve(args.mtad)
        processes += [first, second]
        port = free_port()
        environment = {
            **os.environ, "MTAD_A": f"{url}/v1", "MTAD_B": f"{other}/v1", "MTAD_KEY": KEY, "LITELLM_MASTER_KEY": PROXY_KEY,
            # Prices of models come with the package.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1",
        }
        log = tempfile.TemporaryFile("w+")
        config = Path(__file__).with_name("config.yaml")
        options = ["--config", config, "--host", "127.0.0.1", "--port", str(port)]
        proxy = subprocess.Popen([args.litellm, *options], env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes.append(proxy)
        # (It takes its time: seconds, or on a busy machine minutes.)
        end, listens = time.monotonic() + 300, False
        while not listens and proxy.poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                listens = probe.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.2)
        if not listens:
            log.seek(0)
            sys.exit(f"the proxy did not start:\n{log.read()[-3000:]}")

        waiting, found = queue.SimpleQueue(), []
        for seed in range(REQUESTS):
            waiting.put(seed)

        def client():
            while not waiting.empty():
                try:
                    seed = waiting.get_nowait()
                except queue.Empty:
                    return
                found.append((seed, *ask(port, seed, stream=seed % 2 == 0)))

        begun = time.monotonic()
        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while len(found) < KILLED_AFTER and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        os.kill(second.pid, signal.SIGKILL)
        killed = len(found)
        for thread in threads:
            thread.join()
        print(f"{REQUESTS} requests in {time.monotonic() - begun:.1f} s; {other} was killed after {killed}")
        ends = collections.Counter(end for _, end, *_ in found)
        print("  ".join(f"{end}: {n}" for end, n in ends.items()))
        print("answered by", dict(collections.Counter(server for _, _, server, _ in found)))
        # What was cut, asked for again, is the same text from the server that is left.
        for seed, end, _, text in found:
            if end == "cut":
                again = ask(port, seed, stream=True)
                same = again[0] == "whole" and again[2].startswith(text)
                print(f"cut after {len(text)} characters; asked again: {'the same, and the rest' if same else again}")
                if not same:
                    return 1
        return int(any(end.startswith("lost") for end in ends))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
