"""Reads a pair of files back and measures it, sharing no code with the recipe: a plain NumPy
forward pass and tokenizer over what gguf-py's reader finds in the file.

    python models/recipe/check.py models/target.gguf models/draft.gguf --text DIR/tinystories_valid.txt \\
        --questions models/questions.jsonl
"""

import argparse
import heapq
import json

import gguf
import numpy as np
from gguf.quants import dequantize


class File:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        field = {k: f.contents() for k, f in reader.fields.items()}
        assert field["general.architecture"] == "llama" and field["tokenizer.ggml.model"] == "llama"
        self.heads, self.layers = field["llama.attention.head_count"], field["llama.block_count"]
        assert self.heads == field["llama.attention.head_count_kv"]
        self.eps, self.context = field["llama.attention.layer_norm_rms_epsilon"], field["llama.context_length"]
        self.tokens, self.scores = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.scores"]
        self.kinds = field["tokenizer.ggml.token_type"]
        self.bos, self.eos = field["tokenizer.ggml.bos_token_id"], field["tokenizer.ggml.eos_token_id"]
        self.ids = {t: i for i, t in enumerate(self.tokens) if self.kinds[i] == gguf.TokenType.NORMAL}
        self.bytes = {int(t[3:5], 16): i for i, t in enumerate(self.tokens) if self.kinds[i] == gguf.TokenType.BYTE}
        self.w = {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.parameters = sum(a.size for a in self.w.values())
        half = field["llama.rope.dimension_count"] // 2
        angle = np.outer(np.arange(self.context), field["llama.rope.freq_base"] ** (-np.arange(half) / half))
        self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def encode(self, text):
        """SentencePiece's BPE: the adjacent pair of the highest score, the leftmost first."""
        if not text:
            return []
        part = list("\u2581" + text.replace(" ", "\u2581"))
        before, after = list(range(-1, len(part) - 1)), list(range(1, len(part))) + [-1]
        queue = []

        def offer(i):
            j = after[i] if i >= 0 else -1
            if j >= 0 and (k := self.ids.get(part[i] + part[j])) is not None:
                heapq.heappush(queue, (-self.scores[k], i, part[i], part[j]))

        for i in range(len(part)):
            offer(i)
        while queue:
            _, i, left, right = heapq.heappop(queue)
            if (j := after[i]) < 0 or part[i] != left or part[j] != right:
                continue
            part[i], part[j], after[i] = left + right, "", after[j]
            if after[j] >= 0:
                before[after[j]] = i
            after[j] = -1
            offer(before[i])
            offer(i)
        out = []
        for p in filter(None, part):
            out += [self.ids[p]] if p in self.ids else [self.bytes[b] for b in p.encode()]
        return out

    def decode(self, ids):
        raw = b"".join(bytes([int(self.tokens[i][3:5], 16)]) if self.kinds[i] == gguf.TokenType.BYTE
                       else self.tokens[i].replace("\u2581", " ").encode() for i in ids)
        return raw.decode(errors="replace").removeprefix(" ")

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name + ".weight"]

    def logits(self, ids):
        """(time) -> (time, vocabulary)"""
        time, w = len(ids), self.w
        cos, sin = self.cos[:time, None], self.sin[:time, None]
        hidden = np.triu(np.full((time, time), -np.inf, np.float32), 1)

        def heads(h, name):
            return (h @ w[name].T).reshape(time, self.heads, -1)

        def rotate(x):
            out = np.empty_like(x)
            out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
            out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
            return out

        x = w["token_embd.weight"][ids]
        for n in range(self.layers):
            b = f"blk.{n}."
            h = self.norm(x, b + "attn_norm")
            q, k = rotate(heads(h, b + "attn_q.weight")), rotate(heads(h, b + "attn_k.weight"))
            v = heads(h, b + "attn_v.weight").transpose(1, 0, 2)
            s = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.float32(np.sqrt(q.shape[-1])) + hidden
            a = softmax(s) @ v
            x = x + a.transpose(1, 0, 2).reshape(time, -1) @ w[b + "attn_output.weight"].T
            h = self.norm(x, b + "ffn_norm")
            g = h @ w[b + "ffn_gate.weight"].T
            x = x + (g / (1 + np.exp(-g)) * (h @ w[b + "ffn_up.weight"].T)) @ w[b + "ffn_down.weight"].T
        return self.norm(x, "output_norm") @ w["token_embd.weight"].T


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sample(m, prompt, temperature, seed):
    rng, ids = np.random.default_rng(seed), [m.bos, *m.encode(prompt)]
    while len(ids) < m.context:
        p = softmax(m.logits(ids)[-1] / temperature).astype(np.float64)
        ids.append(int(rng.choice(len(p), p=p / p.sum())))
        if ids[-1] == m.eos:
            break
    return m.decode(ids[1:-1])


def answer(m, prompt, longest=8):
    """The best token after token, up to the end of the line."""
    ids = [m.bos, *m.encode(prompt)]
    while len(ids) < m.context and longest and ids[-1] != m.eos and "\n" not in m.decode(ids[1:])[len(prompt):]:
        ids.append(int(m.logits(ids)[-1].argmax()))
        longest -= 1
    return m.decode([i for i in ids[1:] if i != m.eos])[len(prompt):].split("\n")[0].strip()


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("target")
    a.add_argument("draft")
    a.add_argument("--text", help="held-out text; all of it is predicted, each run of 511 tokens behind its own <s>")
    a.add_argument("--questions", help="JSON lines of a prompt and its answer")
    a.add_argument("--prompt", default="Once upon a time, there was a little fox who")
    a.add_argument("--temperature", default=0.8, type=float)
    a.add_argument("--seed", default=1, type=int)
    a.add_argument("--samples", default=2, type=int)
    a = a.parse_args()
    pair = {"target": File(a.target), "draft": File(a.draft)}
    assert pair["target"].tokens == pair["draft"].tokens
    for name, m in pair.items():
        print(f"{name}: {m.parameters:,} parameters, types {sorted(set(m.types.values()))}")
    if a.text:
        with open(a.text, encoding="utf-8") as f:
            ids = pair["target"].encode(f.read())
        nll, kept, same = dict.fromkeys(pair, 0.0), 0.0, 0
        run = pair["target"].context - 1
        for i in range(0, len(ids), run):
            fed, following = [pair["target"].bos, *ids[i:i + run - 1]], np.array(ids[i:i + run])
            fed = fed[:len(following)]
            p = {name: softmax(m.logits(fed)) for name, m in pair.items()}
            for name in pair:
                nll[name] -= np.log(p[name][np.arange(len(following)), following], dtype=np.float64).sum()
            kept += np.minimum(p["target"], p["draft"]).sum()
            same += (p["target"].argmax(-1) == p["draft"].argmax(-1)).sum()
        for name in pair:
            print(f"{name}: perplexity {np.exp(nll[name] / len(ids)):.4f} over {len(ids):,} tokens")
        print(f"sum of min(p, q) {kept / len(ids):.3f}, same best token {same / len(ids):.3f}")
    if a.questions:
        with open(a.questions, encoding="utf-8") as f:
            asked = [json.loads(line) for line in f]
        for name, m in pair.items():
            right = sum(answer(m, q["prompt"]) == q["answer"] for q in asked)
            print(f"{name}: {right} of {len(asked)} questions answered rightly")
    for n in range(a.samples):
        print("---\n" + sample(pair["target"], a.prompt, a.temperature, a.seed + n))


if __name__ == "__main__":
    main()
