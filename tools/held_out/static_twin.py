"""How good a static twin of a served model is, beside its teacher and beside a plain mean of token vectors.

    pip install "./client[distill]" -r tools/held_out/requirements.txt
    NV_EMBED_CACHE_MEBIBYTES=0 ./serve.sh                       # or MODEL_PATH=... ./serve.sh, in another terminal
    python tools/held_out/static_twin.py --url localhost:8001   # needs apt-get and dpkg-deb; minutes

The twin is taught with texts of the same sources as the held-out ones, none of them held out. The plain mean has the
twin's tokens and the teacher's vectors of each token alone. Recall@10 is of the teacher's ten nearest among 10,000.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from evaluate import PAIRS, ROOT, Embed, Rows, figures
from model2vec import StaticModel
from nv_embed_client import NVEmbedClient
from nv_embed_client.distill import distill
from nv_embed_client.distill.vocabulary import texts_of_tokens
from sentence_transformers import SentenceTransformer
from texts import held_out_texts, training_texts

sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import machine

SHOWN = ("recall_at_10", "definitions_at_1", "definitions_at_10", "first_questions", "questions", "Spearman")
TAUGHT = ((0, 20_000), (10_000, 0), (10_000, 20_000), (100_000, 0))  # texts and words of a vocabulary


def texts_per_second(embed: Callable[[list[str]], Rows], texts: list[str]) -> float:
    """The best of three, because others use the machine, too."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        embed(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / min(seconds)


def of(model: StaticModel) -> Embed:
    """A static model as what is measured; it knows no instruction."""
    return lambda texts, instruction="": model.encode(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server (%(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/held_out", help="for packages (%(default)s)")
    arguments = parser.parse_args()
    judged = {"pairs.json": [(a, b, score) for a, b, score in PAIRS["similar"]]}
    held_out = held_out_texts(arguments.cache)
    measured = [item.text for item in held_out[:10_000]]
    texts = training_texts(arguments.cache)
    counts = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    words = [word for word, _ in counts.most_common()]
    result: dict[str, dict[str, float]] = {}
    with NVEmbedClient(arguments.url) as client, TemporaryDirectory() as folder:

        def served(texts: list[str], instruction: str = "") -> Rows:
            return client.embed_documents(texts, instruction=instruction)

        def measure(name: str, embed: Embed, **others: float) -> None:
            found = figures(embed, targets, held_out, judged)
            result[name] = {key: value for key, value in found.items() if key.startswith(SHOWN)} | others
            print(f"{name:<40}" + "".join(f"{value:>12.3f}" for value in result[name].values()), flush=True)

        targets = served(measured)
        for num_texts, num_words in TAUGHT:
            name = f"twin of {num_texts} texts, {num_words} words"
            path = Path(folder) / name
            start = time.perf_counter()
            distill(client, path, texts[:num_texts], vocabulary=words[:num_words], progress=True)
            minutes = (time.perf_counter() - start) / 60
            twin, encoder = StaticModel.from_pretrained(path), SentenceTransformer(str(path), device="cpu")
            measure(
                name,
                of(twin),
                minutes=minutes,
                megabytes=sum(file.stat().st_size for file in path.iterdir()) / 1e6,
                texts_per_second=texts_per_second(twin.encode, measured),
                texts_per_second_of_sentence_transformers=texts_per_second(encoder.encode, measured),
            )
        rows = client.embed_documents(texts_of_tokens(twin.tokenizer))
        measure("plain mean of the last twin's tokens", of(StaticModel(rows, twin.tokenizer, normalize=True)))
        measure("teacher", served, texts_per_second=texts_per_second(served, measured))
    versions = {name: version(name) for name in ("model2vec", "scipy", "sentence-transformers")}
    print(json.dumps({**machine(), **versions, **result}))


if __name__ == "__main__":
    main()
