"""How fast a server answers: throughput and latency under closed, open and mixed loads.

    python benchmarks/serving.py --url localhost:8001 --quick     # any server that serves the model
    python benchmarks/serving.py --compare --engine               # this server, the baseline and the bare engine
    python benchmarks/serving.py --url localhost:8001 --gateway   # a server, and the gateway in front of it

What is run, with defaults that can be changed:

    query               16 clients, one short query each, the next one sent when the last is answered
    query, open loop    short queries at random times (Poisson), sent whether or not earlier ones are answered
    documents           4 clients, 16 documents of mixed length a request
    bulk alone          8 clients, 16 documents of mixed length a request: more than a server can take
    bulk beside         the same, while queries come in at random times
    queries beside      those queries
    cached              16 clients, one query each, out of 50 that come again: all but computing. Only alone:
                        python benchmarks/serving.py --compare --loads cached

In an open loop latency counts from the moment a request was due, not from when it was sent, so a server that stalls
cannot hide it. Throughput is what was answered divided by the time until the last answer. All texts are drawn from a
seed and, but for load cached, a target gets none twice, so no cache helps; every target gets the same ones in the same
order. But a server and its gateway share a cache. So the figures are made with NV_EMBED_CACHE_MEBIBYTES=0. Load cached
needs the cache, therefore it runs alone. The baseline has none, so `--compare` does not start it for that load.

With two or more targets the rounds alternate, and one target computes at a time: drift of the machine meets all alike.
Their order turns after every valid round of a load. Ratios are taken within a round; their median and range are given.

A run beside other work is no measurement. A round of a load is void for all targets if others used more than 5 % of the
processors' time (`--allow-other-work`) while one of them was measured. Void rounds are replaced, at most `--rounds` of
them. A load without a valid round has no measurement, and the exit code is 2. The servers at `--url` and
`--baseline-url` count as own work if they run on this machine. Other work on another machine or on a GPU is not seen.
The second table has the processor time that a request costs, by process.

`--compare` starts this repository's server and benchmarks/baseline on free ports. On a CPU `baseline` computes in
float32. If the CPU multiplies bfloat16, `baseline, bfloat16` is a target of its own. `--engine` adds the bare engine,
called in a process of its own with no server around it: forward passes alone are timed, in full batches and in batches
of as many requests as there are clients. `--gateway` starts the client's gateway in front of the first server; the
client and its extra `gateway` must be installed where this runs. Servers get the environment of the caller, settings
like NV_EMBED_CACHE_MEBIBYTES and NV_EMBED_DTYPE included; the baseline has a precision of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from arguments import count, positive, share
from bare_engine import PACKAGE, BareEngine
from loads import LENGTHS, MODEL_NAME, Gateway, Refused, Server
from rounds import Rounds, loads_of, token_counter
from serving_plot import plot
from serving_report import report
from started_server import (
    GATEWAY_COMMAND,
    ROOT,
    StartedGateway,
    StartedServer,
    batch_tokens_of,
    end_on_sigterm,
    progress,
)

sys.path.insert(0, str(PACKAGE))
from nv_embed.compute.host import multiplies_bfloat16  # needs the standard library only

BASELINE_REPOSITORY = ROOT / "benchmarks" / "baseline" / "model_repository"
LOADS = ("query", "open", "documents", "mixed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who = parser.add_argument_group("who is measured")
    who.add_argument("--url", default="localhost:8001", help="gRPC address of a running server (%(default)s)")
    who.add_argument("--model-name", default=MODEL_NAME, help="as the server knows what is measured (%(default)s)")
    who.add_argument("--baseline-url", help="of a second one, to compare with")
    who.add_argument("--compare", action="store_true", help="start this server and the baseline, measure both")
    who.add_argument("--engine", action="store_true", help="measure the bare engine too")
    who.add_argument("--gateway", action="store_true", help="start the gateway before the first server, measure it too")
    who.add_argument("--checkpoint", type=Path,
                     help="what is served, to count its tokens; --compare, --engine: nv-embed-mini")  # fmt: skip
    who.add_argument("--device", default="cpu", help="of --compare and --engine (%(default)s)")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--loads", default=",".join(LOADS), help="some of %(default)s, or cached alone (%(default)s)")
    what.add_argument("--lengths", choices=LENGTHS, default="mixed", help="of documents (%(default)s)")
    what.add_argument("--query-lengths", choices=LENGTHS, default="short", help="of queries (%(default)s)")
    what.add_argument("--clients", type=count, default=16, help="of loads query and cached (%(default)s)")
    what.add_argument("--document-clients", type=count, default=4, help="of load documents (%(default)s)")
    what.add_argument("--documents", type=count, default=16, help="in one request (%(default)s)")
    what.add_argument("--bulk-clients", type=count, default=8, help="of load mixed (%(default)s)")
    what.add_argument("--rate", type=positive, help="of load open, queries/s (0.7 of the slowest server's closed loop)")
    what.add_argument("--probe-rate", type=positive, default=5.0, help="queries/s beside bulk (%(default)s)")
    what.add_argument("--max-batch-tokens", type=count, help="of the bare engine's full batches (as the server's log)")
    what.add_argument("--seed", type=int, default=time.time_ns(), help="of texts and arrivals; each run has a new one")
    how = parser.add_argument_group("how long")
    how.add_argument("--seconds", type=positive, default=10.0, help="of each load in each round (%(default)s)")
    how.add_argument("--rounds", type=count, default=6, help="(%(default)s)")
    how.add_argument("--warm-up", type=positive, default=3.0, help="seconds of each load before that (%(default)s)")
    how.add_argument("--quick", action="store_true", help="one round of 2 s after 0.5 s")
    how.add_argument("--allow-other-work", type=share, default=0.05, metavar="SHARE",
                     help="of the processors' time, beyond which a round is void (%(default)s)")  # fmt: skip
    how.add_argument("--plot", type=Path, help="write a picture there; needs matplotlib")
    arguments = parser.parse_args(argv)
    arguments.loads = arguments.loads.split(",")
    if arguments.compare or arguments.engine:
        arguments.checkpoint = arguments.checkpoint or ROOT / "checkpoints" / "nv-embed-mini"
    if unknown := set(arguments.loads) - {*LOADS, "cached"}:
        parser.error(f"--loads: expected some of {','.join(LOADS)},cached, got {','.join(sorted(unknown))}")
    if "cached" in arguments.loads and len(arguments.loads) > 1:
        parser.error(
            f"--loads: expected cached alone, because it needs the cache that the others must not have; got "
            f"{','.join(arguments.loads)}; run it by itself"
        )
    if "cached" in arguments.loads and os.environ.get("NV_EMBED_CACHE_MEBIBYTES") == "0" and arguments.compare:
        parser.error("--loads cached: expected a cache, got NV_EMBED_CACHE_MEBIBYTES=0; unset it")
    if arguments.quick:
        arguments.seconds, arguments.rounds, arguments.warm_up = 2.0, 1, 0.5
    if arguments.gateway and not GATEWAY_COMMAND.exists():
        parser.error(f"--gateway: expected {GATEWAY_COMMAND}, found none: pip install './client[gateway]'")
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401 - better now than after the run
        except ImportError:
            parser.error("--plot: expected matplotlib, found none: pip install matplotlib, or leave --plot out")
    if arguments.engine and not arguments.compare and not arguments.max_batch_tokens:
        parser.error("--engine: expected --compare, or --max-batch-tokens as the server's log has it after 'ready:'")
    return arguments


def settings_by_server(checkpoint: Path, device: str) -> dict[str, dict[str, str]]:
    """Settings of the servers that --compare starts, by their names."""
    model = {"MODEL_PATH": str(checkpoint), "DEVICE": device}
    usual = model | {"MODEL_REPOSITORY": str(BASELINE_REPOSITORY)}
    if device.partition(",")[0] != "cpu":  # the baseline computes on the first
        return {"nv-embed": model, "baseline": usual | {"NV_EMBED_DTYPE": "auto"}}
    settings = {"nv-embed": model, "baseline": usual | {"NV_EMBED_DTYPE": "float32"}}
    if multiplies_bfloat16():
        settings["baseline, bfloat16"] = usual | {"NV_EMBED_DTYPE": "bfloat16"}
    return settings


def dtypes_of(servers: Sequence[Server], settings: Mapping[str, Mapping[str, str]]) -> dict[str, str | None]:
    """What each computes in: as it says itself, or as it was started."""
    dtypes = {}
    for server in servers:
        if not isinstance(server, Gateway):
            started = settings.get(server.name, {}).get("NV_EMBED_DTYPE", "auto")
            dtypes[server.name] = server.dtype() or (None if started == "auto" else started)
    return dtypes


def main() -> int:
    arguments = parse()
    end_on_sigterm()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        max_batch_tokens = arguments.max_batch_tokens
        settings: dict[str, dict[str, str]] = {}
        if arguments.compare:
            settings = settings_by_server(arguments.checkpoint, arguments.device)
            if arguments.loads == ["cached"]:
                settings = {"nv-embed": settings["nv-embed"]}
            servers = []
            for name, of_server in settings.items():
                progress(f"starting {name}")
                started = stack.enter_context(StartedServer(folder / f"{name}.log", of_server))
                servers.append(Server(name, started.ports.url, arguments.model_name))
            max_batch_tokens = max_batch_tokens or batch_tokens_of(folder / "nv-embed.log")
        else:
            name = "nv-embed" if arguments.baseline_url else "server"
            servers = [Server(name, arguments.url, arguments.model_name)]
            if arguments.baseline_url:
                servers.append(Server("baseline", arguments.baseline_url, arguments.model_name))
        if arguments.gateway:
            progress("starting the gateway")
            known = ("--model-name", arguments.model_name)
            gateway = stack.enter_context(StartedGateway(folder / "gateway.log", servers[0].url, known))
            servers.append(Gateway("gateway", gateway.url, arguments.model_name))
        engine = None
        if arguments.engine:
            progress("starting the bare engine")
            if not max_batch_tokens:
                raise SystemExit(
                    "--engine: expected max_batch_tokens in the server's log, got none: --max-batch-tokens"
                )
            engine = BareEngine(arguments.checkpoint, arguments.device)
            stack.callback(engine.stop)
        count_tokens = token_counter(arguments.checkpoint)
        rounds = Rounds(arguments, servers, loads_of(arguments), engine, max_batch_tokens, count_tokens)
        try:
            rounds.run()
        except Refused as refusal:
            print(f"no measurement: {refusal}", file=sys.stderr)
            return 2
        dtypes = dtypes_of(servers, settings)
    missing = [name for name in rounds.loads if not rounds.valid[name]]
    if rounds.samples:
        result = report(arguments, rounds, [server.name for server in servers], dtypes, max_batch_tokens)
        if arguments.plot:
            plot(arguments.plot, rounds.samples)
        print(json.dumps(result))
    if missing:
        why = "others used the processors in every round; end other work, or pass --allow-other-work 1 for a try"
        print(f"no measurement of {', '.join(missing)}: {why}", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
