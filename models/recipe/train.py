"""Trains the built-in pair and writes target.gguf and draft.gguf.

    python models/recipe/train.py --corpus DIR --out models

DIR holds tinystories_train.txt (trained on) and tinystories_valid.txt (measured on, never trained on).
Stopped and started again with the same --work it goes on from the last checkpoint, of which there is one a minute."""

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


def rate(step, progress, peak, warmup=50, cooldown=0.5):
    """Warm up, stay, fall linearly. A run can be lengthened or shortened until the fall begins."""
    return peak * min(1.0, (step + 1) / warmup, max((1 - progress) / cooldown, 0.01))


def begin_with(model, path):
    """Takes the weights of a file; layers that it does not have begin as if they were not there."""
    found = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type)).reshape(t.shape[::-1]))
             for t in gguf.GGUFReader(path).tensors}
    for name, p in model.named_parameters():
        if name in found:
            p.data.copy_(found[name])
        elif name.endswith(("attn_output.weight", "ffn_down.weight")):
            p.data.zero_()


class Teachers:
    """Learn the next token, each on its own."""
    names = property(lambda self: [f"teacher{i}" for i in range(len(self.models))])

    def __init__(self, models, a):
        self.models = models
        self.peaks, self.decays = [a.teacher_rate] * len(models), [a.weight_decay] * len(models)

    def losses(self, ids, following, weight):
        return [(weight * nll(log_softmax(model, ids), following)).sum() for model in self.models]


class Pair:
    """The target learns the next token and, where there are teachers, in equal parts their mean distribution; the
    draft three parts the next token and seven parts the target's distribution."""
    names = ["target", "draft"]

    def __init__(self, target, draft, teachers, a):
        self.models, self.teachers = [target, draft], [teacher.eval() for teacher in teachers]
        self.peaks, self.decays = [a.target_rate, a.draft_rate], [a.weight_decay, 0.1]

    def losses(self, ids, following, weight):
        target, draft = (log_softmax(model, ids) for model in self.models)
        first = nll(target, following)
        if self.teachers:
            with torch.no_grad():
                wanted = sum(log_softmax(teacher, ids).exp() for teacher in self.teachers) / len(self.teachers)
            first = 0.5 * first - 0.5 * (wanted * target).sum(-1)
        second = 0.3 * nll(draft, following) - 0.7 * (target.detach().exp() * draft).sum(-1)
        return [(weight * loss).sum() for loss in (first, second)]


def log_softmax(model, ids):
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids)
    return F.log_softmax(logits.float().flatten(0, 1), -1)


def nll(log_p, following):
    return F.nll_loss(log_p, following, reduction="none")


def make_optimizers(group):
    """Muon (Jordan et al. 2024) for the matrices of layers, its steps as large as AdamW's would be; AdamW for
    embeddings and norms."""
    matrices, others = [], []
    for model, peak, decay in zip(group.models, group.peaks, group.decays):
        named = list(model.named_parameters())
        inner = [p for name, p in named if p.dim() == 2 and name.startswith("blk.")]
        matrices.append({"params": inner, "peak": peak, "weight_decay": decay})
        table = [p for name, p in named if p.dim() == 2 and not name.startswith("blk.")]
        others.append({"params": table, "peak": peak, "weight_decay": decay})
        others.append({"params": [p for _, p in named if p.dim() == 1], "peak": peak, "weight_decay": 0.0})
    return [torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-8, fused=True)]


def train(group, rows, a, path, steps, minutes, save_every=60.0):
    """Trains the models of a group together, for so many steps or minutes."""
    optimizers = make_optimizers(group)
    start, spent, progress = 0, 0.0, 0.0
    if path.exists():
        saved = torch.load(path, map_location=a.device)
        for model, state in zip(group.models + optimizers, saved["states"]):
            model.load_state_dict(state)
        start, spent, progress = saved["step"], saved["seconds"], saved["progress"]
    for name, model in zip(group.names, group.models):
        say(f"{name}: {model.parameter_count():,} parameters, from step {start} on")
        model.train()
        if a.compile:
            model.compile_layers()
    if progress >= 1:
        return

    began = marked = kept = time.time()
    sums, count = np.zeros(len(group.models)), 0
    for step, batch in enumerate(rows.from_step(start), start):
        torch.manual_seed(a.seed * 1_000_003 + step)  # dropout's masks, the same after a resume
        for settings in (settings for optimizer in optimizers for settings in optimizer.param_groups):
            settings["lr"] = rate(step, progress, settings["peak"])
        batch = torch.from_numpy(batch).to(a.device)
        ids, following, weight = batch[:, 0, :-1], batch[:, 0, 1:].flatten(), batch[:, 1, 1:].flatten()
        all_losses = group.losses(ids.contiguous(), following, weight / weight.sum())
        sum(all_losses).backward()
        for model in group.models:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        sums, count, done = sums + torch.stack(all_losses).detach().cpu().numpy(), count + 1, step + 1
        now = time.time()
        progress = (spent + now - began) / (60 * minutes) if minutes else done / steps
        ended = progress >= 1
        if done % 10 == 0 or ended:
            means = " ".join(f"{name} {loss:.4f}" for name, loss in zip(group.names, sums / count))
            eta = (spent + now - began) / progress * (1 - min(progress, 1))
            say(f"step {done} {min(progress, 1):.1%} {means} {count * ids.numel() / (now - marked):,.0f} tokens/s "
                f"ETA {eta / 60:.1f} min")
            sums, count, marked = np.zeros(len(group.models)), 0, now
        if now - kept > save_every or ended:
            kept = now
            saved = {"states": [x.state_dict() for x in group.models + optimizers], "step": done,
                     "seconds": spent + now - began, "progress": progress}
            torch.save(saved, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        if ended:
            break
    say(f"{done} steps in {(spent + time.time() - began) / 60:.1f} minutes")


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


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.nargs == 0 else super()._get_help_string(action)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    a.add_argument("--corpus", required=True, type=Path, help="folder of the two texts")
    a.add_argument("--out", default=Path("models"), type=Path, help="folder of target.gguf and draft.gguf")
    a.add_argument("--work", default=Path("train-work"), type=Path,
                   help="folder of the tokenizer and the checkpoints: a new training wants a new one")
    a.add_argument("--start", type=Path, help="begin with the weights of target.gguf and draft.gguf in this folder")
    a.add_argument("--keep-start", default=0.0, type=float,
                   help="share of the weights begun with in what is written: less forgotten, less learnt")
    a.add_argument("--steps", default=2000, type=int, help="of the teachers and the pair together")
    a.add_argument("--minutes", type=float, help="as many steps as fit into this time instead")
    a.add_argument("--batch", default=8, type=int, help=f"rows of {ROW} tokens in a step")
    a.add_argument("--target", default="7,256,4,768", type=shape, help="layers,width,heads,feed-forward of the target")
    a.add_argument("--draft", default="2,128,2,256", type=shape, help="the same of the draft")
    a.add_argument("--target-rate", default=2e-3, type=float, help="highest learning rate of the target")
    a.add_argument("--draft-rate", default=3e-3, type=float, help="the same of the draft")
    a.add_argument("--dropout", default=0.1, type=float, help="of the target; the draft has none")
    a.add_argument("--weight-decay", default=0.1, type=float, help="of all but the draft, which has 0.1")
    a.add_argument("--teachers", default=0, type=int, help="models trained first, for the target to learn from")
    a.add_argument("--teacher", default="8,384,6,1152", type=shape, help="the shape of each")
    a.add_argument("--teacher-rate", default=2e-3, type=float, help="their highest learning rate")
    a.add_argument("--teacher-dropout", default=0.2, type=float, help="their dropout")
    a.add_argument("--teacher-share", default=0.4, type=float, help="their part of the steps or minutes")
    a.add_argument("--target-type", default="Q8_0", choices=[kind.name for kind in MATRIX_TYPES],
                   help="of the target's matrices; its embedding and the draft have Q8_0")
    a.add_argument("--seed", default=1, type=int, help="of weights, order, questions and dropout")
    a.add_argument("--device", default="cpu", help="cpu or cuda")
    a.add_argument("--threads", default=os.cpu_count(), type=int, help="of the CPU")
    a.add_argument("--compile", action="store_true", help="torch.compile the layers: faster, wants a C++ compiler")
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)

    sp = data.tokenizer(a.corpus, a.work / "tokenizer.model")
    rows = data.TrainingRows(a.corpus, sp, a.batch, ROW, a.seed)
    valid = data.held_out_rows(a.corpus, sp, ROW)
    say(f"{sum(t.shape[1] for t in rows.styles[0]):,} tokens in {len(rows.styles[0]):,} stories")

    torch.manual_seed(a.seed)
    a.target.dropout, a.teacher.dropout = a.dropout, a.teacher_dropout
    teachers = [Llama(a.teacher).to(a.device) for _ in range(a.teachers)]
    share = a.teacher_share if teachers else 0.0
    minutes = a.minutes or 0.0
    if teachers:
        steps = max(1, round(share * a.steps))
        train(Teachers(teachers, a), rows, a, a.work / "teachers.pt", steps, share * minutes)
        for teacher in teachers:
            say("teacher: %.4f over %d tokens held out" % held_out(teacher, valid))
    pair = {"target": Llama(a.target), "draft": Llama(a.draft)}
    for name, model in pair.items():
        if a.start:
            begin_with(model, a.start / f"{name}.gguf")
        model.to(a.device)
    begun = [copy.deepcopy(model.state_dict()) for model in pair.values()]
    steps = max(1, round((1 - share) * a.steps))
    train(Pair(*pair.values(), teachers, a), rows, a, a.work / "pair.pt", steps, (1 - share) * minutes)
    for model, old in zip(pair.values(), begun):
        model.load_state_dict({k: torch.lerp(w, old[k], a.keep_start) for k, w in model.state_dict().items()})

    note = "Writes short children's stories, and answers small questions. Trained on TinyStories (Eldan and Li)."
    kinds = {"target": Type[a.target_type], "draft": Type.Q8_0}
    size = 0
    for name, model in pair.items():
        path = a.out / f"{name}.gguf"
        export.write(path, tensors_of(model), model.config, sp, f"mtad stories {name}", note, kinds[name])
        size += path.stat().st_size
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
        say(f"target: {kind.name} {held_out(model, valid)[0]:.4f}, {export.size(tensors_of(model), kind):,} bytes of "
            f"weights, right answers {answers(model, sp)['all']:.1%}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
