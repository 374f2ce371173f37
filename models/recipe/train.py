"""Trains the built-in pair and writes target.gguf and draft.gguf.

    python models/recipe/train.py --corpus DIR --out models

DIR holds tinystories_train.txt (trained on) and tinystories_valid.txt (measured on, never trained on).
Stopped and started again with the same --work it goes on from the last checkpoint."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # keep freed memory: a tenth faster under glibc
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(1 << 32), MALLOC_TRIM_THRESHOLD_=str(1 << 34))
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

import data
import export
from model import Config, Llama

ROW = 512
LIMIT = 4_000_000  # bytes of both files together
CONFIGS = {"target": Config(width=256, layers=5, heads=4, ffn=768, context=ROW, dropout=0.05),
           "draft": Config(width=128, layers=1, heads=2, ffn=256, context=ROW)}
MATRIX_TYPES = [Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0]


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def rate(step, steps, peak, warmup=100, cooldown=1 / 3):
    """Warm up, stay, fall linearly. A run can be lengthened or shortened until the fall begins."""
    left = (steps - step) / (cooldown * steps)
    return peak * min(1.0, (step + 1) / warmup, max(left, 0.01))


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def train(name, loss_of, model, rows, steps, peak, work, compiled, every=200):
    decayed = [p for p in model.parameters() if p.dim() == 2]
    whole = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": whole, "weight_decay": 0.0}],
                                  lr=peak, betas=(0.9, 0.95), eps=1e-8, fused=True)
    path, start, spent = work / f"{name}.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, spent = saved["step"], saved["seconds"]
    say(f"{name}: {model.parameter_count():,} parameters, steps {start} to {steps}")
    if start >= steps:
        return
    if compiled:
        loss_of = torch.compile(loss_of)

    model.train()
    began = marked = time.time()
    running, count = 0.0, 0
    for step, batch in zip(range(start, steps), rows.from_step(start)):
        torch.manual_seed(rows.seed * 1_000_003 + step)  # dropout's masks, the same after a resume
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        batch = torch.from_numpy(batch)
        loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running, count, done = running + loss.item(), count + 1, step + 1
        if done % 20 == 0 or done == steps:
            now = time.time()
            eta = (now - began) / (done - start) * (steps - done)
            say(f"{name} step {done}/{steps} loss {running / count:.4f} "
                f"{count * batch[:, 1:].numel() / (now - marked):,.0f} tokens/s ETA {eta / 60:.1f} min")
            running, count, marked = 0.0, 0, now
        if done % every == 0 or done == steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                     "seconds": spent + time.time() - began}
            torch.save(saved, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    say(f"{name}: {(spent + time.time() - began) / 60:.1f} minutes in all")


@torch.no_grad()
def held_out(model, rows):
    """Perplexity, and the number of tokens it is over. In f32."""
    model.eval()
    total = tokens = 0
    for i in range(0, len(rows), 8):
        for group in {len(r): [x for x in rows[i:i + 8] if len(x) == len(r)] for r in rows[i:i + 8]}.values():
            ids = torch.from_numpy(np.stack(group))
            logits = model(ids[:, :-1])
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            tokens += ids[:, 1:].numel()
    return float(np.exp(total / tokens)), tokens


@torch.no_grad()
def acceptance(target, draft, rows):
    taken = []
    for r in rows:
        p, q = (torch.softmax(m.eval()(torch.from_numpy(r[None])), -1) for m in (target, draft))
        taken.append(torch.minimum(p, q).sum(-1).mean().item())
    return float(np.mean(taken))


def tensors_of(model):
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def rounded(model, kind):
    """The model as it comes back from a file of this type."""
    other = Llama(model.config)
    other.load_state_dict({name: torch.from_numpy(np.array(dequantize(d, k)).reshape(model.state_dict()[name].shape))
                           for name, k, d in export.quantized(tensors_of(model), kind)})
    return other


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--corpus", required=True, type=Path)
    a.add_argument("--out", default=Path("models"), type=Path)
    a.add_argument("--work", default=Path("train-work"), type=Path, help="checkpoints")
    a.add_argument("--target-steps", default=1500, type=int)
    a.add_argument("--draft-steps", default=1600, type=int)
    a.add_argument("--batch", default=16, type=int, help="rows of %d tokens in a step" % ROW)
    a.add_argument("--seed", default=1, type=int)
    a.add_argument("--threads", default=os.cpu_count(), type=int)
    a.add_argument("--no-compile", action="store_true", help="without a C++ compiler; slower")
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)

    sp = data.tokenizer(a.corpus, a.work / "tokenizer.model")
    rows = data.TrainingRows(a.corpus, sp, a.batch, ROW, a.seed)
    valid = data.held_out_rows(a.corpus, sp, ROW)
    say(f"{sum(map(len, rows.styles[0])):,} training tokens in {len(rows.styles[0]):,} stories")

    torch.manual_seed(a.seed)
    target, draft = Llama(CONFIGS["target"]), Llama(CONFIGS["draft"])

    def target_loss(ids, following):
        with autocast():
            logits = target(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    def draft_loss(ids, following, own=0.3):
        """The corpus's next token, and the target's distribution over it."""
        with autocast():
            logits = draft(ids)
            with torch.no_grad():
                teacher = target(ids)
        logp = F.log_softmax(logits.float().flatten(0, 1), -1)
        p = F.softmax(teacher.float().flatten(0, 1), -1)
        return own * F.nll_loss(logp, following.flatten()) - (1 - own) * (p * logp).sum(-1).mean()

    train("target", target_loss, target, rows, a.target_steps, 2e-3, a.work, not a.no_compile)
    target.eval()
    train("draft", draft_loss, draft, rows, a.draft_steps, 4e-3, a.work, not a.no_compile)

    note = "Writes short children's stories. Trained on TinyStories (Eldan and Li)."
    say("draft: whole %.4f, Q8_0 %.4f over %d tokens" % (held_out(draft, valid)[0], *held_out(rounded(draft, Type.Q8_0), valid)))
    export.write(a.out / "draft.gguf", tensors_of(draft), draft.config, sp, "mtad stories draft", note, Type.Q8_0)
    room = LIMIT - (a.out / "draft.gguf").stat().st_size

    say("target: whole %.4f" % held_out(target, valid)[0])
    fitting = []
    for kind in MATRIX_TYPES:
        file = a.work / f"target-{kind.name}.gguf"
        export.write(file, tensors_of(target), target.config, sp, "mtad stories target", note, kind)
        size, perplexity = file.stat().st_size, held_out(rounded(target, kind), valid)[0]
        say(f"target: {kind.name} {perplexity:.4f}, {size:,} bytes{'' if size < room else ', too large'}")
        if size < room:
            fitting.append((perplexity, kind, file))
    _, kind, file = min(fitting)
    shutil.copyfile(file, a.out / "target.gguf")
    say(f"target: {kind.name} it is")
    say("sum of min(p, q) on held-out text, the rate at which draft tokens are accepted: %.3f"
        % acceptance(rounded(target, kind), rounded(draft, Type.Q8_0), valid))


if __name__ == "__main__":
    main()
