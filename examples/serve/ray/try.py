#!/usr/bin/env python3
"""Replicas of `mtad serve` under Ray Serve; one server is killed amid 40 requests. No request that had not begun to
stream is lost, and the server is back.

    python try.py [--mtad PATH]

All of it listens on this machine alone, and ends with the script.
"""
import argparse
import collections
import http.client
import json
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# (A busy machine takes its time to start Ray.)
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
REQUESTS, CLIENTS, KILLED_AFTER = 40, 8, 10


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def ask(port, seed, stream, **options):
    """One request: `whole`, `cut` if its stream ended early, or what was refused; which process, and the text."""
    body = {
        "messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 100, "seed": seed, "stream": stream,
        # (Slow, so that the kill falls in the midst of some.)
        "strategy": "beam", "beam_width": 12, **options,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    text, process, begun = "", "?", False
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        process = answer.headers.get("x-mtad-process", "?")
        if answer.status != 200:
            return f"lost: {answer.status} {answer.read().decode()[:300]}", process, text
        if not stream:
            choice = json.loads(answer.read())["choices"][0]
            return ("whole" if choice["finish_reason"] else "lost: no end"), process, choice["message"]["content"]
        ended = False
        while line := answer.readline():
            if line.startswith(b"data: {"):
                begun, event = True, json.loads(line[6:])
                if "error" in event:
                    break
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    ended |= bool(choice.get("finish_reason"))
        if ended:
            return "whole", process, text
        return ("cut" if begun else "lost: a stream of nothing"), process, text
    except (OSError, http.client.HTTPException, ValueError, KeyError) as fault:
        return ("cut" if begun else f"lost: {fault!r}"), process, text
    finally:
        connection.close()


def metric(port, name):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name} ")]
    return answer.headers["x-mtad-process"], float(lines[0].split()[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtad", default="mtad")
    args = parser.parse_args()
    # Whoever ends this ends all that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    program = shutil.which(args.mtad) or sys.exit(f"{args.mtad}: there is no such program")

    import ray
    from app import app
    from ray import serve

    ray.init(include_dashboard=False, num_cpus=4, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"mtad": os.path.abspath(program), "options": "--device cpu"}))

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
        victim, killed = found[-1][2], len(found)
        os.kill(int(victim), signal.SIGKILL)
        for thread in threads:
            thread.join()
        print(f"{REQUESTS} requests in {time.monotonic() - begun:.1f} s; process {victim} was killed after {killed}")
        ends = collections.Counter(end for _, end, *_ in found)
        print("  ".join(f"{end}: {n}" for end, n in ends.items()))
        print("answered by processes", dict(collections.Counter(process for *_, process, _ in found)))
        for seed, end, _, text in found:
            if end == "cut":
                again = ask(port, seed, stream=True)
                same = again[0] == "whole" and again[2].startswith(text)
                print(f"cut after {len(text)} characters; asked again: {'the same, and the rest' if same else again}")
                if not same:
                    return 1

        # A client that goes away is not written for.
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": "Once", "max_tokens": 1500, "stream": True}
        # (Slow, and without an end before that of the context.)
        body |= {"strategy": "dsbd", "gamma": 8, "beam_width": 12, "presence_penalty": -100}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        writer = answer.headers["x-mtad-process"]
        answer.readline()
        # (The answer holds on to the socket, too.)
        answer.close()
        connection.close()
        # (Each question goes to a replica of Ray's choice.)
        busy, end = {}, time.monotonic() + 20
        while time.monotonic() < end and busy.get(writer) != 0:
            process, running = metric(port, "mtad_running")
            busy[process] = running
            time.sleep(0.05)
        print(f"a client of process {writer} went away; running since:", busy)
        return int(any(end.startswith("lost") for end in ends) or busy.get(writer) != 0 or victim in busy)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
