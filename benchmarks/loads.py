"""Texts, loads made of them, and what is put under load. Knows neither how that is started nor what is reported."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from random import Random
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as pb

MODEL_NAME = "nv-embed-v2"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
MAX_CONNECTIONS = 256  # to the gateway
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

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


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one kind: a closed loop of `num_clients`, or an open loop of `rate` requests per second."""

    name: str
    is_query: bool
    lengths: str
    num_texts: int  # of a request
    num_clients: int = 0
    rate: float = 0.0
    texts: tuple[str, ...] = ()  # of which requests are made; none: of new ones


Load: TypeAlias = "tuple[Stream, ...]"


def requests_of(stream: Stream, seed: str) -> Iterator[list[str]]:
    """The texts of one request after the other, without end."""
    random = Random(f"{seed} {stream.lengths} {stream.is_query}")
    while stream.texts:
        yield random.choices(stream.texts, k=stream.num_texts)
    low, high = LENGTHS[stream.lengths]
    while True:
        texts = []
        for _ in range(stream.num_texts):
            num_words = round(low * (high / low) ** random.random())
            texts.append(" ".join(random.choices(WORDS, k=num_words)))
        yield texts


def infer_request(
    texts: Sequence[str], is_query: bool, outputs: Sequence[str] = ("embeddings",), model_name: str = MODEL_NAME
) -> Any:
    """The gRPC message of a request."""
    request = pb.ModelInferRequest(model_name=model_name)
    name, shape = ("query", [1]) if is_query else ("documents", [1, len(texts)])
    request.inputs.add(name=name, datatype="BYTES", shape=shape)
    elements = [text.encode() for text in texts]
    request.raw_input_contents.append(b"".join(len(e).to_bytes(4, "little") + e for e in elements))
    for output in outputs:
        request.outputs.add(name=output)
    return request


@dataclass(slots=True)
class Sample:
    """What became of one stream on one target, in one round or in all."""

    latencies: list[float] = field(default_factory=list)  # seconds, of answers that are no errors
    errors: Counter[str] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)  # answered, until counted
    num_texts: int = 0
    num_tokens: int | None = None
    seconds: float = 0.0  # until the last answer
    retries: int = 0  # requests that were sent again, because the server had closed an idle connection

    def add(self, other: Sample) -> None:
        """Take in another round."""
        self.latencies += other.latencies
        self.errors += other.errors
        self.num_texts += other.num_texts
        self.seconds += other.seconds
        self.retries += other.retries
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
            "retries": self.retries,
            "requests_per_second": per_second(len(self.latencies)),
            "texts_per_second": per_second(self.num_texts),
            "tokens_per_second": None if self.num_tokens is None else per_second(self.num_tokens),
            "p50_ms": rounded(p50),
            "p90_ms": rounded(p90),
            "p99_ms": rounded(p99),
        }


class Refused(Exception):
    """An answer that is an error: its code, by which it is counted, and what else it says."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code


# Texts, whether they are queries, and the sample that counts retries -> the number of rows.
Embed: TypeAlias = "Callable[[Sequence[str], bool, Sample], Awaitable[int]]"


class Server:
    """A server under load, any number of requests at once."""

    def __init__(self, name: str, url: str, model_name: str = MODEL_NAME) -> None:
        self.name, self.url, self.model_name = name, url, model_name

    async def run(self, load: Load, seconds: float, seed: str) -> dict[str, Sample]:
        """Put every stream of a load on the server at once; returns when all is answered."""
        async with self._connected() as embed:
            await embed(["connect"], True, Sample())
            start = time.monotonic()
            samples = {stream.name: Sample() for stream in load}
            await asyncio.gather(
                *(
                    (_open_loop if stream.rate else _closed_loop)(
                        stream, seed, embed, start, start + seconds, samples[stream.name]
                    )
                    for stream in load
                )
            )
        return samples

    def dtype(self) -> str | None:
        """The precision that it computes in; None of one that does not say it, such as the baseline."""
        request = infer_request(["dtype"], True, ["model_info"], self.model_name)
        request.parameters["model_info"].bool_param = True
        with grpc.insecure_channel(self.url, options=CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(
                METHOD,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
            try:
                told = call(request, timeout=60).raw_output_contents[0]
            except grpc.RpcError:
                return None
        return str(json.loads(told[4:])["dtype"])  # after its length

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Embed]:
        async with grpc.aio.insecure_channel(self.url, options=CHANNEL_OPTIONS) as channel:
            # Plain messages on grpc.aio cost the client least: two thirds of tritonclient's own, less than threads.
            call = channel.unary_unary(
                METHOD,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )

            async def embed(texts: Sequence[str], is_query: bool, _sample: Sample) -> int:
                try:
                    response = await call(infer_request(texts, is_query, model_name=self.model_name))
                except grpc.aio.AioRpcError as error:
                    raise Refused(error.code().name, error.details() or "") from error
                return int(response.outputs[0].shape[0])

            yield embed


class Gateway(Server):
    """The OpenAI-style gateway under load, asked for base64 as the `openai` package does, over kept-alive HTTP."""

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Embed]:
        idle: list[HTTPConnection] = []

        def ask(texts: Sequence[str], is_query: bool) -> tuple[int, int]:
            connection = idle.pop() if idle else HTTPConnection(self.url.removeprefix("http://"), timeout=600)
            kind = "query" if is_query else "passage"
            body = {"model": self.model_name, "input": list(texts), "input_type": kind, "encoding_format": "base64"}
            try:
                response, num_retries = self._posted(json.dumps(body), connection)
                answer = response.read()
            except (OSError, HTTPException) as error:
                connection.close()
                raise Refused(type(error).__name__, str(error)) from error
            idle.append(connection)
            if response.status != 200:
                raise Refused(f"HTTP {response.status}", answer[:300].decode(errors="replace"))
            rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in json.loads(answer)["data"]]
            return len(rows), num_retries

        with ThreadPoolExecutor(MAX_CONNECTIONS) as threads:

            async def embed(texts: Sequence[str], is_query: bool, sample: Sample) -> int:
                num_rows, num_retries = await asyncio.get_running_loop().run_in_executor(threads, ask, texts, is_query)
                sample.retries += num_retries
                return num_rows

            yield embed
        for connection in idle:
            connection.close()

    def _posted(self, body: str, connection: HTTPConnection) -> tuple[HTTPResponse, int]:
        """The answer, and how often it was asked for again: once if the connection closed before its first byte."""
        is_new = connection.sock is None
        try:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            is_closed = not connection.sock.recv(1, socket.MSG_PEEK)  # waits for the first byte
        except ConnectionError:
            if is_new:
                raise
            is_closed = True
        if is_new or not is_closed:
            return connection.getresponse(), 0
        connection.close()  # by the server while it was idle, as uvicorn does after 5 s
        return self._posted(body, connection)[0], 1


async def _closed_loop(stream: Stream, seed: str, embed: Embed, start: float, until: float, sample: Sample) -> None:
    requests = requests_of(stream, seed)

    async def client() -> None:
        while time.monotonic() < until:
            await _ask(stream, next(requests), embed, start, time.monotonic(), sample)

    await asyncio.gather(*(client() for _ in range(stream.num_clients)))


async def _open_loop(stream: Stream, seed: str, embed: Embed, start: float, until: float, sample: Sample) -> None:
    requests, random, due, asked = requests_of(stream, seed), Random(f"{seed} {stream.name}"), start, []
    while (due := due + random.expovariate(stream.rate)) < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        asked.append(asyncio.ensure_future(_ask(stream, next(requests), embed, start, due, sample)))
    await asyncio.gather(*asked)


async def _ask(stream: Stream, texts: list[str], embed: Embed, start: float, due: float, sample: Sample) -> None:
    try:
        num_rows = await embed(texts, stream.is_query, sample)
    except Refused as refusal:
        sample.errors[refusal.code] += 1
        await asyncio.sleep(0.05)  # a server that refuses everything must not become a busy loop
        return
    now = time.monotonic()
    if num_rows != len(texts):
        sample.errors["wrong shape"] += 1
        return
    sample.latencies.append(now - due)
    sample.num_texts += len(texts)
    sample.texts += texts
    sample.seconds = now - start


def rounded(value: float) -> float | None:
    """To four significant digits; nothing measured here has more. None for what was not measured."""
    return None if math.isnan(value) else float(f"{value:.4g}")
