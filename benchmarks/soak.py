"""Whether a server keeps its promises under abuse: every request answered once, every row right, memory flat.

    python benchmarks/soak.py --url localhost:8001                # a running server, left alive
    python benchmarks/soak.py --requests 100000 --kills 20        # one started here, killed again and again
    python benchmarks/soak.py --model minilm=/models/all-MiniLM-L6-v2    # one started here with two models

Concurrent clients draw requests from a seed: about half of them valid (queries and documents over gRPC, HTTP and gRPC
streams, some given up by cancel or deadline), half hostile (random bytes and shapes, broken protobuf and JSON, wrong
types and parameters, texts and requests far over the limits, raw bytes on both ports). For every request the codes
that are right are known: valid ones succeed, malformed ones are refused as the caller's fault, both may meet
UNAVAILABLE. The expected vector of every valid text comes from the bare engine in a process of its own before the
load starts, or, of a server that runs elsewhere, from one request for each text while it is quiet.

A server that is started here runs through serve.sh with RESTART=always. `--kills` kills, in turn, the model's process
(SIGKILL, SIGSEGV), freezes it (SIGSTOP), and ends tritonserver (SIGTERM, SIGKILL), all in the first 30 % of the
requests; memory is judged in the rest, which one life of the server sees. From the signal until the server is seen
ready again, and a moment longer, the kill excuses broken and refused connections, however long that takes; whether it
took too long is checked by itself (--restart-seconds). At any other time they are wrong, and so is a server that ended
unasked: then its last words, exit code or signal, and the stack of a core dump (with gdb, where the kernel writes cores
into the working directory) are printed. A run that fails keeps its folder, with the log and the cores.

A request counts as unanswered when nothing came for --answer-seconds; as answered twice when a stream brought more
responses than requests or an answer bore another request's id. Exit code 0 only if nothing was unanswered, answered
twice, wrong or answered with a code that it must not get, the server ended only when told to and was soon back, and
memory, where it was judged, stayed flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from abuse import (
    BUSY,
    OTHER_INSTRUCTION,
    REFUSED,
    STREAM_ERROR,
    Client,
    Expected,
    Outcome,
    Target,
    rows_of,
    texts_of,
)
from bare_engine import BareEngine
from loads import CHANNEL_OPTIONS, METHOD, MODEL_NAME, infer_request
from post_mortem import last_words, stack_of
from processes import Usage, growth, memory_of, processes_of
from started_server import ROOT, StartedServer, end_on_sigterm, progress
from tritonclient.grpc import service_pb2 as pb

STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
MEMORY_GROWTH_LIMIT = 0.05
GRACE_SECONDS = 2  # in which clients find a server that is ready again
KILL_SHARE = 0.3  # of the requests; the rest judges memory, once its first quarter is over
LIMITS = {  # of a server started here: small, so that a request can be over them without taking minutes
    "NV_EMBED_DTYPE": "float32",  # because rows are compared to 1e-5
    "NV_EMBED_MAX_SEQUENCE_TOKENS": "256",
    "NV_EMBED_MAX_REQUEST_DOCUMENTS": "200",
    "NV_EMBED_MAX_REQUEST_BYTES": "400000",
    "NV_EMBED_MAX_QUEUE_BYTES": "2000000",
    "NV_EMBED_MAX_QUEUE_TOKENS": "40000",
    "NV_EMBED_CACHE_MEBIBYTES": "2",  # full at once, so that it evicts and its filling is no growth of memory
}
# What Triton itself says while the model's process is dead or the server goes down; only right around a kill.
GOING_DOWN = frozenset({"NOT_FOUND", "CANCELLED", "INTERNAL", STREAM_ERROR, "HTTP 404", "HTTP 400", "HTTP 500",
                        "HTTP broken", REFUSED})  # fmt: skip
RECONNECT_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),  # a restarted server is found again at once
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(slots=True)
class Tally:
    """What became of all requests."""

    requests: int = 0
    unanswered: int = 0
    answered_twice: int = 0
    wrong_rows: int = 0
    checked_rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)  # kind, code and message
    around_kills: int = 0  # errors that only a kill excuses
    unasked_ends: list[str] = field(default_factory=list)  # of the server, between kills: what it said last
    longest_seconds: float = 0.0


class Soak:
    """Everything that one run shares."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        started: StartedServer | None = None,
        engines: Mapping[str, BareEngine | None] | None = None,
    ) -> None:
        """
        Args:
            arguments: of the command line.
            started: a server with a folder of its own for log and cores; none: it runs elsewhere.
            engines: the models by name, each with what its rows should be; none: one request for each text says that.
        """
        self.arguments, self.started, self.engines = arguments, started, engines or {MODEL_NAME: None}
        self.tally = Tally()
        self.usages: list[Usage] = []
        self.kills: list[dict[str, Any]] = []
        self.threads = ThreadPoolExecutor(16)
        self.up = asyncio.Event()
        self.excused_until = 0.0
        self.server: int | None = None  # pid of tritonserver; none: it is being killed, or runs elsewhere
        self.log_size = 0  # when the server was last seen well
        self.done = False
        self.judged_from = 0.0
        self.seconds = 0.0

    async def run(self) -> None:
        """All of it."""
        arguments, started = self.arguments, self.started
        host, _, grpc_port = (f"127.0.0.1:{started.ports.grpc}" if started else arguments.url).rpartition(":")
        options = (*CHANNEL_OPTIONS, *RECONNECT_OPTIONS)
        async with grpc.aio.insecure_channel(f"{host}:{grpc_port}", options=options) as channel:
            write, parse = pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
            self.infer = channel.unary_unary(METHOD, request_serializer=write, response_deserializer=parse)
            targets = [
                Target(
                    model_name=name,
                    host=host,
                    grpc_port=int(grpc_port),
                    http_port=started.ports.http if started else arguments.http_port,
                    infer=self.infer,
                    infer_bytes=channel.unary_unary(METHOD, response_deserializer=parse),
                    stream=channel.stream_stream(
                        STREAM_METHOD,
                        request_serializer=write,
                        response_deserializer=pb.ModelStreamInferResponse.FromString,
                    ),
                    threads=self.threads,
                    expected=await self.expect(name, engine),
                    has_small_limits=started is not None,
                    seed=arguments.seed,
                    answer_seconds=arguments.answer_seconds,
                )
                for name, engine in self.engines.items()
            ]
            self.up.set()
            self.server = self.pids().get("server")
            begun = time.monotonic()
            helpers = [asyncio.ensure_future(self._watch())]
            if arguments.kills:
                helpers.append(asyncio.ensure_future(self._kill()))
            deadline = time.monotonic() + 60 * arguments.minutes
            clients = [Client(targets[number % len(targets)], number) for number in range(arguments.clients)]
            await asyncio.gather(*(self._client(client, deadline) for client in clients))
            self.seconds = time.monotonic() - begun
            self.done = True
            for helper in helpers:
                await helper
            # Quiet again: the server must be there, the same as before, and still answer rightly.
            give_up = time.monotonic() + arguments.answer_seconds
            await self._look()
            while not self.up.is_set() and time.monotonic() < give_up:
                await asyncio.sleep(0.2)
                await self._look()
            for target in targets:
                _, run = Client(target, -1).valid_query()
                try:
                    outcome = await asyncio.wait_for(run(), arguments.answer_seconds)
                    self.tally.wrong_rows += outcome.wrong
                except (grpc.aio.AioRpcError, asyncio.TimeoutError) as error:
                    self.tally.unexpected[f"the last query of {target.model_name}: {error!r}"[:150]] += 1
        self.threads.shutdown(wait=False)

    async def expect(self, model_name: str, engine: BareEngine | None) -> Expected:
        """The right rows: of the engine here, or of the server itself while nothing disturbs it."""
        texts = texts_of(random.Random(f"{self.arguments.seed} texts"))
        if engine is not None:
            texts = engine.with_vectors(texts)
            queries = engine.embed(texts, None, is_query=True)
            return Expected(texts, queries, engine.embed(texts, None), engine.embed(texts, OTHER_INSTRUCTION))

        async def ask_all(is_query: bool, instruction: str | None = None) -> Any:
            rows = []
            for text in texts:
                message = infer_request([text], is_query, model_name=model_name)
                if instruction is not None:
                    message.parameters["instruction"].string_param = instruction
                rows.append(rows_of(await self.infer(message)))
            return np.concatenate(rows)

        return Expected(texts, await ask_all(True), await ask_all(False), await ask_all(False, OTHER_INSTRUCTION))

    async def _client(self, client: Client, deadline: float) -> None:
        tally = self.tally
        while tally.requests < self.arguments.requests and time.monotonic() < deadline:
            kind, right, run = client.draw()
            tally.requests += 1
            tally.kinds[kind] += 1
            started = time.monotonic()
            try:
                outcome = await asyncio.wait_for(run(), self.arguments.answer_seconds)
            except grpc.aio.AioRpcError as error:
                outcome = Outcome(error.code().name, error.details() or "")
                if "Connection refused" in outcome.message:
                    outcome.code = REFUSED
            except (asyncio.TimeoutError, TimeoutError):
                tally.unanswered += 1
                progress(f"unanswered: {kind}, asked {time.monotonic() - started:.0f} s ago")
                continue
            tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - started)
            tally.codes[outcome.code] += 1
            tally.checked_rows += outcome.rows
            tally.wrong_rows += outcome.wrong
            tally.answered_twice += outcome.extra
            if outcome.wrong:
                progress(f"wrong rows: {outcome.wrong} of {kind}")
            if outcome.code not in right | BUSY:
                if self.is_excused(outcome.code, started):
                    tally.around_kills += 1
                    await asyncio.sleep(0.5)
                else:
                    tally.unexpected[f"{kind}: {outcome.code}: {outcome.message[:150]}"] += 1
            if outcome.code in BUSY | {REFUSED}:
                await asyncio.sleep(0.05)
            if not self.up.is_set():  # a server that is down would eat up all requests
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.up.wait(), deadline - time.monotonic())

    def is_excused(self, code: str, started: float) -> bool:
        """Whether a kill explains this answer to a request of that moment."""
        return code in GOING_DOWN and started < self.excused_until

    def notice(self, server: int) -> None:
        """A server that is another one than the last, though nobody ended that, replaces one that ended unasked."""
        if self.server not in (None, server):
            words = last_words(self.started.log, self.log_size) if self.started else "nobody knows"
            self.tally.unasked_ends.append(words)
            progress(f"the server ended unasked:\n{words}")
            self.server = server

    def _keep_cores(self) -> None:
        """Give core dumps names of their own, because the next may have the same; one that was asked for goes."""
        for core in self.cores("core*"):
            if self.server is None:
                core.unlink()
            else:
                core.rename(core.with_name(f"crash-{time.strftime('%H-%M-%S')}-{core.name}"))

    async def _watch(self) -> None:
        """Look once a second."""
        while not self.done:
            await self._look()
            await asyncio.sleep(1)
        self.up.set()

    async def _look(self) -> None:
        """Whether the server is there, and is the same, and how much memory it has."""
        if self.started is None:
            return
        self._keep_cores()
        log_size = self.started.log.stat().st_size
        is_ready = await self.is_ready()
        (self.up.set if is_ready else self.up.clear)()
        if is_ready and (usage := memory_of(self.started.process.pid)) is not None:
            self.usages.append(usage)
            self.notice(usage.pid)
            self.log_size = log_size

    async def is_ready(self) -> bool:
        """Whether the server says so."""
        assert self.started is not None
        return await asyncio.get_running_loop().run_in_executor(self.threads, self.started.answers)

    def pids(self) -> dict[str, int]:
        """Of the processes of the server started here."""
        return processes_of(self.started.process.pid) if self.started else {}

    def cores(self, pattern: str) -> list[Path]:
        """Core dumps of the server started here."""
        return sorted(self.started.log.parent.glob(pattern)) if self.started else []

    async def _kill(self) -> None:
        """The kills, spread over the first part of the requests."""
        arguments = self.arguments
        ways = [("worker", signal.SIGKILL), ("worker", signal.SIGSEGV), ("server", signal.SIGTERM),
                ("worker", signal.SIGSTOP), ("server", signal.SIGKILL)]  # fmt: skip
        for number in range(arguments.kills):
            target = arguments.requests * KILL_SHARE * (number + 1) / (arguments.kills + 1)
            while self.tally.requests < target and not self.done:
                await asyncio.sleep(0.1)
            whom, with_signal = ways[number % len(ways)]
            pids = self.pids()
            if self.done or whom not in pids:
                break
            await self.kill_once(pids, whom, with_signal)
        self.judged_from = time.monotonic()

    async def kill_once(self, pids: dict[str, int], whom: str, with_signal: signal.Signals) -> None:
        """One kill, until another server is ready; what breaks from before the signal until after that is excused."""
        self.notice(pids["server"])
        killed, self.server, self.excused_until = time.monotonic(), None, float("inf")
        os.kill(pids[whom], with_signal)
        while not self.done:
            await asyncio.sleep(0.2)
            server = self.pids().get("server")
            if server not in (None, pids["server"]) and await self.is_ready():
                break
        else:
            return  # and the number of kills in the report is not the one asked for
        seconds = time.monotonic() - killed
        self.kills.append({"whom": whom, "signal": with_signal.name, "seconds_until_ready": round(seconds, 1)})
        progress(f"kill {len(self.kills)}: {whom} {with_signal.name}, ready again after {seconds:.1f} s")
        self._keep_cores()
        self.server = server
        self.up.set()
        self.excused_until = time.monotonic() + GRACE_SECONDS


def report(soak: Soak) -> dict[str, Any]:
    """Print what was found; return what the last line says."""
    tally = soak.tally
    memory = growth(soak.usages, soak.judged_from)
    slowest = max((kill["seconds_until_ready"] for kill in soak.kills), default=0.0)
    left_behind = sum(region.exists() for region in {region for usage in soak.usages for region in usage.regions})
    is_flat = all(
        memory[name]["growth"] < MEMORY_GROWTH_LIMIT for name in ("server", "worker", "shm") if name in memory
    )
    failures = tally.unanswered + tally.answered_twice + tally.wrong_rows + tally.unexpected.total()
    result = {
        "benchmark": "soak",
        "passed": failures + left_behind + len(tally.unasked_ends) == 0
        and is_flat
        and len(soak.kills) == soak.arguments.kills
        and slowest <= soak.arguments.restart_seconds,
        "seed": soak.arguments.seed,
        "requests": tally.requests,
        "hostile": sum(count for kind, count in tally.kinds.items() if kind.startswith("hostile")),
        "seconds": round(soak.seconds, 1),
        "unasked_ends": len(tally.unasked_ends),
        "unanswered": tally.unanswered,
        "answered_twice": tally.answered_twice,
        "checked_rows": tally.checked_rows,
        "wrong_rows": tally.wrong_rows,
        "wrong_codes": dict(tally.unexpected),
        "excused_by_kills": tally.around_kills,
        "longest_seconds": round(tally.longest_seconds, 2),
        "codes": dict(tally.codes.most_common()),
        "kinds": dict(tally.kinds.most_common()),
        "kills": soak.kills,
        "slowest_restart_seconds": slowest,
        "memory": memory,
        "memory_judged": "server" in memory,  # else the last life was too short, or the server runs elsewhere
        "shm_files_left_behind": left_behind,
    }
    for key, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{key.replace('_', ' '):<32} {value}")
    print(f"{'kills':<32} {len(soak.kills)}")
    for code, count in tally.codes.most_common():
        print(f"{f'answers {code}':<32} {count}")
    for name in ("server", "worker", "shm"):
        if m := memory.get(name):
            print(f"{f'memory of {name}, MiB':<32} {m['before_mib']} to {m['after_mib']}: {m['growth']:+.1%}")
    for key, count in tally.unexpected.most_common(20):
        print(f"wrong code, {count} times: {key!a}")
    for words in tally.unasked_ends:
        print(f"the server ended unasked; its last words:\n{words}")
    for core in soak.cores("crash-*"):
        print(stack_of(core))
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="gRPC address of a running server; none: one is started here")
    parser.add_argument("--http-port", type=int, help="of that server; none: no HTTP requests")
    parser.add_argument("--requests", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="at most (%(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--kills", type=int, default=0, help="of the server started here (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--answer-seconds", type=float, default=90, help="until unanswered (%(default)s)")
    parser.add_argument("--restart-seconds", type=float, default=60,  # Triton's 30 to stop and as many to start
                        help="at most, from a kill until ready again (%(default)s)")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "nv-embed-mini",
                        help="of the server started here (%(default)s)")  # fmt: skip
    parser.add_argument("--model", type=added_model, action="append", default=[], metavar="NAME=FOLDER",
                        help="one more of the server started here; may be repeated")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of the server started here (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.url and (arguments.kills or arguments.model):
        parser.error("--kills and --model: expected a server that is started here; leave --url out")
    return arguments


def added_model(value: str) -> tuple[str, Path]:
    """NAME=FOLDER; argparse shows what is wrong with it."""
    name, _, folder = value.partition("=")
    if not Path(folder).is_dir() or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER; got {value!r}")
    return name, Path(folder).resolve()


def add_model(name: str, folder: Path, device: str, stack: ExitStack) -> None:
    """Have serve.sh serve one more model, with the same limits, until the stack ends."""
    parameters = {variable.removeprefix("NV_EMBED_").lower(): value for variable, value in LIMITS.items()}
    words = [f"{key}={value}" for key, value in (parameters | {"device": device}).items()]
    subprocess.run([ROOT / "tools" / "add_model", name, folder, *words], check=True, stdout=sys.stderr)
    stack.callback(shutil.rmtree, ROOT / "model_repository" / name)


def main() -> int:
    arguments = parse()
    end_on_sigterm()
    with ExitStack() as stack:
        started = None
        engines: dict[str, BareEngine | None] = {}
        if not arguments.url:
            os.environ |= LIMITS  # the engines read the longest text from them too
            for name, folder in [(MODEL_NAME, arguments.checkpoint), *arguments.model]:
                engines[name] = engine = BareEngine(folder, arguments.device)
                stack.callback(engine.stop)
            for name, folder in arguments.model:
                add_model(name, folder, arguments.device, stack)
            settings = {
                "MODEL_PATH": str(arguments.checkpoint.resolve()), "DEVICE": arguments.device,
                "RESTART": "always", "MAX_DELAY_SECONDS": "1",
            }  # fmt: skip
            folder = Path(tempfile.mkdtemp(prefix="nv-embed-soak-"))
            progress(f"starting the server; its log is in {folder}")
            os.chdir(folder)  # where a process that crashes leaves its core
            resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
            started = stack.enter_context(StartedServer(folder / "server.log", settings))
        soak = Soak(arguments, started, engines)
        asyncio.run(soak.run())
    result = report(soak)
    if started and result["passed"]:
        shutil.rmtree(folder)
    elif started:
        print(f"log and cores are kept in {folder}")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
