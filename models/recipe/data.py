"""The corpus, the tokenizer, and rows of tokens to train and measure on."""

import itertools
import signal
import string
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import sentencepiece

import questions

VOCAB = 2048
BOS, EOS = 1, 2
QUESTIONS = 0.25  # of the tokens trained on
ANSWER_WEIGHT = 8  # in the loss: an answer is two or three tokens of thirty


def stories(corpus):
    text = (Path(corpus) / "tinystories_train.txt").read_text(encoding="utf-8")
    return [s.strip() for s in text.split("<|endoftext|>") if s.strip()]


def tokenizer(corpus, path):
    """A BPE vocabulary: <unk>, <s>, </s>, 256 bytes, then pieces. Newlines are bytes."""
    path = Path(path)
    if not path.exists():
        lines = (line for s in stories(corpus) for line in s.splitlines() if line)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as f:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=f, model_type="bpe", vocab_size=VOCAB,
                byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
                remove_extra_whitespaces=False, split_digits=True, character_coverage=0.9995,
                required_chars=string.digits + string.ascii_letters + string.punctuation,
                unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, unk_piece="<unk>",
                num_threads=1, minloglevel=2)
        temporary.rename(path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


class TrainingRows:
    """Batches of rows cut from shuffled texts, `<s> text </s>` one after another: every story once in an epoch, and
    new questions in every epoch. The paragraphs of a story are parted by one newline or, on a toss in every
    epoch, by an empty line.

    A batch has shape (rows, 2, length + 1): tokens, and how much each weighs in the loss."""

    def __init__(self, corpus, sp, batch, length, seed):
        texts = stories(corpus)
        self.styles = [[self.framed(ids) for ids in sp.encode(ts)]
                       for ts in (texts, [t.replace("\n", "\n\n") for t in texts])]
        self.sp, self.batch, self.length, self.seed = sp, batch, length, seed

    @staticmethod
    def framed(ids, answer=None):
        """`answer` is where the answer begins; it ends with </s>, which weighs as much."""
        out = np.ones((2, len(ids) + 2), np.int16)
        out[0] = [BOS, *ids, EOS]
        if answer is not None:
            out[1, answer + 1:] = ANSWER_WEIGHT
        return out

    def questions(self, epoch, tokens):
        asked = []
        for prompt, answer in questions.training((self.seed << 32) + epoch):
            if tokens <= 0:
                return asked
            asked.append(self.framed(self.sp.encode(f"{prompt} {answer}"), len(self.sp.encode(prompt))))
            tokens -= asked[-1].shape[1]

    def epoch(self, number):
        rng = np.random.default_rng((self.seed, number))
        toss = rng.integers(0, 2, len(self.styles[0]))
        texts = [pair[t] for t, *pair in zip(toss, *self.styles)]
        texts += self.questions(number, sum(t.shape[1] for t in texts) * QUESTIONS / (1 - QUESTIONS))
        stream = np.concatenate([texts[i] for i in rng.permutation(len(texts))], 1)
        count = (stream.shape[1] - 1) // self.length
        rows = np.stack([stream[:, i * self.length:][:, :self.length + 1] for i in range(count)])
        rows = rows[rng.permutation(count)]
        return [rows[i:i + self.batch].astype(np.int64) for i in range(0, count - self.batch + 1, self.batch)]

    def from_step(self, step, ahead=3):
        """Batches without end. Epochs are made ahead of their time by other processes."""
        seen = 0
        with get_context("fork").Pool(ahead, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            coming = [pool.apply_async(self.epoch, (number,)) for number in range(ahead)]
            for number in itertools.count(ahead):
                rows = coming.pop(0).get()
                coming.append(pool.apply_async(self.epoch, (number,)))
                yield from rows[max(0, step - seen):]
                seen += len(rows)


def held_out_rows(corpus, sp, length):
    """tinystories_valid.txt as one text: consecutive runs of tokens, each behind its own <s>.
    Every token of the file is predicted once."""
    ids = sp.encode((Path(corpus) / "tinystories_valid.txt").read_text(encoding="utf-8"))
    return [np.array([BOS, *ids[i:i + length - 1]], np.int64) for i in range(0, len(ids), length - 1)]
