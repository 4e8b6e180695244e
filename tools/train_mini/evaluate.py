"""Student, teacher and static baseline measured in one run, on texts none of them was trained on here.

The student is the exported file, computed as it is served. The model card's figures, but for counts and the learning
curve, come from `evaluate`.
"""

import json
import random
import re
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from product import CheckpointConfig, Engine, Tokenizer
from scipy.stats import spearmanr
from static import Embed
from teacher import Teacher
from text import Item
from torch import Tensor
from vocabulary import STANDARD, TASKS, TEMPLATE

BATCH_TEXTS = 64

Judged = tuple[str, str, float]  # two sentences, and how alike people find them, in any unit


@cache
def own_pairs() -> dict[str, Any]:
    """Written by hand, never trained on: sets of questions with answers, sentence pairs scored from 0 to 5, a task."""
    pairs = json.loads((Path(__file__).parent / "pairs.json").read_text(encoding="utf-8"))
    assert pairs["other_task"] not in TASKS
    return pairs


def own_texts() -> set[str]:
    """The texts of `own_pairs`, as `plain` has them."""
    pairs = own_pairs()
    asked = [text for rows in pairs["questions"] for row in rows for text in row]
    alike = [text for first, second, _ in pairs["similar"] for text in (first, second)]
    listed = [pairs["neural_query"], *pairs["neural_relevant"], *pairs["neural_irrelevant"]]
    return {plain(text) for text in asked + alike + listed}


def plain(text: str) -> str:
    """The text's words alone: to know it again in another case or with other punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_judged(path: Path, trained: set[str]) -> list[Judged]:
    """A file of lines `score <tab> sentence <tab> sentence`, without pairs that have a text of `trained`."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    if wrong := [number for number, row in enumerate(rows, 1) if len(row) != 3]:
        raise SystemExit(f"{path}: expected lines of score, sentence, sentence with tabs between; see line {wrong[0]}")
    kept = [(a, b, float(score)) for score, a, b in rows if not trained & {plain(a), plain(b)}]
    if len(kept) < 10:
        raise SystemExit(f"{path}: expected pairs never trained on; got {len(kept)} of {len(rows)}; leave it out")
    return kept


class Served:
    """The checkpoint as the server reads and computes it, on the CPU: what is measured is what is served."""

    def __init__(self, folder: Path) -> None:
        config = CheckpointConfig.load(folder)
        self._tokenizer = Tokenizer(folder / "tokenizer.json", vocab_size=config.vocab_size, max_sequence_tokens=8192)
        self._engine = Engine.load(folder, config, device="cpu", dtype="float32")

    def embed(self, texts: list[str], instruction: str = "") -> Tensor:
        """Unit vectors [N, hidden_size], in fp32 arithmetic over fp16 weights."""
        sequences = self._tokenizer.encode(texts, instruction)
        starts = range(0, len(sequences), BATCH_TEXTS)
        return torch.cat([torch.from_numpy(self._engine.embed(sequences[s : s + BATCH_TEXTS])) for s in starts])

    def mean_length(self, texts: list[str]) -> float:
        """In tokens."""
        return fmean(sequence.num_tokens for sequence in self._tokenizer.encode(texts, ""))


def spaced(text: str) -> str:
    """The text with other whitespace than one space between words."""
    return " \t".join(text.replace(" ", "  ", 3).split(" ")) + "\n\n"


def spearman(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a, b).statistic)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of unit vectors [N, C], row by row."""
    return (a * b).sum(1)


def agreement(embed: Embed, pairs: list[Judged]) -> float:
    """Spearman's correlation of cosines with what people say."""
    first, second, scores = (list(column) for column in zip(*pairs, strict=True))
    return spearman(cosines(embed(first), embed(second)), torch.tensor(scores))


def nearest(vectors: Tensor, count: int) -> Tensor:
    """Indices [N, count] of each row's nearest others."""
    found = []
    for start in range(0, len(vectors), 1000):
        scores = vectors[start : start + 1000] @ vectors.T
        scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))] = -2
        found.append(scores.topk(count).indices)
    return torch.cat(found)


def recall(found: Tensor, wanted: Tensor) -> float:
    return float((found[:, :, None] == wanted[:, None, :]).any(2).float().mean())


def accuracy(queries: Tensor, answers: Tensor, count: int) -> float:
    """Share of rows whose own answer is among the `count` best."""
    best = (queries @ answers.T).topk(count).indices
    return float((best == torch.arange(len(queries))[:, None]).any(1).float().mean())


def definitions(test: list[Item], count: int) -> tuple[list[str], list[str]]:
    """Held-out (definition, headword) pairs of WordNet, each headword once."""
    found: dict[str, str] = {}
    for item in test:
        if item.source == "wordnet" and item.group.startswith(item.text) and len(item.text) < len(item.group):
            found.setdefault(item.group[len(item.text) :], item.text)
    words = list(found)[:count]
    return [found[word] for word in words], words


@torch.no_grad()
def evaluate(
    folder: Path, bag: Embed, teacher: Teacher, test: list[Item], test_targets: Tensor, public: dict[str, list[Judged]]
) -> dict[str, dict[str, float]]:
    """Figures by model name; `folder`: the checkpoint, `bag`: the baseline, `public`: named sets of sentence pairs."""
    served = Served(folder)
    texts, target = [item.text for item in test[:10_000]], test_targets[:10_000].float()
    wanted = nearest(target, 10)
    meanings, words = definitions(test, 1000)
    own = own_pairs()
    questions = [question for rows in own["questions"] for question, _ in rows]
    pick = random.Random(3)
    parts = [[pick.randrange(len(texts)) for _ in range(60)] for _ in range(60)]
    long_texts = [" ".join(texts[i] for i in group) for group in parts]
    long_target = F.normalize(torch.stack([target[group].mean(0) for group in parts]), dim=-1)
    numbers = torch.tensor([any(letter.isdigit() for letter in text) for text in texts])
    left, right = torch.randint(len(texts), (2, 100_000), generator=torch.Generator().manual_seed(4))

    embedders: dict[str, Embed] = {"student": served.embed, "teacher": teacher.embed, "static baseline": bag}
    results: dict[str, dict[str, float]] = {}
    for name, embed in embedders.items():
        out = target if name == "teacher" else embed(texts)
        meaning, word = embed(meanings), embed(words)
        ask = partial(served.embed, instruction=STANDARD) if name == "student" else embed
        answered = [accuracy(ask([q for q, _ in rows]), embed([a for _, a in rows]), 1) for rows in own["questions"]]
        neural = ask([own["neural_query"]]) @ embed(own["neural_relevant"] + own["neural_irrelevant"]).T
        count = len(own["neural_relevant"])
        agreed = {f"spearman {title}": agreement(embed, pairs) for title, pairs in public.items()}
        figures = {
            "cosine_to_teacher": float(cosines(out, target).mean()),
            "numbers_cosine_to_teacher": float(cosines(out, target)[numbers].mean()),
            "recall_at_10": recall(nearest(out, 10), wanted),
            "definition_accuracy_at_1": accuracy(meaning, word, 1),
            "definition_accuracy_at_10": accuracy(meaning, word, 10),
            "question_answer_accuracy_at_1": answered[0],
            "question_answer_accuracy_at_1_all": fmean(answered),
            "spearman_own_pairs": agreement(embed, own["similar"]),
            "spearman_random_pairs": spearman(cosines(out[left], out[right]), cosines(target[left], target[right])),
            "neural_networks_margin": float(neural[0, :count].min() - neural[0, count:].max()),
            "long_cosine_to_mean_of_parts": float(cosines(embed(long_texts), long_target).mean()),
            "untidy_cosine": float(cosines(embed([t.upper() for t in texts[:1000]]), out[:1000]).mean()),
            "spaced_cosine": float(cosines(embed([spaced(t) for t in texts[:1000]]), out[:1000]).mean()),
        }
        if agreed:
            figures |= agreed | {"spearman_public_sets": fmean(agreed.values())}
        if name == "student":
            bare = embed(questions)
            standard = cosines(ask(questions), bare)
            other = cosines(served.embed(questions, TEMPLATE.format(own["other_task"])), bare)
            figures |= {
                "instruction_cosine_mean": float(standard.mean()),
                "instruction_cosine_min": float(standard.min()),
                "other_instruction_cosine_mean": float(other.mean()),
                "other_instruction_cosine_min": float(other.min()),
                "long_tokens_mean": served.mean_length(long_texts),
            }
        results[name] = {key: round(value, 4) for key, value in figures.items()}
    accuracies = [results[name]["definition_accuracy_at_1"] for name in ("student", "teacher")]
    results["student"]["definition_share"] = round(accuracies[0] / accuracies[1], 4)
    return results
