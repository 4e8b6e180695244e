"""Student, teacher and static baseline measured in one run, on texts none of them was trained on here.

The student is the exported file, computed as it is served.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from product import load_engine, read_checkpoint
from scipy.stats import spearmanr
from text import Item
from torch import Tensor
from vocabulary import STANDARD, TASKS, TEMPLATE

Embed = Callable[..., Tensor]  # texts and, if there is one, their instruction -> unit vectors [N, 384]
Judged = tuple[str, str, float]  # two sentences, and how alike people find them, in any unit

# Written by hand, never trained on: sets of questions with answers, a task, and sentence pairs for the tests.
PAIRS = json.loads(Path(__file__).with_name("pairs.json").read_text(encoding="utf-8"))
assert PAIRS["other_task"] not in TASKS


def plain(text: str) -> str:
    """The text's words alone: to know it again in another case or with other punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def check_unseen(trained: set[str]) -> None:
    """SystemExit if a text of pairs.json is among those trained on, given as `plain` makes them."""
    own = [row for rows in PAIRS["questions"] for row in rows] + [pair[:2] for pair in PAIRS["similar"]]
    if leaked := {plain(text) for texts in own for text in texts} & trained:
        raise SystemExit(f"expected no text of pairs.json in the training text; got {sorted(leaked)}; replace those")


def read_judged(path: Path, trained: set[str]) -> list[Judged]:
    """A file of lines `score <tab> sentence <tab> sentence`, without pairs that have a text of `trained`.

    SystemExit for other lines, and for fewer than ten that are left.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        rows = [(a, b, float(score)) for score, a, b in (line.split("\t") for line in lines)]
    except ValueError as error:
        raise SystemExit(f"{path}: expected lines of score, sentence, sentence with tabs between; {error}") from error
    kept = [(a, b, score) for a, b, score in rows if not trained & {plain(a), plain(b)}]
    if len(kept) < 10:
        raise SystemExit(f"{path}: expected ten pairs or more that were not trained on; got {len(kept)}; leave it out")
    return kept


def served(folder: Path) -> Embed:
    """The checkpoint as the server reads and computes it, on the CPU: fp32 arithmetic over fp16 weights."""
    config = read_checkpoint(folder)
    tokenizer = config.tokenizer(folder, 8192)
    engine = load_engine(folder, config, device="cpu", dtype="float32")

    def embed(texts: list[str], instruction: str = "") -> Tensor:
        sequences = tokenizer.encode(texts, instruction)
        batches = (sequences[start : start + 64] for start in range(0, len(sequences), 64))
        return torch.cat([torch.from_numpy(engine.embed(batch)) for batch in batches])

    return embed


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of unit vectors [N, C], row by row."""
    return (a * b).sum(1)


def nearest(vectors: Tensor, count: int) -> Tensor:
    """Indices [N, count] of the nearest others of each of the unit vectors [N, C]."""
    return (vectors @ vectors.T).fill_diagonal_(-2).topk(count).indices


def accuracy(queries: Tensor, answers: Tensor, count: int = 1) -> float:
    """Share of the queries [N, C] whose own row of the answers [N, C] is among the `count` best."""
    best = (queries @ answers.T).topk(count).indices
    return float((best == torch.arange(len(queries))[:, None]).any(1).float().mean())


@torch.no_grad()
def evaluate(
    models: dict[str, Embed], test: list[Item], judged: dict[str, list[Judged]]
) -> dict[str, dict[str, float]]:
    """Figures by model, one of them the "teacher"; `test`: never trained on; `judged`: named sets of sentence pairs."""
    texts = [item.text for item in test[:10_000]]
    targets = models["teacher"](texts)
    wanted = nearest(targets, 10)
    meaning_of = {}  # of headwords of WordNet, the first that is held out
    for item in test:
        meaning, _, word = item.group.partition("\0")
        if word and item.text == meaning:
            meaning_of.setdefault(word, meaning)
    words, meanings = list(meaning_of)[:1000], list(meaning_of.values())[:1000]
    sets = [[list(column) for column in zip(*rows, strict=True)] for rows in PAIRS["questions"]]
    questions = [question for asked, _ in sets for question in asked]
    num_long = min(60, len(texts) // 60)
    long_texts = [" ".join(texts[60 * i : 60 * (i + 1)]) for i in range(num_long)]
    long_targets = F.normalize(targets[: 60 * num_long].view(num_long, 60, -1).mean(1), dim=-1)
    numbers = torch.tensor([any(letter.isdigit() for letter in text) for text in texts])

    def figures(embed: Embed) -> dict[str, float]:
        out = embed(texts)
        same = (nearest(out, 10)[:, :, None] == wanted[:, None, :]).any(2).float()
        meaning, word, bare = embed(meanings), embed(words), embed(questions)
        answered = [accuracy(embed(asked, STANDARD), embed(answers)) for asked, answers in sets]
        agreed = {}
        for name, pairs in judged.items():
            first, second, scores = (list(column) for column in zip(*pairs, strict=True))
            correlation = spearmanr(cosines(embed(first), embed(second)), scores).statistic
            agreed[f"Spearman, {name}, {len(pairs)} pairs"] = float(correlation)
        if agreed:
            agreed["Spearman, mean of these sets"] = fmean(agreed.values())
        return agreed | {
            "cosine": float(cosines(out, targets).mean()),
            "numbers_cosine": float(cosines(out, targets)[numbers].mean()),
            "recall_at_10": float(same.mean()),
            "definitions_at_1": accuracy(meaning, word),
            "definitions_at_10": accuracy(meaning, word, 10),
            "first_questions": answered[0],
            "questions": fmean(answered),
            "long_cosine": float(cosines(embed(long_texts), long_targets).mean()),
            "spaced_cosine": float(cosines(embed(["\n" + text.replace(" ", " \t") for text in texts]), out).mean()),
            "instruction": float(cosines(embed(questions, STANDARD), bare).min()),
            "other_instruction": float(cosines(embed(questions, TEMPLATE.format(PAIRS["other_task"])), bare).min()),
        }

    return {model: {name: round(value, 4) for name, value in figures(embed).items()} for model, embed in models.items()}
