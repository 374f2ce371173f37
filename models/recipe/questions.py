"""Small questions with one right answer, in the words of the stories: a part of the training data, and a
held-out set that shares no combination of wording, names and numbers with it.

    python models/recipe/questions.py models/questions.jsonl      # writes the held-out set

A line holds a `prompt`, which ends in "Answer:", and the `answer`: what follows up to the end of the line, without
the space before it."""

import json
import random
import sys

BOYS = ["Tom", "Ben", "Max", "Tim", "Sam", "Jack", "Leo", "Billy"]
GIRLS = ["Lily", "Mia", "Sara", "Anna", "Lucy", "Amy", "Sue", "Jane"]
THINGS = ["apples", "balls", "cookies", "toys", "books", "flowers", "stars", "cars", "shells", "eggs"]
ONES = ["ball", "hat", "car", "book", "kite", "cup", "box", "bike"]
COLORS = ["red", "blue", "green", "yellow", "pink", "white"]
ANIMALS = ["cat", "dog", "bird", "fish", "cow", "duck", "frog", "bear"]
ORDERS = [("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("bigger", "biggest")]


def people(rng, count):
    return rng.sample(BOYS + GIRLS, count)


def he(name):
    return "He" if name in BOYS else "She"


def him(name):
    return "him" if name in BOYS else "her"


def add(rng):
    (a, b), n, m, t = people(rng, 2), rng.randint(1, 9), rng.randint(1, 9), rng.choice(THINGS)
    return rng.choice([
        f"{a} has {n} {t}. {b} gives {him(a)} {m} more. How many {t} does {a} have?",
        f"{a} has {n} {t}. {he(a)} finds {m} more with {b}. How many {t} does {a} have?"]), n + m


def together(rng):
    (a, b), n, m, t = people(rng, 2), rng.randint(1, 9), rng.randint(1, 9), rng.choice(THINGS)
    return f"{a} has {n} {t} and {b} has {m} {t}. How many {t} do they have together?", n + m


def subtract(rng):
    (a, b), n, t = people(rng, 2), rng.randint(2, 12), rng.choice(THINGS)
    m = rng.randint(1, n)
    return rng.choice([
        f"{a} has {n} {t}. {he(a)} gives {m} to {b}. How many {t} does {a} have left?",
        f"{a} and {b} see {n} {t}. {m} of them go away. How many {t} are left?"]), n - m


def two_steps(rng):
    (a, b), n, m, t = people(rng, 2), rng.randint(1, 9), rng.randint(1, 9), rng.choice(THINGS)
    k = rng.randint(1, min(9, n + m))
    return (f"{a} has {n} {t}. {he(a)} finds {m} more. Then {he(a).lower()} gives {k} to {b}. "
            f"How many {t} does {a} have left?", n + m - k)


def compare(rng):
    (a, b), (n, m), t = people(rng, 2), rng.sample(range(1, 13), 2), rng.choice(THINGS)
    word, first = rng.choice([("more", n > m), ("fewer", n < m)])
    return f"{a} has {n} {t}. {b} has {m} {t}. Who has {word} {t}?", a if first else b


def order(rng):
    (a, b, c), (more, most) = people(rng, 3), rng.choice(ORDERS)
    said = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    rng.shuffle(said)
    return f"{' '.join(said)} Who is the {most}?", a


def count(rng):
    a, seen = people(rng, 1)[0], [f"a {x}" for x in rng.sample(ANIMALS, rng.randint(2, 7))]
    return f"{a} sees {', '.join(seen[:-1])} and {seen[-1]}. How many animals does {a} see?", len(seen)


def color(rng):
    owners, things, colors = people(rng, 3), rng.sample(ONES, 3), rng.sample(COLORS, 3)
    said = " ".join(f"{o} has a {c} {x}." for o, c, x in zip(owners, colors, things))
    i = rng.randrange(3)
    return rng.choice([
        (f"{said} What color is the {things[i]}?", colors[i]),
        (f"{said} Who has the {things[i]}?", owners[i])])


KINDS = [add, together, subtract, two_steps, compare, order, count, color]


def key(prompt):
    """What must not occur on both sides: the question, whatever it is that is counted."""
    return " ".join("thing" if w.strip(".?,") in THINGS else w for w in prompt.split())


def held_out(each=25, seed=20_000):
    """As many of every kind: (kind, prompt, answer)."""
    rng, known, out = random.Random(seed), set(), []
    while len(out) < each * len(KINDS):
        kind = KINDS[len(out) % len(KINDS)]
        question, answer = kind(rng)
        if key(question) not in known:
            known.add(key(question))
            out.append((kind.__name__, question + "\nAnswer:", str(answer)))
    return out


def training(seed):
    """An endless supply, none of it held out: (prompt, answer)."""
    rng, kept = random.Random(seed), {key(prompt.removesuffix("\nAnswer:")) for _, prompt, _ in held_out()}
    while True:
        question, answer = rng.choice(KINDS)(rng)
        if key(question) not in kept:
            yield question + "\nAnswer:", str(answer)


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as f:
        for _, prompt, answer in held_out():
            f.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
