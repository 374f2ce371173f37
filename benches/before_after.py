#!/usr/bin/env python3
"""Two builds of mtad against each other, in turns: is a change slower?

    benches/before_after.py BEFORE AFTER [--turns 9] [--types Q4_0,Q4_K_M] [--shape 1.1b]

BEFORE and AFTER are two `mtad` programs. Passes of 1 to 32 rows of a model of random weights, then tokens per
second of the built-in pair for every strategy; for each figure the median of both, and their ratio (above 1:
AFTER is faster). Turns alternate which build goes first, so that a machine's mood falls on both.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROWS = [1, 2, 4, 5, 8, 16, 32]
STRATEGIES = ("greedy sample speculative specinfer mtad mmtad dsbd bild typical beam mtjd auto").split()
PROMPT = "Once upon a time there was a little"


def run(program, *args):
    done = subprocess.run([program, *args], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program} {' '.join(args)}: {done.stderr}")
    return done.stdout


def passes(program, model):
    rows = ",".join(map(str, ROWS))
    out = run(program, "bench", "--model", model, "--device", "cpu", "--passes", rows, "--prompt", "0",
              "--generate", "0", "--rounds", "3", "--json")
    return {f"{p['rows']} rows": 1e3 / p["ms_median"] for p in json.loads(out)["passes"]}


def strategies(program):
    found = {}
    for strategy in STRATEGIES:
        out = run(program, "run", PROMPT, "--device", "cpu", "--strategy", strategy, "--max-tokens", "200",
                  "--seed", "7", "--json")
        found[strategy] = json.loads(out)["tokens_per_second"]
    return found


def race(what, programs, turns, measure):
    found = [{}, {}]
    for turn in range(turns):
        for side in ([0, 1] if turn % 2 == 0 else [1, 0]):
            for name, rate in measure(programs[side]).items():
                found[side].setdefault(name, []).append(rate)
        print(f"{what}: turn {turn + 1}/{turns}", file=sys.stderr)
    print(f"{what}\n  {'':14}{'before':>10}{'after':>10}{'ratio':>8}{'of pairs':>10}")
    for name in found[0]:
        before, after = found[0][name], found[1][name]
        pairs = statistics.median(a / b for a, b in zip(after, before))
        b, a = statistics.median(before), statistics.median(after)
        print(f"  {name:14}{b:10.2f}{a:10.2f}{a / b:8.3f}{pairs:10.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--types", default="Q4_0,Q4_K_M")
    parser.add_argument("--shape", default="1.1b")
    args = parser.parse_args()
    programs = [os.path.abspath(args.before), os.path.abspath(args.after)]
    with tempfile.TemporaryDirectory() as folder:
        for kind in filter(None, args.types.split(",")):
            model = os.path.join(folder, f"{kind}.gguf")
            run(programs[0], "bench", "--synthetic", f"{args.shape}:{kind}", "--keep", model, "--passes", "1",
                "--prompt", "0", "--generate", "0", "--rounds", "1")
            race(f"{args.shape} {kind}, passes per second", programs, args.turns, lambda p: passes(p, model))
            os.remove(model)
    race("the built-in pair, tokens per second", programs, args.turns, strategies)


if __name__ == "__main__":
    main()
