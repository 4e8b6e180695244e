"""What each type of vectors costs on its way: requests per second, bytes on the wire and in shared memory.

    python benchmarks/synthetic.py /tmp/one-layer --layers 1
    python benchmarks/vectors.py --checkpoint /tmp/one-layer

The script starts a server. Its cache has all texts after the first request, so nothing but the answer is measured: how
it is packed, copied into shared memory and sent. In each round every type has its turn, in turned order every second
round. Bytes on the wire are those of one reply of gRPC. Shared memory is what the region between Triton and the model
has grown to under the load of a type. It never shrinks, so the types come by size there. The clients share this machine
with the server. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from machine import machine
from nv_embed_client import NVEmbedClient
from nv_embed_client.embedding_type import EMBEDDING_TYPES, EmbeddingType
from started_server import StartedServer, end_on_sigterm, progress

BY_SIZE: tuple[EmbeddingType, ...] = ("ubinary", "binary", "uint8", "int8", "float16", "float")


def regions() -> dict[str, int]:
    """The regions of all models of this machine, in bytes."""
    return {path.name: path.stat().st_size for path in Path("/dev/shm").glob("triton_python_backend_shm_region_*")}


def num_requests(client: NVEmbedClient, texts: list[str], kind: EmbeddingType, num_clients: int, seconds: float) -> int:
    """How many are answered in that time."""
    until = time.perf_counter() + seconds

    def ask(_: int) -> int:
        count = 0
        while time.perf_counter() < until:
            client.embed_documents(texts, embedding_type=kind)
            count += 1
        return count

    with ThreadPoolExecutor(num_clients) as pool:
        return sum(pool.map(ask, range(num_clients)))


def reply_bytes(url: str, texts: list[str], kind: EmbeddingType) -> int:
    """Of the reply with the vectors alone."""
    output = "embeddings" if kind == "float" else f"embeddings_{kind}"
    tensor = triton.InferInput("documents", [1, len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode() for text in texts]], dtype=np.object_))
    with triton.InferenceServerClient(url) as client:
        asked = [triton.InferRequestedOutput(output)]
        parameters = {"embedding_type": kind}
        return client.infer("nv-embed-v2", [tensor], outputs=asked, parameters=parameters).get_response().ByteSize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="what to serve; none: the default checkpoint")
    parser.add_argument("--texts", type=int, default=256, help="of one request (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="that ask at the same time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each type in a round (%(default)s)")
    arguments = parser.parse_args()
    end_on_sigterm()
    texts = [f"a short text with the number {number}" for number in range(arguments.texts)]
    settings = {"DEVICE": "cpu", "SHM_BYTES": str(2**20)}
    if arguments.checkpoint:
        settings["MODEL_PATH"] = str(arguments.checkpoint.resolve())
    others = regions()
    with (
        tempfile.TemporaryDirectory() as folder,
        StartedServer(Path(folder, "log.txt"), settings) as server,
        NVEmbedClient(server.ports.url, max_texts_per_request=arguments.texts, request_timeout=600) as client,
    ):
        dimension = 8 * client.embed_documents(texts, embedding_type=BY_SIZE[0]).shape[1]  # now the cache has them
        shared: dict[str, int] = {}
        for kind in BY_SIZE:
            num_requests(client, texts, kind, arguments.clients, min(arguments.seconds, 2.0))
            shared[kind] = sum(size for name, size in regions().items() if name not in others)
        wire = {kind: reply_bytes(server.ports.url, texts, kind) for kind in EMBEDDING_TYPES}
        rates: dict[str, list[float]] = {kind: [] for kind in EMBEDDING_TYPES}
        for number in range(arguments.rounds):
            for kind in EMBEDDING_TYPES[:: 1 if number % 2 == 0 else -1]:
                count = num_requests(client, texts, kind, arguments.clients, arguments.seconds)
                rates[kind].append(count / arguments.seconds)
            progress(f"round {number + 1} of {arguments.rounds}")
    print(f"{arguments.texts} documents of {dimension} dimensions a request, {arguments.clients} clients")
    print(f"{'type':10} {'requests/s':>12} {'range':>16} {'reply, kB':>11} {'shared memory, MB':>19}")
    for kind, found in rates.items():
        spread = f"{min(found):.1f} - {max(found):.1f}"
        print(
            f"{kind:10} {statistics.median(found):12.1f} {spread:>16} {wire[kind] / 1e3:11.1f} "
            f"{shared[kind] / 1e6:19.1f}"
        )
    print(
        json.dumps(
            {
                "benchmark": "vectors",
                "texts": arguments.texts,
                "dimension": dimension,
                "clients": arguments.clients,
                "requests_per_second": {kind: round(statistics.median(found), 2) for kind, found in rates.items()},
                "reply_bytes": wire,
                "shared_memory_bytes": shared,
                "machine": machine(),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
