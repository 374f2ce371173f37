"""The corpus, the tokenizer, and rows of tokens to train and measure on."""

import string
from pathlib import Path

import numpy as np
import sentencepiece

VOCAB = 2048
BOS, EOS = 1, 2


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
    """Batches of rows cut from shuffled stories, `<s> story </s>` one after another. The paragraphs
    of a story are parted by one newline or, on a toss in every epoch, by an empty line."""

    def __init__(self, corpus, sp, batch, length, seed):
        texts = stories(corpus)
        self.styles = [[np.array([BOS, *ids, EOS], np.int16) for ids in sp.encode(ts)]
                       for ts in (texts, [t.replace("\n", "\n\n") for t in texts])]
        self.batch, self.length, self.seed = batch, length, seed

    def epoch(self, number):
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.styles[0]))
        toss = rng.integers(0, 2, len(order))
        stream = np.concatenate([self.styles[toss[i]][i] for i in order])
        count = (len(stream) - 1) // self.length
        rows = np.stack([stream[i * self.length:][:self.length + 1] for i in range(count)])
        rows = rows[rng.permutation(count)]
        return [rows[i:i + self.batch].astype(np.int64) for i in range(0, count - self.batch + 1, self.batch)]

    def from_step(self, step):
        number = seen = 0
        while True:
            rows = self.epoch(number)
            yield from rows[max(0, step - seen):]
            seen, number = seen + len(rows), number + 1


def held_out_rows(corpus, sp, length):
    """tinystories_valid.txt as one text: consecutive runs of tokens, each behind its own <s>.
    Every token of the file is predicted once."""
    ids = sp.encode((Path(corpus) / "tinystories_valid.txt").read_text(encoding="utf-8"))
    return [np.array([BOS, *ids[i:i + length - 1]], np.int64) for i in range(0, len(ids), length - 1)]
