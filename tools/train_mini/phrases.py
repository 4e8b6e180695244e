"""Everyday sentences written by template: captions, headlines, how-to and forum questions, questions about words.

Dictionaries and manuals say little about a man playing a guitar or a minister resigning; what people compare with one
another often does. A generated sentence need not be true, only plausible English: the teacher says where it lies. The
words and forms are in phrases.json. Those for a word of WordNet have {w} for the word, {W} for it with a capital, {a}
for it with an article before it, {m} for its meaning, {s} for another word for it, {o} for another word of its kind;
the others {t} for a task, {x} and {y} for things, {d} for a day, {n} for a number.
"""

import json
import random
from pathlib import Path

PHRASES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
DEFINING, ASKING = PHRASES["defining"], PHRASES["asking"]
ASKING_OF = {int(kind): forms for kind, forms in PHRASES["asking_of"].items()}  # by WordNet's number for the kind
NOUNS = range(3, 29)  # WordNet's numbers for the kinds of nouns


def generate(count: int) -> list[str]:
    """`count` sentences, some of them twice; the same for the same count."""
    pick = random.Random(7)

    def draw(name: str) -> str:
        return pick.choice(PHRASES[name])

    made = []
    for _ in range(count):
        kind = pick.random()
        x, y = draw("thing"), draw("thing")
        if kind < 0.35:
            person = draw("people")
            plural = person.split()[0] in ("two", "three", "several") or person == "the people"
            verb = pick.choice(["are" if plural else "is"] * 4 + [""])
            if pick.random() < 0.06:
                verb += " not"
            words = [person, draw("look"), verb, draw("doing"), draw("where")]
            sentence = " ".join(word.strip() for word in words if word)
            sentence += pick.choice([".", ".", ""])
        elif kind < 0.55:
            place = draw("country")
            sentence = pick.choice([f"{place} {draw('who')} {draw('news')}", f"{draw('who')} in {place} {draw('news')}",
                                    f"{place} {draw('news')}", f"{draw('news')}: {place}"])  # fmt: skip
        elif kind < 0.75:
            sentence = draw("how").format(t=draw("task"))
        elif kind < 0.93:
            sentence = draw("ask").format(x=x, y=y)
        else:
            sentence = draw("opinion").format(x=x, d=draw("days"), n=pick.randint(2, 60))
        made.append(sentence[0].upper() + sentence[1:])
    return made
