"""Trains the built-in pair and writes target.gguf and draft.gguf.

    python models/recipe/train.py --corpus DIR --out models

DIR holds tinystories_train.txt (trained on) and tinystories_valid.txt (measured on, never trained on).
Stopped and started again with the same --work it goes on from the last checkpoint."""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # keep freed memory: a tenth faster under glibc
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(1 << 32), MALLOC_TRIM_THRESHOLD_=str(1 << 34))
    os.execv(sys.executable, [sys.executable, *sys.argv])

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

import data
import export
import questions
from model import Config, Llama

ROW = 512
LIMIT = 15_000_000  # bytes of both files together
MATRIX_TYPES = [Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0]


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def rate(step, steps, peak, warmup=50, cooldown=0.5):
    """Warm up, stay, fall linearly. A run can be lengthened or shortened until the fall begins."""
    left = (steps - step) / (cooldown * steps)
    return peak * min(1.0, (step + 1) / warmup, max(left, 0.01))


def begin_with(model, path):
    """Takes the weights of a file; layers that it does not have begin as if they were not there."""
    found = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type)).reshape(t.shape[::-1]))
             for t in gguf.GGUFReader(path).tensors}
    for name, p in model.named_parameters():
        if name in found:
            p.data.copy_(found[name])
        elif name.endswith(("attn_output.weight", "ffn_down.weight")):
            p.data.zero_()


def losses(target, draft, ids, following, weight, own=0.3):
    """The target's is the next token's. The draft's is three parts that, and seven parts the target's distribution."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits, proposed = target(ids), draft(ids)
    logits, log_q = logits.float().flatten(0, 1), F.log_softmax(proposed.float().flatten(0, 1), -1)
    following, weight = following.flatten(), weight.flatten() / weight.sum()
    first = F.cross_entropy(logits, following, reduction="none")
    second = F.nll_loss(log_q, following, reduction="none")
    apart = -(F.softmax(logits.detach(), -1) * log_q).sum(-1)
    return (weight * first).sum(), (weight * (own * second + (1 - own) * apart)).sum()


def train(target, draft, rows, a, every=50):
    groups = [{"params": [p for p in model.parameters() if (p.dim() == 2) == matrices], "peak": peak,
               "weight_decay": 0.1 if matrices else 0.0}
              for model, peak in ((target, a.target_rate), (draft, a.draft_rate)) for matrices in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    path, start, spent = a.work / "pair.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path, map_location=a.device)
        target.load_state_dict(saved["target"])
        draft.load_state_dict(saved["draft"])
        optimizer.load_state_dict(saved["optimizer"])
        start, spent = saved["step"], saved["seconds"]
    say(f"{target.parameter_count():,} and {draft.parameter_count():,} parameters, steps {start} to {a.steps}")
    if start >= a.steps:
        return
    losses_of = losses if a.no_compile else torch.compile(losses)

    target.train()
    draft.train()
    began = marked = time.time()
    sums, count = np.zeros(2), 0
    for step, batch in zip(range(start, a.steps), rows.from_step(start)):
        torch.manual_seed(a.seed * 1_000_003 + step)  # dropout's masks, the same after a resume
        for group in optimizer.param_groups:
            group["lr"] = rate(step, a.steps, group["peak"])
        batch = torch.from_numpy(batch).to(a.device)
        ids, following, weight = batch[:, 0, :-1], batch[:, 0, 1:], batch[:, 1, 1:]
        both = losses_of(target, draft, ids.contiguous(), following.contiguous(), weight.contiguous())
        sum(both).backward()
        for model in (target, draft):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums, count, done = sums + [loss.item() for loss in both], count + 1, step + 1
        if done % 10 == 0 or done == a.steps:
            now = time.time()
            eta = (now - began) / (done - start) * (a.steps - done)
            say(f"step {done}/{a.steps} target {sums[0] / count:.4f} draft {sums[1] / count:.4f} "
                f"{count * ids.numel() / (now - marked):,.0f} tokens/s ETA {eta / 60:.1f} min")
            sums, count, marked = np.zeros(2), 0, now
        if done % every == 0 or done == a.steps:
            saved = {"target": target.state_dict(), "draft": draft.state_dict(), "optimizer": optimizer.state_dict(),
                     "step": done, "seconds": spent + time.time() - began}
            torch.save(saved, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    say(f"{(spent + time.time() - began) / 60:.1f} minutes in all")


@torch.no_grad()
def held_out(model, rows):
    """Perplexity, and the number of tokens it is over. In f32."""
    model.eval()
    total = tokens = 0
    for i in range(0, len(rows), 8):
        for group in {len(r): [x for x in rows[i:i + 8] if len(x) == len(r)] for r in rows[i:i + 8]}.values():
            ids = torch.from_numpy(np.stack(group)).to(model.output_norm.weight.device)
            logits = model(ids[:, :-1])
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            tokens += ids[:, 1:].numel()
    return float(np.exp(total / tokens)), tokens


@torch.no_grad()
def acceptance(target, draft, rows):
    taken = []
    for r in rows:
        p, q = (torch.softmax(m.eval()(torch.from_numpy(r[None]).to(target.output_norm.weight.device)), -1)
                for m in (target, draft))
        taken.append(torch.minimum(p, q).sum(-1).mean().item())
    return float(np.mean(taken))


@torch.no_grad()
def answers(model, sp):
    """The share of the held-out questions that greedy text answers rightly, by kind and in all."""
    right = {}
    for kind, prompt, answer in questions.held_out():
        ids = [data.BOS, *sp.encode(prompt)]
        given = len(ids)
        while ids[-1] != data.EOS and len(ids) < given + 8:
            ids.append(int(model.eval()(torch.tensor([ids], device=model.output_norm.weight.device))[0, -1].argmax()))
        text = sp.decode(ids[1:])[len(prompt):].split("\n")[0].strip()
        right.setdefault(kind, []).append(text == answer)
    return {"all": np.mean(list(right.values()))} | {kind: np.mean(r) for kind, r in right.items()}


def tensors_of(model):
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def rounded(model, kind):
    """The model as it comes back from a file of this type."""
    other = Llama(model.config)
    other.load_state_dict({name: torch.from_numpy(np.array(dequantize(d, k)).reshape(model.state_dict()[name].shape))
                           for name, k, d in export.quantized(tensors_of(model), kind)})
    return other.to(model.output_norm.weight.device)


def shape(text):
    layers, width, heads, ffn = map(int, text.split(","))
    return Config(width=width, layers=layers, heads=heads, ffn=ffn, context=ROW)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--corpus", required=True, type=Path)
    a.add_argument("--out", default=Path("models"), type=Path)
    a.add_argument("--work", default=Path("train-work"), type=Path, help="checkpoints")
    a.add_argument("--start", type=Path, help="begin with the weights of target.gguf and draft.gguf in this folder")
    a.add_argument("--keep-start", default=0.0, type=float,
                   help="share of the weights begun with in what is written: less forgotten, less learnt")
    a.add_argument("--steps", default=1500, type=int)
    a.add_argument("--batch", default=16, type=int, help="rows of %d tokens in a step" % ROW)
    a.add_argument("--target", default="5,256,4,768", type=shape, help="layers,width,heads,feed-forward")
    a.add_argument("--draft", default="1,128,2,256", type=shape, help="the same of the draft")
    a.add_argument("--target-rate", default=2e-3, type=float, help="highest learning rate")
    a.add_argument("--draft-rate", default=4e-3, type=float)
    a.add_argument("--dropout", default=0.05, type=float, help="of the target")
    a.add_argument("--target-type", default="Q8_0", choices=[kind.name for kind in MATRIX_TYPES])
    a.add_argument("--seed", default=1, type=int)
    a.add_argument("--device", default="cpu", help="cpu or cuda")
    a.add_argument("--threads", default=os.cpu_count(), type=int)
    a.add_argument("--no-compile", action="store_true", help="without a C++ compiler; slower")
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)

    sp = data.tokenizer(a.corpus, a.work / "tokenizer.model")
    rows = data.TrainingRows(a.corpus, sp, a.batch, ROW, a.seed)
    valid = data.held_out_rows(a.corpus, sp, ROW)
    say(f"{sum(t.shape[1] for t in rows.styles[0]):,} tokens in {len(rows.styles[0]):,} stories")

    torch.manual_seed(a.seed)
    a.target.dropout = a.dropout
    pair = {"target": Llama(a.target), "draft": Llama(a.draft)}
    for name, model in pair.items():
        if a.start:
            begin_with(model, a.start / f"{name}.gguf")
        model.to(a.device)
    begun = [copy.deepcopy(model.state_dict()) for model in pair.values()]
    train(*pair.values(), rows, a)
    for model, old in zip(pair.values(), begun):
        model.load_state_dict({k: torch.lerp(w, old[k], a.keep_start) for k, w in model.state_dict().items()})

    note = "Writes short children's stories, and answers small questions. Trained on TinyStories (Eldan and Li)."
    kinds = {"target": Type[a.target_type], "draft": Type.Q8_0}
    size = 0
    for name, model in pair.items():
        export.write(a.out / f"{name}.gguf", tensors_of(model), model.config, sp, f"mtad stories {name}", note, kinds[name])
        size += (a.out / f"{name}.gguf").stat().st_size
    say(f"both files: {size:,} bytes{'' if size < LIMIT else f', more than {LIMIT:,}'}")
    measure(pair, kinds, sp, valid)


def measure(pair, kinds, sp, valid):
    """Held-out perplexity and right answers, of the files first, then of the same in other types."""
    files = {name: rounded(model, kinds[name]) for name, model in pair.items()}
    for name, model in files.items():
        say(f"{name}: whole %.4f over %d tokens" % held_out(pair[name], valid))
        say(f"{name}: {kinds[name].name} {held_out(model, valid)[0]:.4f}, right answers: "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in answers(model, sp).items()))
    say("sum of min(p, q) on held-out text, the rate at which draft tokens are accepted: %.3f"
        % acceptance(*files.values(), valid))
    for kind in MATRIX_TYPES:
        if kind == kinds["target"]:
            continue
        model = rounded(pair["target"], kind)
        say(f"target: {kind.name} {held_out(model, valid)[0]:.4f}, {export.size(tensors_of(model), kind):,} bytes of weights, "
            f"right answers {answers(model, sp)['all']:.1%}")


if __name__ == "__main__":
    main()
