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
import sys
import time
from collections.abc import Callable
from functools import partial
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


def texts_per_second(embed: Callable[[list[str]], Rows], texts: list[str]) -> float:
    """The best of three, because others use the machine, too."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        embed(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server (%(default)s)")
    parser.add_argument("--texts", type=int, nargs="+", default=[100_000], help="to teach with (%(default)s)")
    parser.add_argument("--dimensions", type=int, default=256, help="of the twin (%(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/held_out", help="for packages (%(default)s)")
    arguments = parser.parse_args()
    judged = {"pairs.json": [(a, b, score) for a, b, score in PAIRS["similar"]]}
    held_out = held_out_texts(arguments.cache)
    measured = [item.text for item in held_out[:10_000]]
    taught = training_texts(arguments.cache)
    with NVEmbedClient(arguments.url) as client, TemporaryDirectory() as folder:
        targets = client.embed_documents(measured)
        result: dict[str, dict[str, float]] = {}

        def measure(name: str, embed: Embed, **speeds: float) -> None:
            found = figures(embed, targets, held_out, judged)
            result[name] = {key: found[key] for key in found if key.startswith(SHOWN)} | speeds
            print(f"{name:<24}" + "".join(f"{value:>10.3f}" for value in result[name].values()), flush=True)

        for count in arguments.texts:
            path = Path(folder) / str(count)
            start = time.perf_counter()
            distill(client, path, taught[:count], dimensions=arguments.dimensions, progress=True)
            minutes = (time.perf_counter() - start) / 60
            model, encoder = StaticModel.from_pretrained(path), SentenceTransformer(str(path), device="cpu")
            measure(
                f"twin of {count} texts",
                lambda texts, instruction="", model=model: model.encode(texts),
                minutes=minutes,
                megabytes=sum(file.stat().st_size for file in path.iterdir()) / 1e6,
                texts_per_second=texts_per_second(model.encode, measured),
                texts_per_second_of_sentence_transformers=texts_per_second(encoder.encode, measured),
            )
        alone = client.embed_documents(texts_of_tokens(model.tokenizer))
        mean = StaticModel(alone, model.tokenizer, normalize=True, max_length=None)
        measure("plain mean", lambda texts, instruction="": mean.encode(texts))
        served = partial(client.embed_documents, instruction="")
        measure("teacher", client.embed_documents, texts_per_second=texts_per_second(served, measured))
    print(json.dumps({**machine(), "versions": {name: version(name) for name in ("model2vec", "scipy")}, **result}))


if __name__ == "__main__":
    main()
