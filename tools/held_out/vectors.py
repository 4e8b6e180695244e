"""How many of the ten nearest texts each type of vectors finds, among texts that nv-embed-mini was not trained on.

    pip install ./client -r tools/held_out/requirements.txt
    ./serve.sh                                                # in another terminal
    python tools/held_out/vectors.py --url localhost:8001     # needs apt-get and dpkg-deb; minutes

Recall@10 is the share of the ten nearest by float32. float16, int8 and uint8 are compared with themselves, uint8 by
Euclidean distance, and signs by Hamming distance. Re-ranked: the nearest 20, 50 or 100 by a type are sorted by the
float32 query against int8. Whole numbers are also asked of the server, which must send the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from evaluate import ROOT, Rows, nearest
from nv_embed_client import NVEmbedClient, packed
from nv_embed_client.embedding_type import EMBEDDING_TYPES, EmbeddingType
from texts import held_out_texts

sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import machine

CANDIDATES = (20, 50, 100)
COUNT = 10


def comparable(vectors: Rows, kind: EmbeddingType) -> Rows:
    """Rows whose dot products have the order in which a store finds this type."""
    rows = packed(vectors, kind)
    match kind:
        case "uint8":  # Euclidean distances are those of int8
            return rows.astype(np.float32) - 128
        case "binary" | "ubinary":  # the more signs agree, the smaller is the Hamming distance
            signs = rows.view(np.uint8) ^ (128 if kind == "binary" else 0)
            return 2.0 * np.unpackbits(signs, axis=1).astype(np.float32) - 1
    return rows.astype(np.float32)


def share(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the wanted indices [N, K] that are among the found ones [N, M]."""
    return float((found[:, :, None] == wanted[:, None, :]).any(axis=1).mean())


def reranked(candidates: np.ndarray, vectors: Rows, int8: Rows) -> np.ndarray:
    """The best COUNT of each row of candidates [N, M]."""
    scores = np.stack([int8[row] @ vector for row, vector in zip(candidates, vectors, strict=True)])
    return np.take_along_axis(candidates, np.argsort(-scores, axis=1)[:, :COUNT], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server (%(default)s)")
    parser.add_argument("--texts", type=int, default=10_000, help="among which neighbours are sought (%(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/held_out", help="for packages (%(default)s)")
    arguments = parser.parse_args()
    texts = [item.text for item in held_out_texts(arguments.cache)[: arguments.texts]]
    with NVEmbedClient(arguments.url) as client:
        vectors = client.embed_documents(texts)
        served = client.embed_documents(texts[:1000], embedding_type="int8")
    int8 = packed(vectors, "int8").astype(np.float32)
    cosines = (int8 * vectors).sum(axis=1) / np.linalg.norm(int8, axis=1)
    result: dict[str, object] = {
        "texts": len(texts),
        "dimension": vectors.shape[1],
        "largest_number_in_deviations": float(np.abs(vectors).max() * vectors.shape[1] ** 0.5),
        "cut_numbers": float((np.abs(int8) == 127).mean()),
        "int8_cosine_min": float(cosines.min()),
        "int8_cosine_mean": float(cosines.mean()),
        "int8_of_server_differs": float((served != packed(vectors[:1000], "int8")).mean()),
    }
    wanted = nearest(vectors, COUNT)
    print(f"{'type':10} {'bytes':>6} {'alone':>8}" + "".join(f"{f'of {count}':>10}" for count in CANDIDATES))
    for kind in EMBEDDING_TYPES:
        rows = comparable(vectors, kind)
        found = {"alone": share(nearest(rows, COUNT), wanted)}
        for count in CANDIDATES:
            found[f"reranked_of_{count}"] = share(reranked(nearest(rows, count), vectors, int8), wanted)
        num_bytes = packed(vectors[:1], kind).nbytes
        alone, *others = found.values()
        print(f"{kind:10} {num_bytes:6} {alone:8.4f}" + "".join(f"{value:10.4f}" for value in others), flush=True)
        result[kind] = {"bytes": num_bytes, **found}
    print(json.dumps({**result, **machine()}))


if __name__ == "__main__":
    main()
