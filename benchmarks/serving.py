"""How fast a server answers: throughput and latency under closed, open and mixed loads.

    python benchmarks/serving.py --url localhost:8001 --quick     # any server that serves the model
    python benchmarks/serving.py --compare --engine               # this server, the baseline and the bare engine

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
many requests as there are clients. Servers get the environment of the caller, NV_EMBED_... settings included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as pb

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "model_repository" / "nv-embed-v2" / "1"
BASELINE_REPOSITORY = ROOT / "benchmarks" / "baseline" / "model_repository"
MODEL_NAME = "nv-embed-v2"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
START_SECONDS = 600
STOP_SECONDS = 60

# Words in a text, drawn so that every order of magnitude is as likely as the next.
LENGTHS = {"short": (4, 12), "medium": (40, 120), "long": (250, 400), "mixed": (8, 400)}
_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so said what up its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many before must through back years where much your way down should because long each just state
people those too mr how little good world make very year still see own work men day get here between both life being
under three never know same last another while us off might great go come since against right came take used himself
few house use place during without again home around small however found place part school water number night point
system program business question group problem service family country company model network learning example pattern
energy market history language science method result language library garden kitchen river bridge mountain weather
winter summer morning evening music painting medicine doctor patient treatment vaccine protein cell gene species forest
ocean climate carbon engine battery signal memory computer software database query document search index vector
government election policy treaty court judge contract price interest tax budget industry factory worker union trade
"""
WORDS = _WORDS.split()


# --- texts and loads ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one kind: a closed loop of `num_clients`, or an open loop of `rate` requests per second."""

    name: str
    is_query: bool
    lengths: str
    num_texts: int  # of a request
    num_clients: int = 0
    rate: float = 0.0


Load: TypeAlias = "tuple[Stream, ...]"


def requests_of(stream: Stream, seed: str) -> Iterator[list[str]]:
    """The texts of one request after the other, without end."""
    random = Random(f"{seed} {stream.lengths} {stream.is_query}")
    low, high = LENGTHS[stream.lengths]
    while True:
        texts = []
        for _ in range(stream.num_texts):
            num_words = round(low * (high / low) ** random.random())
            texts.append(" ".join(random.choices(WORDS, k=num_words)))
        yield texts


def infer_request(texts: Sequence[str], is_query: bool, outputs: Sequence[str] = ("embeddings",)) -> Any:
    """The gRPC message of a request."""
    request = pb.ModelInferRequest(model_name=MODEL_NAME)
    name, shape = ("query", [1]) if is_query else ("documents", [1, len(texts)])
    request.inputs.add(name=name, datatype="BYTES", shape=shape)
    elements = [text.encode() for text in texts]
    request.raw_input_contents.append(b"".join(len(e).to_bytes(4, "little") + e for e in elements))
    for output in outputs:
        request.outputs.add(name=output)
    return request


# --- what is measured -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Sample:
    """What became of one stream on one target, in one round or in all."""

    latencies: list[float] = field(default_factory=list)  # seconds, of answers that are no errors
    errors: Counter[str] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)  # answered, until counted
    num_texts: int = 0
    num_tokens: int | None = None
    seconds: float = 0.0  # until the last answer

    def add(self, other: Sample) -> None:
        """Take in another round."""
        self.latencies += other.latencies
        self.errors += other.errors
        self.num_texts += other.num_texts
        self.seconds += other.seconds
        if other.num_tokens is not None:
            self.num_tokens = (self.num_tokens or 0) + other.num_tokens

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def summary(self) -> dict[str, Any]:
        """As in the table and in the JSON line; latencies in milliseconds."""
        p50, p90, p99 = np.percentile(self.latencies, (50, 90, 99)) * 1000 if self.latencies else [float("nan")] * 3
        per_second = (lambda n: round(n / self.seconds, 2)) if self.seconds else (lambda n: 0.0)
        return {
            "requests": len(self.latencies),
            "errors": dict(self.errors),
            "requests_per_second": per_second(len(self.latencies)),
            "texts_per_second": per_second(self.num_texts),
            "tokens_per_second": None if self.num_tokens is None else per_second(self.num_tokens),
            "p50_ms": _rounded(p50),
            "p90_ms": _rounded(p90),
            "p99_ms": _rounded(p99),
        }


class Server:
    """A server under load: one channel, any number of requests at once."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    async def run(self, load: Load, seconds: float, seed: str) -> dict[str, Sample]:
        """Put every stream of a load on the server at once; returns when all is answered."""
        async with grpc.aio.insecure_channel(self.url, options=CHANNEL_OPTIONS) as channel:
            # Plain messages on grpc.aio cost the client least: two thirds of tritonclient's own, less than threads.
            call = channel.unary_unary(
                METHOD,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
            await call(infer_request(["connect"], is_query=True))
            start = time.monotonic()
            samples = {stream.name: Sample() for stream in load}
            await asyncio.gather(
                *(
                    (_open_loop if stream.rate else _closed_loop)(
                        stream, seed, call, start, start + seconds, samples[stream.name]
                    )
                    for stream in load
                )
            )
        return samples


async def _closed_loop(stream: Stream, seed: str, call: Any, start: float, until: float, sample: Sample) -> None:
    requests = requests_of(stream, seed)

    async def client() -> None:
        while time.monotonic() < until:
            await _ask(stream, next(requests), call, start, time.monotonic(), sample)

    await asyncio.gather(*(client() for _ in range(stream.num_clients)))


async def _open_loop(stream: Stream, seed: str, call: Any, start: float, until: float, sample: Sample) -> None:
    requests, random, due, asked = requests_of(stream, seed), Random(f"{seed} {stream.name}"), start, []
    while (due := due + random.expovariate(stream.rate)) < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        asked.append(asyncio.ensure_future(_ask(stream, next(requests), call, start, due, sample)))
    await asyncio.gather(*asked)


async def _ask(stream: Stream, texts: list[str], call: Any, start: float, due: float, sample: Sample) -> None:
    try:
        response = await call(infer_request(texts, stream.is_query))
    except grpc.aio.AioRpcError as error:
        sample.errors[error.code().name] += 1
        await asyncio.sleep(0.05)  # a server that refuses everything must not become a busy loop
        return
    now = time.monotonic()
    if response.outputs[0].shape[0] != len(texts):
        sample.errors["wrong shape"] += 1
        return
    sample.latencies.append(now - due)
    sample.num_texts += len(texts)
    sample.texts += texts
    sample.seconds = now - start


# --- the bare engine ------------------------------------------------------------------------------------


class BareEngine:
    """The server's engines in a process of their own, idle unless asked."""

    def __init__(self, checkpoint: Path, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_engine_process, args=(theirs, checkpoint, device), daemon=True)
        self._process.start()
        theirs.close()
        self._ask("load")

    def run(self, stream: Stream, seconds: float, seed: str, max_batch_tokens: int | None) -> Sample:
        """Forward passes over a stream's texts; None tokens: as many requests at a time as there are clients."""
        return self._ask("run", stream, seconds, seed, max_batch_tokens)  # type: ignore[no-any-return]

    def batch_seconds(self, stream: Stream, seed: str, max_batch_tokens: int | None) -> float:
        """Duration of one forward pass over one batch of a stream's texts; None tokens: of one request."""
        return self._ask("batch_seconds", stream, seed, max_batch_tokens)  # type: ignore[no-any-return]

    def embed(self, texts: Sequence[str], instruction: str) -> Any:
        """[texts, dim]"""
        return self._ask("embed", texts, instruction)

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)

    def _ask(self, *command: Any) -> Any:
        try:
            self._connection.send(command)
            return self._connection.recv()
        except EOFError:
            raise SystemExit("the bare engine's process ended; its message is above") from None


def _engine_process(connection: Connection, checkpoint: Path, device: str) -> None:
    sys.path.insert(0, str(PACKAGE))
    from nv_embed.config import CheckpointConfig
    from nv_embed.engine import load_engines
    from nv_embed.requests import QUERY_INSTRUCTION
    from nv_embed.tokenizer import Tokenizer

    config = CheckpointConfig.load(checkpoint)
    limit = int(os.environ.get("NV_EMBED_MAX_SEQUENCE_TOKENS", "32768"))
    tokenizer = Tokenizer(checkpoint / "tokenizer.json", vocab_size=config.vocab_size, max_sequence_tokens=limit)
    settings = {"dtype": "DTYPE", "attention": "ATTENTION", "compile_layers": "COMPILE"}  # the servers obey these, too
    chosen = {name: os.environ.get(f"NV_EMBED_{variable}", "auto") for name, variable in settings.items()}
    engines = load_engines(checkpoint, config, devices=device.split(","), **chosen)
    threads = ThreadPoolExecutor(len(engines))
    # A GPU's two threads share its work; those of a CPU compute at the same time.
    num_at_once = sum(engine.device.type == "cpu" for engine in engines)
    num_at_once += len({engine.device for engine in engines if engine.device.type != "cpu"})

    def batches(stream: Stream, seed: str, max_batch_tokens: int | None) -> Iterator[tuple[list[Any], int]]:
        """Sequences of a batch, and how many requests end in it."""
        instruction = QUERY_INSTRUCTION if stream.is_query else ""
        batch: list[Any] = []
        num_tokens = num_requests = 0
        for texts in requests_of(stream, seed):
            for sequence in tokenizer.encode(texts, instruction):
                if max_batch_tokens and batch and num_tokens + sequence.num_tokens > max_batch_tokens:
                    yield batch, num_requests
                    batch, num_tokens, num_requests = [], 0, 0
                batch.append(sequence)
                num_tokens += sequence.num_tokens
            num_requests += 1
            if not max_batch_tokens and num_requests >= math.ceil(stream.num_clients / num_at_once):
                yield batch, num_requests
                batch, num_tokens, num_requests = [], 0, 0

    def timed(made: Sequence[list[Any]], num_engines: int = 1) -> float:
        """Seconds for these batches, so many engines computing."""
        waiting = deque(made)

        def work(engine: Any) -> None:
            while True:
                try:
                    batch = waiting.popleft()
                except IndexError:
                    return
                engine.embed(batch)

        started = time.perf_counter()
        list(threads.map(work, engines[:num_engines]))
        return time.perf_counter() - started

    def load() -> None:
        pass

    def run(stream: Stream, seconds: float, seed: str, max_batch_tokens: int | None) -> Sample:
        sample = Sample(num_tokens=0)
        source = batches(stream, seed, max_batch_tokens)
        num_engines = len(engines) if max_batch_tokens else min(num_at_once, stream.num_clients)
        while sample.seconds < seconds:
            # Several for each engine, lest the wait for the last of them count for much.
            made = list(islice(source, 8 * num_engines))
            duration = timed([batch for batch, _ in made], num_engines)
            sample.seconds += duration
            sample.latencies += [math.nan] * sum(num_requests for _, num_requests in made)
            sample.num_texts += sum(len(batch) for batch, _ in made)
            sample.num_tokens = (sample.num_tokens or 0) + sum(s.num_tokens for batch, _ in made for s in batch)
        return sample

    def batch_seconds(stream: Stream, seed: str, max_batch_tokens: int | None) -> float:
        source = batches(stream, seed, max_batch_tokens)
        return statistics.median(timed([next(source)[0]]) for _ in range(7))

    def embed(texts: Sequence[str], instruction: str) -> Any:
        return np.concatenate([engines[0].embed([sequence]) for sequence in tokenizer.encode(texts, instruction)])

    commands: dict[str, Callable[..., Any]] = {f.__name__: f for f in (load, run, batch_seconds, embed)}
    while True:
        try:
            name, *arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(commands[name](*arguments))


# --- servers started here -------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nothing listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one server."""

    http: int
    grpc: int
    metrics: int


def is_ready(http_port: int) -> bool:
    """Whether the server there says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=2):
            return True
    except OSError:
        return False


@contextmanager
def started_server(settings: Mapping[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Ports]]:
    """`serve.sh` on free ports, ready; stopped at the end."""
    ports = Ports(*free_ports(3))
    # By pip: the baseline's packages are in that environment and in no image.
    environ = (
        {"RUNTIME": "pip"}
        | os.environ
        | {
            "HTTP_PORT": str(ports.http),
            "GRPC_PORT": str(ports.grpc),
            "METRICS_PORT": str(ports.metrics),
        }
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ROOT / "serve.sh"], env=environ | dict(settings), stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(ports.http):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
                raise SystemExit(f"{tail}\nthe server did not become ready; its log is above")
            time.sleep(0.2)
        yield process, ports
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def batch_tokens_of(log: Path) -> int | None:
    """The budget that a server of this repository settled on, from its log."""
    found = re.findall(r"max_batch_tokens=(\d+)", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) if found else None


# --- the benchmark --------------------------------------------------------------------------------------


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


Samples: TypeAlias = "dict[tuple[str, str], list[Sample]]"  # stream and target -> one for each round


def measure(
    arguments: argparse.Namespace, servers: list[Server], engine: BareEngine | None, max_batch_tokens: int
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

    progress(f"warm-up: {len(servers)} servers, {arguments.warm_up:g} s each load")
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
                elif name in ("query", "documents"):
                    for how, tokens in (("full batches", max_batch_tokens), ("as in flight", None)):
                        sample = target.run(load[0], arguments.seconds, f"{seed} {name}", tokens)
                        samples.setdefault((load[0].name, f"engine, {how}"), []).append(sample)
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


def ratio(samples: Samples, over: tuple[str, str], under: tuple[str, str]) -> dict[str, float] | None:
    """Texts per second of one over another, round by round: median, lowest, highest."""
    ratios = [
        (a.num_texts / a.seconds) / (b.num_texts / b.seconds)
        for a, b in zip(samples.get(over, []), samples.get(under, []), strict=False)
        if a.num_texts and b.num_texts
    ]
    if not ratios:
        return None
    return {"median": _rounded(statistics.median(ratios)), "low": _rounded(min(ratios)), "high": _rounded(max(ratios))}


def report(
    arguments: argparse.Namespace, samples: Samples, passes: dict[str, float], names: list[str], max_batch_tokens: int
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
        if len(names) > 1:
            ratios[f"{stream}: {names[0]} / {names[1]}"] = ratio(samples, (stream, names[0]), (stream, names[1]))
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
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
        "max_batch_tokens": max_batch_tokens,
        "results": results,
        "ratios": ratios,
        "forward_pass_ms": {name: _rounded(1000 * seconds) for name, seconds in passes.items()},
    }


def row_order(samples: Samples, key: tuple[str, str]) -> tuple[int, int]:
    """Where a row belongs: loads in the order of the first round, targets likewise."""
    streams, targets = (list(dict.fromkeys(part)) for part in zip(*samples, strict=True))
    return streams.index(key[0]), targets.index(key[1])


def cpu_name() -> str:
    """As the kernel knows it."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


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


def progress(message: str) -> None:
    """Say what goes on, apart from the results."""
    print(message, file=sys.stderr, flush=True)


def _rounded(value: float) -> float | None:
    """To four significant digits; nothing measured here has more. None for what was not measured."""
    return None if math.isnan(value) else float(f"{value:.4g}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who = parser.add_argument_group("who is measured")
    who.add_argument("--url", default="localhost:8001", help="gRPC address of a running server (%(default)s)")
    who.add_argument("--baseline-url", help="of a second one, to compare with")
    who.add_argument("--compare", action="store_true", help="start this server and the baseline, measure both")
    who.add_argument("--engine", action="store_true", help="measure the bare engine too")
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


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> int:
    arguments = parse()
    end_on_sigterm()
    with ExitStack() as stack:
        max_batch_tokens = arguments.max_batch_tokens
        if arguments.compare:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = {"MODEL_PATH": str(arguments.checkpoint), "DEVICE": arguments.device}
            baseline = model | {"MODEL_REPOSITORY": str(BASELINE_REPOSITORY)}
            servers = []
            for name, settings in (("nv-embed", model), ("baseline", baseline)):
                progress(f"starting {name}")
                log = folder / f"{name}.log"
                _, ports = stack.enter_context(started_server(settings, log))
                servers.append(Server(name, f"127.0.0.1:{ports.grpc}"))
            max_batch_tokens = max_batch_tokens or batch_tokens_of(folder / "nv-embed.log")
        else:
            servers = [Server("nv-embed" if arguments.baseline_url else "server", arguments.url)]
            if arguments.baseline_url:
                servers.append(Server("baseline", arguments.baseline_url))
        engine = None
        if arguments.engine:
            progress("starting the bare engine")
            engine = BareEngine(arguments.checkpoint, arguments.device)
            stack.callback(engine.stop)
        try:
            samples, passes = measure(arguments, servers, engine, max_batch_tokens)
        except grpc.aio.AioRpcError as error:
            print(f"no measurement: {error.code().name}: {error.details()}", file=sys.stderr)
            return 2
    result = report(arguments, samples, passes, [server.name for server in servers], max_batch_tokens)
    if arguments.plot:
        plot(arguments.plot, samples)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
