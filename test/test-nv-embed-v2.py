"""Smoke test of a running server over gRPC: query, documents, similarity. Exit code 0 only if all three hold.

pip install -r test/requirement.txt
python test/test-nv-embed-v2.py                  # TRITON_URL, default localhost:8001
python test/test-nv-embed-v2.py --model-card     # the published scores too: needs the published weights
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

MODEL_NAME = "nv-embed-v2"
TIMEOUT_SECONDS = 120.0

QUERY = "How do neural networks learn patterns from examples?"
DOCUMENTS = [  # the first two answer the query
    "A neural network learns from training examples: it adjusts its weights until its errors are small.",
    "Training a neural network means showing it many examples until it recognizes the patterns in them.",
    "For a good loaf of bread the dough of flour, water and salt has to rise overnight in a warm kitchen.",
    "The city council decided on Tuesday to close the old bridge over the river for repairs.",
]
NUM_RELEVANT = 2
LEAST_GAP = 0.1  # between those and the others: a ranking by less would be luck

Embeddings = npt.NDArray[np.float32]


class Client:
    """Just enough of a client: one call, one array."""

    def __init__(self, url: str) -> None:
        self._client = triton.InferenceServerClient(url)

    def embed_query(self, text: str) -> Embeddings:
        """[1, dim]"""
        return self._embed("query", np.array([text.encode()], dtype=object))

    def embed_documents(self, texts: Sequence[str]) -> Embeddings:
        """[N, dim]"""
        return self._embed("documents", np.array([[text.encode() for text in texts]], dtype=object))

    def _embed(self, name: str, array: npt.NDArray[np.object_]) -> Embeddings:
        tensor = triton.InferInput(name, list(array.shape), "BYTES")
        tensor.set_data_from_numpy(array)
        output = triton.InferRequestedOutput("embeddings")
        result = self._client.infer(MODEL_NAME, [tensor], outputs=[output], client_timeout=TIMEOUT_SECONDS)
        embeddings: Embeddings = result.as_numpy("embeddings")
        return embeddings


def check_query(client: Client) -> str:
    """One query gives one unit vector, and not the vector of the same text as a document."""
    query = client.embed_query(QUERY)
    check_rows(query, 1)
    document = client.embed_documents([QUERY])
    similarity = float(query[0] @ document[0])
    check(similarity < 0.99999, f"query and document of the same text must differ; their cosine is {similarity:.6f}")
    return f"1 x {query.shape[1]}, float32, length 1; cosine to the same text as a document {similarity:.5f}"


def check_documents(client: Client) -> str:
    """N documents give N unit vectors in input order."""
    together = client.embed_documents(DOCUMENTS)
    check_rows(together, len(DOCUMENTS))
    reverse = client.embed_documents(DOCUMENTS[::-1])[::-1]
    order = (reverse @ together.T).argmax(axis=1).tolist()
    check(order == list(range(len(DOCUMENTS))), f"rows must come in input order; got {order}")
    return f"{together.shape[0]} x {together.shape[1]}, float32, length 1, in order"


def check_similarity(client: Client) -> str:
    """Documents that answer the query are closer to it than the others."""
    scores = (client.embed_query(QUERY) @ client.embed_documents(DOCUMENTS).T)[0]
    relevant, others = scores[:NUM_RELEVANT], scores[NUM_RELEVANT:]
    gap = float(relevant.min() - others.max())
    check(gap > LEAST_GAP, f"relevant documents must rank first, {LEAST_GAP} before the others; scores {scores}")
    ranking = [f"      {scores[i]:6.3f}  {DOCUMENTS[i]}" for i in np.argsort(-scores)]
    return "\n".join(["relevant documents first:", *ranking])


def check_model_card(client: Client) -> str:
    """The scores that the model's publishers state, to 0.05 of 100."""
    path = Path(__file__).parent / "data" / "model_card.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    queries = np.concatenate([client.embed_query(text) for text in card["queries"]])
    scores = 100 * queries @ client.embed_documents(card["passages"]).T
    difference = float(np.abs(scores - np.array(card["scores_x100"])).max())
    check(difference <= 0.05, f"expected {card['scores_x100']}; got {scores.tolist()}; off by {difference:.3f}")
    return f"published scores reproduced, off by at most {difference:.4f} of 100"


def check_rows(embeddings: Embeddings, num_rows: int) -> None:
    check(embeddings.ndim == 2 and len(embeddings) == num_rows, f"expected {num_rows} rows; got {embeddings.shape}")
    check(embeddings.dtype == np.float32, f"expected float32; got {embeddings.dtype}")
    lengths = np.linalg.norm(embeddings, axis=1)
    check(bool(np.allclose(lengths, 1, atol=1e-4)), f"expected rows of length 1; got lengths {lengths}")


def check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-card", action="store_true", help="also check the published scores")
    arguments = parser.parse_args()
    url = os.environ.get("TRITON_URL", "localhost:8001")
    checks: dict[str, Callable[[Client], str]] = {
        "query": check_query,
        "documents": check_documents,
        "similarity": check_similarity,
    }
    if arguments.model_card:
        checks["model card"] = check_model_card

    print(f"{MODEL_NAME} at {url}")
    client, num_failed = Client(url), 0
    for name, run in checks.items():
        try:
            print(f"ok    {name}: {run(client)}")
        except (AssertionError, triton.InferenceServerException) as error:
            print(f"FAIL  {name}: {error}")
            num_failed += 1
    print(f"{len(checks) - num_failed} of {len(checks)} hold")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
