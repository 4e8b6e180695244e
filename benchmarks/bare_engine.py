"""The server's engine with no server around it, to measure servers against. Knows nothing of Triton or the wire."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from loads import Sample, Stream, requests_of

PACKAGE = Path(__file__).resolve().parents[1] / "model_repository" / "nv-embed-v2" / "1"


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

    def embed(self, texts: Sequence[str], instruction: str | None, *, is_query: bool = False) -> Any:
        """[texts, dim]; None is the model's own instruction."""
        return self._ask("embed", texts, instruction, is_query)

    def with_vectors(self, texts: Sequence[str]) -> list[str]:
        """Those that have one: a table of token vectors has none for a text without tokens."""
        return self._ask("with_vectors", texts)  # type: ignore[no-any-return]

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
    from nv_embed.compute.loading import load_engines
    from nv_embed.errors import InvalidRequest
    from nv_embed.models import read_checkpoint

    config = read_checkpoint(checkpoint)
    limit = int(os.environ.get("NV_EMBED_MAX_SEQUENCE_TOKENS", "32768"))
    tokenizer = config.tokenizer(checkpoint, limit)
    settings = {"dtype": "DTYPE", "attention": "ATTENTION", "compile_layers": "COMPILE"}  # the servers obey these, too
    chosen = {name: os.environ.get(f"NV_EMBED_{variable}", "auto") for name, variable in settings.items()}
    engines = load_engines(checkpoint, config, devices=device.split(","), max_sequence_tokens=limit, **chosen)
    threads = ThreadPoolExecutor(len(engines))
    # A GPU's two threads share its work; those of a CPU compute at the same time.
    num_at_once = sum(engine.device.type == "cpu" for engine in engines)
    num_at_once += len({engine.device for engine in engines if engine.device.type != "cpu"})

    def batches(stream: Stream, seed: str, max_batch_tokens: int | None) -> Iterator[tuple[list[Any], int]]:
        """Sequences of a batch, and how many requests end in it."""
        instruction = config.query_instruction if stream.is_query else config.document_instruction
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

    def with_vectors(texts: Sequence[str]) -> list[str]:
        def has_vector(text: str) -> bool:
            try:
                tokenizer.encode([text], "")
            except InvalidRequest:
                return False
            return True

        return list(filter(has_vector, texts))

    def embed(texts: Sequence[str], instruction: str | None, is_query: bool) -> Any:
        if instruction is None:
            instruction = config.query_instruction if is_query else config.document_instruction
        return np.concatenate([engines[0].embed([sequence]) for sequence in tokenizer.encode(texts, instruction)])

    commands: dict[str, Callable[..., Any]] = {f.__name__: f for f in (load, run, batch_seconds, embed, with_vectors)}
    while True:
        try:
            name, *arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(commands[name](*arguments))
