"""The rounds of a benchmark of servers: targets take turns with every load, and a round beside other work is void."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

from bare_engine import PACKAGE, BareEngine
from core_time import CoreClock, CoreTime
from loads import Gateway, Load, Sample, Server, Stream, requests_of
from other_work import moment, other_work
from processes import all_processes, processes_behind
from started_server import progress

sys.path.insert(0, str(PACKAGE))
from nv_embed.compute.host import most_cores  # needs the standard library only

BARE = ("query", "documents")  # loads that are put on the bare engine too
WAYS = ("engine, full batches", "engine, as in flight")
NUM_CACHED = 50
Loads: TypeAlias = "dict[str, dict[str, Load]]"  # by name, and by the name of a part: one round runs all its parts
Samples: TypeAlias = "dict[tuple[str, str], list[Sample]]"  # stream and target -> one for each valid round
CoreTimes: TypeAlias = "dict[tuple[str, str], CoreTime]"  # load and target -> of all valid rounds
Answer = TypeVar("Answer")


class Disturbed(Exception):
    """Others used the processors meanwhile: how much, and who."""


def loads_of(arguments: argparse.Namespace) -> Loads:
    """What is run for each name in --loads. Without --rate, that of the open loop is 0 until the warm-up tells it."""
    query = Stream("query", True, arguments.query_lengths, 1, num_clients=arguments.clients)
    documents = Stream(
        "documents", False, arguments.lengths, arguments.documents, num_clients=arguments.document_clients
    )
    bulk = Stream("bulk alone", False, arguments.lengths, arguments.documents, num_clients=arguments.bulk_clients)
    beside = Stream("bulk beside", False, arguments.lengths, arguments.documents, num_clients=arguments.bulk_clients)
    probe = Stream("queries beside", True, arguments.query_lengths, 1, rate=arguments.probe_rate)
    texts = tuple(text for (text,) in islice(requests_of(query, f"{arguments.seed} cached"), NUM_CACHED))
    cached = Stream("cached", True, arguments.query_lengths, 1, num_clients=arguments.clients, texts=texts)
    opened = Stream("query, open loop", True, arguments.query_lengths, 1, rate=arguments.rate or 0.0)
    loads: Loads = {
        "query": {"query": (query,)},
        "documents": {"documents": (documents,)},
        "mixed": {"mixed": (bulk,), "beside": (beside, probe)},
        "cached": {"cached": (cached,)},
        "open": {"open": (opened,)},
    }
    return {name: parts for name, parts in loads.items() if name in arguments.loads}


def name_of(load: Load) -> str:
    """Of all its streams together."""
    return " and ".join(stream.name for stream in load)


class Rounds:
    """All rounds of one run, and what they found.

    Args:
        arguments: rounds, seconds, warm_up, seed and allow_other_work of the command; what loads_of needs.
        servers: that are put under load, in turns.
        loads: that are put on them.
        engine: is put under load too.
        max_batch_tokens: of the engine's full batches.
        count_tokens: of texts, that are queries or not.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        servers: Sequence[Server],
        loads: Loads,
        engine: BareEngine | None = None,
        max_batch_tokens: int | None = None,
        count_tokens: Callable[[Sequence[str], bool], int] | None = None,
    ) -> None:
        self.samples: Samples = {}
        self.core_times: CoreTimes = {}
        self.passes: dict[str, list[float]] = {}  # durations of single forward passes, in seconds
        self.valid: Counter[str] = Counter()  # rounds by the name of the load
        self.void: Counter[str] = Counter()
        self.loads = dict(loads)
        self._arguments, self._servers, self._engine = arguments, servers, engine
        self._max_batch_tokens = max_batch_tokens
        self._count_tokens = count_tokens

    def run(self) -> None:
        """Warm up; then run as many rounds, and up to as many again in place of void ones."""
        cores, quota = len(os.sched_getaffinity(0)), most_cores()
        if quota < cores:
            progress(f"a quota allows {quota:g} of {cores} cores, but the share of others is that of all {cores}")
        processes = all_processes()
        for server in self._servers:
            if not processes_behind(server.url, processes):
                progress(
                    f"{server.name}: no process of this machine serves {server.url}, so neither other work beside it "
                    "nor its core time is seen"
                )
        self._warm_up()
        wanted = self._arguments.rounds
        for number in range(2 * wanted):
            lacking = [name for name in self.loads if self.valid[name] < wanted]
            if lacking:
                of = f" of {wanted}" if number < wanted else f", in place of void ones: {', '.join(lacking)}"
                progress(f"round {number + 1}{of}")
            for name in lacking:
                try:
                    self._round(number, name)
                    self.valid[name] += 1
                except Disturbed as disturbed:
                    self.void[name] += 1
                    progress(f"round {number + 1}, {name}: void, because {disturbed}")
        self.samples = dict(sorted(self.samples.items(), key=self._place))
        self.core_times = dict(sorted(self.core_times.items(), key=self._place))

    def _place(self, entry: tuple[tuple[str, str], object]) -> tuple[int, int]:
        """Where it belongs, whichever round was the first valid one: loads as they are run, then targets."""
        loads = [load for parts in self.loads.values() for load in parts.values()]
        streams = [name for load in loads for name in (*(stream.name for stream in load), name_of(load))]
        targets = [*(server.name for server in self._servers), *WAYS]
        return streams.index(entry[0][0]), targets.index(entry[0][1])

    def _warm_up(self) -> None:
        arguments, seed = self._arguments, f"{self._arguments.seed} warm-up"
        bare = " and the bare engine" * bool(self._engine)
        progress(f"warm-up: {len(self._servers)} servers{bare}, {arguments.warm_up:g} s each load")
        parts = [load for name, parts in self.loads.items() if name != "open" for load in parts.values()]
        if self._engine:
            for load in parts:
                self._bare(self._engine, load[0], arguments.warm_up, seed)
        rates = []
        for server in self._servers:
            for load in parts:
                asyncio.run(server.run(load, arguments.warm_up, seed))
            if "open" in self.loads and not arguments.rate:
                closed = Stream("query", True, arguments.query_lengths, 1, num_clients=arguments.clients)
                results = asyncio.run(server.run((closed,), arguments.warm_up, f"{arguments.seed} rate"))
                rates.append(results["query"].requests_per_second)
        if "open" in self.loads:
            rate = arguments.rate or max(0.7 * min(rates), 0.5)
            progress(f"open loop: {rate:.1f} queries/s")
            (stream,) = self.loads["open"]["open"]
            self.loads["open"] = {"open": (replace(stream, rate=rate),)}

    def _round(self, number: int, name: str) -> None:
        """One load on all targets. Nothing is kept if it raises Disturbed."""
        seconds, seed = self._arguments.seconds, f"{self._arguments.seed} round {number}"
        targets: list[Server | BareEngine] = [*self._servers, *([self._engine] if self._engine else [])]
        samples: list[tuple[str, str, Sample]] = []
        core_times: list[tuple[str, str, CoreTime]] = []
        passes: dict[str, float] = {}
        for part, load in self.loads[name].items():
            for target in targets if self.valid[name] % 2 == 0 else targets[::-1]:
                if isinstance(target, Server):
                    results, spent = self._put(target, load, seconds, f"{seed} {part}")
                    samples += [(stream, target.name, sample) for stream, sample in results.items()]
                    core_times.append((name_of(load), target.name, spent))
                elif part in BARE:
                    ways = self._watched(self._bare, target, load[0], seconds, f"{seed} {part}")
                    samples += [(load[0].name, way, sample) for way, sample in ways.items()]
            if self._engine and part == "beside":
                bulk, probe = load
                passes["full batch"] = self._watched(self._engine.batch_seconds, bulk, seed, self._max_batch_tokens)
                passes["one query"] = self._watched(self._engine.batch_seconds, probe, seed, None)
        for stream, target_name, sample in samples:
            self.samples.setdefault((stream, target_name), []).append(sample)
        for streams, target_name, spent in core_times:
            self.core_times.setdefault((streams, target_name), CoreTime({}, 0)).add(spent)
        for batch, duration in passes.items():
            self.passes.setdefault(batch, []).append(duration)

    def _put(self, server: Server, load: Load, seconds: float, seed: str) -> tuple[dict[str, Sample], CoreTime]:
        # The gateway stands before the first server.
        clock = CoreClock.of([server.url, *([self._servers[0].url] if isinstance(server, Gateway) else [])])
        results = self._watched(clock.around, asyncio.run, server.run(load, seconds, seed))
        for stream in load:
            sample = results[stream.name]
            sample.num_tokens = self._count_tokens and self._count_tokens(sample.texts, stream.is_query)
            sample.texts.clear()
        return results, CoreTime(clock.spent, sum(len(sample.latencies) for sample in results.values()))

    def _bare(self, engine: BareEngine, stream: Stream, seconds: float, seed: str) -> dict[str, Sample]:
        tokens = (self._max_batch_tokens, None)
        return {way: engine.run(stream, seconds, seed, n) for way, n in zip(WAYS, tokens, strict=True)}

    def _watched(self, call: Callable[..., Answer], *arguments: object) -> Answer:
        """What the call returns; raises Disturbed if others used too much meanwhile."""
        before = moment()
        answer = call(*arguments)
        after = moment()
        own = {os.getpid()}.union(*(processes_behind(server.url, before.processes) for server in self._servers))
        others = other_work(before, after, own)
        if others.share > self._arguments.allow_other_work:
            raise Disturbed(str(others))
        return answer


def token_counter(checkpoint: Path | None) -> Callable[[Sequence[str], bool], int] | None:
    """Counts tokens as the network is fed them; None where the checkpoint's tokenizer is not at hand."""
    if checkpoint is None:
        progress("no tokens/s: name the folder that is served as --checkpoint, because its tokenizer counts them")
        return None
    if (checkpoint / "modules.json").is_file():
        progress("no tokens/s: they are counted as NV-Embed-v2 is fed")
        return None
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    except Exception:  # the Rust library raises bare Exception
        progress(f"no tokens/s: that needs the tokenizers library and {checkpoint}/tokenizer.json")
        return None
    instruction = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "

    def count(texts: Sequence[str], is_query: bool) -> int:
        prefix = instruction if is_query else ""
        return sum(len(e.ids) for e in tokenizer.encode_batch_fast([f"{prefix}{text}</s>" for text in texts]))

    return count
