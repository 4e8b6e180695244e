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

In an open loop latency counts from the moment a request was due, not from when it was sent, so a server that stalls
cannot hide it. Throughput is what was answered divided by the time until the last answer. All texts are drawn from a
seed and none comes twice, so no cache helps; every target gets the same ones in the same order.

With two or more targets the rounds alternate, in turned order every second round, and one target computes at a time:
drift of the machine meets all alike. Ratios are taken within a round; their median and range are given. `--compare`
starts this repository's server and benchmarks/baseline on free ports. `--engine` adds the bare engine, called in a
process of its own with no server around it: forward passes alone are timed, in full batches and in batches of as
many requests as there are clients. `--gateway` starts the client's gateway in front of the first server; the
client and its extra `gateway` must be installed where this runs. Servers get the environment of the caller, settings
like NV_EMBED_CACHE_MEBIBYTES included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from bare_engine import BareEngine
from loads import LENGTHS, MODEL_NAME, Gateway, Load, Refused, Sample, Server, Stream, rounded
from machine import machine
from started_server import ROOT, StartedGateway, StartedServer, batch_tokens_of, end_on_sigterm, progress

BASELINE_REPOSITORY = ROOT / "benchmarks" / "baseline" / "model_repository"
Samples: TypeAlias = "dict[tuple[str, str], list[Sample]]"  # stream and target -> one for each round


def loads_of(arguments: argparse.Namespace) -> dict[str, Load]:
    """The loads by name, without the open loop, whose rate is not known yet."""
    query = Stream("query", True, arguments.query_lengths, 1, num_clients=arguments.clients)
    documents = Stream(
        "documents", False, arguments.lengths, arguments.documents, num_clients=arguments.document_clients
    )
    bulk = Stream("bulk alone", False, arguments.lengths, arguments.documents, num_clients=arguments.bulk_clients)
    beside = Stream("bulk beside", False, arguments.lengths, arguments.documents, num_clients=arguments.bulk_clients)
    probe = Stream("queries beside", True, arguments.query_lengths, 1, rate=arguments.probe_rate)
    loads: dict[str, Load] = {"query": (query,), "documents": (documents,), "mixed": (bulk,), "beside": (beside, probe)}
    wanted = {"mixed", "beside"} if "mixed" in arguments.loads else set()
    return {name: load for name, load in loads.items() if name in wanted | set(arguments.loads)}


def measure(
    arguments: argparse.Namespace, servers: list[Server], engine: BareEngine | None, max_batch_tokens: int | None
) -> tuple[Samples, dict[str, float]]:
    """All rounds, and the durations of single forward passes in seconds."""
    loads = loads_of(arguments)
    samples: Samples = {}
    passes: dict[str, list[float]] = {}
    count_tokens = token_counter(arguments.checkpoint)

    def run(server: Server, load: Load, seconds: float, seed: str) -> dict[str, Sample]:
        results = asyncio.run(server.run(load, seconds, seed))
        for stream in load:
            sample = results[stream.name]
            sample.num_tokens = count_tokens and count_tokens(sample.texts, stream.is_query)
            sample.texts.clear()
        return results

    def run_engine(engine: BareEngine, stream: Stream, seconds: float, seed: str) -> dict[str, Sample]:
        ways = {"engine, full batches": max_batch_tokens, "engine, as in flight": None}
        return {way: engine.run(stream, seconds, seed, tokens) for way, tokens in ways.items()}

    bare = ("query", "documents")  # loads that are put on the bare engine too
    progress(
        f"warm-up: {len(servers)} servers{' and the bare engine' * bool(engine)}, {arguments.warm_up:g} s each load"
    )
    if engine:
        for load in loads.values():
            run_engine(engine, load[0], arguments.warm_up, f"{arguments.seed} warm-up")
    rates = []
    for server in servers:
        for load in loads.values():
            run(server, load, arguments.warm_up, f"{arguments.seed} warm-up")
        if "open" in arguments.loads and not arguments.rate:
            closed = Stream("query", True, arguments.query_lengths, 1, num_clients=arguments.clients)
            results = run(server, (closed,), arguments.warm_up, f"{arguments.seed} rate")
            rates.append(results["query"].requests_per_second)
    if "open" in arguments.loads:
        rate = arguments.rate or max(0.7 * min(rates), 0.5)
        progress(f"open loop: {rate:.1f} queries/s")
        loads["open"] = (Stream("query, open loop", True, arguments.query_lengths, 1, rate=rate),)

    for number in range(arguments.rounds):
        progress(f"round {number + 1} of {arguments.rounds}")
        seed = f"{arguments.seed} round {number}"
        targets: list[Server | BareEngine] = [*servers, *([engine] if engine else [])]
        for name, load in loads.items():
            for target in targets if number % 2 == 0 else targets[::-1]:
                if isinstance(target, Server):
                    for stream_name, sample in run(target, load, arguments.seconds, f"{seed} {name}").items():
                        samples.setdefault((stream_name, target.name), []).append(sample)
                elif name in bare:
                    for way, sample in run_engine(target, load[0], arguments.seconds, f"{seed} {name}").items():
                        samples.setdefault((load[0].name, way), []).append(sample)
            if engine and name == "beside":
                bulk, probe = load
                passes.setdefault("full batch", []).append(engine.batch_seconds(bulk, seed, max_batch_tokens))
                passes.setdefault("one query", []).append(engine.batch_seconds(probe, seed, None))
    return samples, {name: statistics.median(seconds) for name, seconds in passes.items()}


def token_counter(checkpoint: Path | None) -> Callable[[Sequence[str], bool], int] | None:
    """Counts tokens as the network is fed them; None where the checkpoint's tokenizer is not at hand."""
    if checkpoint is None:
        progress("no tokens/s: --checkpoint says by whose tokenizer")
        return None
    if (checkpoint / "modules.json").is_file():
        progress("no tokens/s: they are counted as NV-Embed-v2 is fed")
        return None
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    except Exception:  # the Rust library raises bare Exception
        progress(f"no tokens/s: that takes the tokenizers library and {checkpoint}/tokenizer.json")
        return None
    instruction = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "

    def count(texts: Sequence[str], is_query: bool) -> int:
        prefix = instruction if is_query else ""
        return sum(len(e.ids) for e in tokenizer.encode_batch_fast([f"{prefix}{text}</s>" for text in texts]))

    return count


# --- what is reported -----------------------------------------------------------------------------------


def ratio(samples: Samples, over: tuple[str, str], under: tuple[str, str]) -> dict[str, float | None] | None:
    """Texts per second of one over another, round by round: median, lowest, highest."""
    ratios = [
        (a.num_texts / a.seconds) / (b.num_texts / b.seconds)
        for a, b in zip(samples.get(over, []), samples.get(under, []), strict=False)
        if a.num_texts and b.num_texts
    ]
    if not ratios:
        return None
    return {"median": rounded(statistics.median(ratios)), "low": rounded(min(ratios)), "high": rounded(max(ratios))}


def report(
    arguments: argparse.Namespace,
    samples: Samples,
    passes: dict[str, float],
    names: list[str],
    max_batch_tokens: int | None,
) -> dict[str, Any]:
    """Print the table; return what the last line says."""
    header = ["load", "target", "requests", "errors", "req/s", "texts/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms"]
    rows, results = [header], []
    for (stream, target), rounds in sorted(samples.items(), key=lambda item: row_order(samples, item[0])):
        total = Sample()
        for sample in rounds:
            total.add(sample)
        summary = total.summary()
        results.append({"load": stream, "target": target, **summary})
        numbers = [summary["requests"], total.errors.total(), *list(summary.values())[2:]]
        rows.append([stream, target, *("-" if number is None else f"{number:g}" for number in numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())

    ratios: dict[str, Any] = {}
    print()
    for stream in ("query", "documents"):
        for other in names[1:]:
            over, under = (other, names[0]) if other == "gateway" else (names[0], other)
            ratios[f"{stream}: {over} / {under}"] = ratio(samples, (stream, over), (stream, under))
        for target in ("engine, full batches", "engine, as in flight"):
            ratios[f"{stream}: {names[0]} / {target}"] = ratio(samples, (stream, names[0]), (stream, target))
    for name in names:
        ratios[f"bulk beside queries / bulk alone: {name}"] = ratio(
            samples, ("bulk beside", name), ("bulk alone", name)
        )
    ratios = {name: value for name, value in ratios.items() if value}
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f} by round)")
    if passes:
        bound = 1.5 * passes["full batch"] + passes["one query"]
        print(
            f"forward pass: full batch of {max_batch_tokens} tokens {1000 * passes['full batch']:.0f} ms, one query "
            f"{1000 * passes['one query']:.1f} ms; 1.5 full batches and one query: {1000 * bound:.0f} ms"
        )
    settings = {k: os.path.relpath(v, ROOT) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    return {
        "benchmark": "serving",
        "settings": settings,
        "machine": machine(arguments.device),
        "max_batch_tokens": max_batch_tokens,
        "results": results,
        "ratios": ratios,
        "forward_pass_ms": {name: rounded(1000 * seconds) for name, seconds in passes.items()},
    }


def row_order(samples: Samples, key: tuple[str, str]) -> tuple[int, int]:
    """Where a row belongs: loads in the order of the first round, targets likewise."""
    streams, targets = (list(dict.fromkeys(part)) for part in zip(*samples, strict=True))
    return streams.index(key[0]), targets.index(key[1])


def plot(path: Path, samples: Samples) -> None:
    """Latency distributions of every load and throughput beside them, one colour a target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    streams = list(dict.fromkeys(stream for stream, _ in samples))
    targets = list(dict.fromkeys(target for _, target in samples))
    colours = {target: f"C{i}" for i, target in enumerate(targets)}
    figure, axes = pyplot.subplots(
        2, len(streams), figsize=(3.4 * len(streams), 6.4), squeeze=False, layout="constrained"
    )
    for column, stream in enumerate(streams):
        rate, latency = axes[0][column], axes[1][column]
        here = [target for target in targets if (stream, target) in samples]
        for i, target in enumerate(here):
            rounds = samples[stream, target]
            rates = [sample.num_texts / sample.seconds for sample in rounds if sample.seconds]
            rate.bar(i, statistics.median(rates) if rates else 0, color=colours[target], label=target)
            rate.plot([i] * len(rates), rates, ".", color="black", markersize=4)
            seconds = sorted(second for sample in rounds for second in sample.latencies)
            if seconds and not target.startswith("engine"):
                share = 1 - np.arange(len(seconds)) / len(seconds)
                latency.step(np.array(seconds) * 1000, share, color=colours[target], label=target)
        rate.set_title(stream)
        rate.set_xticks([])
        rate.set_ylabel("texts/s (dots: rounds)" if column == 0 else "")
        latency.set_xscale("log")
        latency.set_yscale("log")
        for axis in (latency.xaxis, latency.yaxis):
            axis.set_minor_formatter(NullFormatter())  # else their labels overlap within one decade
        latency.set_xlabel("latency, ms")
        latency.set_ylabel("share of requests that take longer" if column == 0 else "")
        latency.grid(alpha=0.3)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    figure.savefig(path, dpi=120)
    progress(f"plot: {path}")


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
    names = ("query", "open", "documents", "mixed")
    what.add_argument("--loads", default=",".join(names), help="some of %(default)s")
    what.add_argument("--lengths", choices=LENGTHS, default="mixed", help="of documents (%(default)s)")
    what.add_argument("--query-lengths", choices=LENGTHS, default="short", help="of queries (%(default)s)")
    what.add_argument("--clients", type=int, default=16, help="of load query (%(default)s)")
    what.add_argument("--document-clients", type=int, default=4, help="of load documents (%(default)s)")
    what.add_argument("--documents", type=int, default=16, help="in one request (%(default)s)")
    what.add_argument("--bulk-clients", type=int, default=8, help="of load mixed (%(default)s)")
    what.add_argument("--rate", type=float, help="of load open, queries/s (0.7 of the slowest server's closed loop)")
    what.add_argument("--probe-rate", type=float, default=5.0, help="queries/s beside bulk (%(default)s)")
    what.add_argument("--max-batch-tokens", type=int, help="of the bare engine's full batches (as the server's log)")
    what.add_argument("--seed", type=int, default=1, help="of all texts and arrivals (%(default)s)")
    how = parser.add_argument_group("how long")
    how.add_argument("--seconds", type=float, default=10.0, help="of each load in each round (%(default)s)")
    how.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    how.add_argument("--warm-up", type=float, default=3.0, help="seconds of each load before the rounds (%(default)s)")
    how.add_argument("--quick", action="store_true", help="one round of 2 s after 0.5 s")
    how.add_argument("--plot", type=Path, help="write a picture there; needs matplotlib")
    arguments = parser.parse_args(argv)
    arguments.loads = arguments.loads.split(",")
    if arguments.compare or arguments.engine:
        arguments.checkpoint = arguments.checkpoint or ROOT / "checkpoints" / "nv-embed-mini"
    if unknown := set(arguments.loads) - set(names):
        parser.error(f"--loads: expected some of {','.join(names)}, got {','.join(sorted(unknown))}")
    if arguments.quick:
        arguments.seconds, arguments.rounds, arguments.warm_up = 2.0, 1, 0.5
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401 - better now than after the run
        except ImportError:
            parser.error("--plot: expected matplotlib, found none: pip install matplotlib, or leave --plot out")
    if arguments.engine and not arguments.compare and not arguments.max_batch_tokens:
        parser.error("--engine: expected --compare, or --max-batch-tokens as the server's log has it after 'ready:'")
    return arguments


def main() -> int:
    arguments = parse()
    end_on_sigterm()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        max_batch_tokens = arguments.max_batch_tokens
        if arguments.compare:
            model = {"MODEL_PATH": str(arguments.checkpoint), "DEVICE": arguments.device}
            baseline = model | {"MODEL_REPOSITORY": str(BASELINE_REPOSITORY)}
            servers = []
            for name, settings in (("nv-embed", model), ("baseline", baseline)):
                progress(f"starting {name}")
                log = folder / f"{name}.log"
                started = stack.enter_context(StartedServer(log, settings))
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
        try:
            samples, passes = measure(arguments, servers, engine, max_batch_tokens)
        except Refused as refusal:
            print(f"no measurement: {refusal}", file=sys.stderr)
            return 2
    result = report(arguments, samples, passes, [server.name for server in servers], max_batch_tokens)
    if arguments.plot:
        plot(arguments.plot, samples)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
