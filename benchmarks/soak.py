"""Whether a server keeps its promises under abuse: every request answered once, every row right, memory flat.

    python benchmarks/soak.py --url localhost:8001                # a running server, left alive
    python benchmarks/soak.py --requests 100000 --kills 20        # one started here, killed again and again

Concurrent clients draw requests from a seed: about half of them valid (queries and documents over gRPC, HTTP and gRPC
streams, some given up by cancel or deadline), half hostile (random bytes and shapes, broken protobuf and JSON, wrong
types and parameters, texts and requests far over the limits, raw bytes on both ports). For every request the codes
that are right are known: valid ones succeed, malformed ones are refused as the caller's fault, both may meet
UNAVAILABLE. The expected vector of every valid text comes from the bare engine in a process of its own before the
load starts, or, of a server that runs elsewhere, from one request for each text while it is quiet.

`--kills` starts the server through serve.sh with RESTART=always and kills, in turn, the model's process (SIGKILL,
SIGSEGV), freezes it (SIGSTOP), and ends tritonserver (SIGTERM, SIGKILL), all in the first 30 % of the requests; memory
is judged in the rest, which one life of the server sees. From the signal until the server is seen ready again, and a
moment longer, the kill excuses broken and refused connections, however long that takes; whether it took too long is
checked by itself (--restart-seconds). At any other time they are wrong, and so is a server that ended unasked.

A request counts as unanswered when nothing came for --answer-seconds; as answered twice when a stream brought more
responses than requests or an answer bore another request's id. Exit code 0 only if nothing was unanswered, answered
twice, wrong or answered with a code that it must not get, the server ended only when told to and was soon back, and
memory, where it was judged, stayed flat.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from serving import (
    METHOD,
    MODEL_NAME,
    ROOT,
    WORDS,
    BareEngine,
    end_on_sigterm,
    infer_request,
    is_ready,
    progress,
    started_server,
)
from tritonclient.grpc import service_pb2 as pb

NUM_UNICODE = 60
STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
QUERY_INSTRUCTION = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
OTHER_INSTRUCTION = "Instruct: Retrieve semantically similar text\nQuery: "
TOLERANCE = 1e-4  # of one element of a unit vector; batches differ from single texts by about 1e-6
MEMORY_GROWTH_LIMIT = 0.05
MIN_MEMORY_SAMPLES = 60  # one a second; the first quarter is warm-up, and a shorter one would not be over
GRACE_SECONDS = 2  # in which clients find a server that is ready again
KILL_SHARE = 0.3  # of the requests; the rest judges memory, once its first quarter is over
LIMITS = {  # of a server started here: small, so that a request can be over them without taking minutes
    "NV_EMBED_MAX_SEQUENCE_TOKENS": "256",
    "NV_EMBED_MAX_REQUEST_DOCUMENTS": "200",
    "NV_EMBED_MAX_REQUEST_BYTES": "400000",
    "NV_EMBED_MAX_QUEUE_BYTES": "2000000",
    "NV_EMBED_MAX_QUEUE_TOKENS": "40000",
    "NV_EMBED_CACHE_MEBIBYTES": "2",  # full at once, so that it evicts and its filling is no growth of memory
}
OK = "OK"
INVALID = frozenset({"INVALID_ARGUMENT", "HTTP 400"})
BUSY = frozenset({"UNAVAILABLE", "HTTP 503"})
STREAM_ERROR = "stream error"
REFUSED = "connection refused"  # on gRPC, whose own code for it is that of a busy server
ANY_TEXT = frozenset({OK, "HTTP 200"}) | INVALID  # nobody can say beforehand whether random bytes are a valid text
GIVEN_UP = frozenset({OK, "DEADLINE_EXCEEDED", "CANCELLED"})
# What Triton itself says while the model's process is dead or the server goes down; only right around a kill.
GOING_DOWN = frozenset({"UNAVAILABLE", "NOT_FOUND", "CANCELLED", "INTERNAL", STREAM_ERROR, "HTTP 503", "HTTP 404",
                        "HTTP 400", "HTTP 500", "HTTP broken", REFUSED})  # fmt: skip
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),  # a restarted server is found again at once
    ("grpc.use_local_subchannel_pool", 1),
)


# --- what is counted ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What became of all requests."""

    requests: int = 0
    hostile: int = 0
    unanswered: int = 0
    answered_twice: int = 0
    wrong_rows: int = 0
    checked_rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)  # kind, code and message
    around_kills: int = 0  # errors that only a kill excuses
    unasked_ends: int = 0  # of the server, between kills
    longest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory at one moment, in bytes."""

    at: float
    pid: int  # of the server: another one is another life
    server: int
    worker: int
    shm: int  # of /dev/shm that both share
    regions: frozenset[Path]  # the files there


@dataclass(slots=True)
class Expected:
    """Vectors of the texts that valid requests are made of."""

    texts: list[str]
    queries: Any  # [texts, dim], standard instruction
    documents: Any
    instructed: Any  # OTHER_INSTRUCTION


def texts_of(rng: random.Random) -> list[str]:
    """Texts of every sort: plain, long enough to be cut, in other scripts, odd; NUM_UNICODE of any characters last."""
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(30)]
    texts += [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(10)]
    texts += [" ".join(rng.choices(WORDS, k=400)) for _ in range(2)]
    texts += ["", " ", "日本語の文章", "naïve café — déjà vu", "🙂🙃", "a</s>b<s>c", "\x00\x01\n\t", "x" * 300]
    return [*texts, *(any_characters(rng, 200) for _ in range(NUM_UNICODE))]


def any_characters(rng: random.Random, at_most: int) -> str:
    """All that UTF-8 can say."""
    ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, at_most)))


# --- one request of each kind ---------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """How a request ended: a code, a message, and whether its rows were what they should be."""

    code: str
    message: str = ""
    rows: int = 0
    wrong: int = 0
    extra: int = 0  # answers beyond one for each request


class Client:
    """Draws requests and judges their answers; one for each concurrent client, all on one server."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak, self.number, self.count = soak, number, 0
        self.rng = random.Random(f"{soak.arguments.seed} client {number}")

    # Every method named as a kind returns the codes that are right for it and the coroutine that does it.

    def valid_query(self) -> Drawn:
        index = self.rng.randrange(len(self.soak.expected.texts))
        return self._known([index], True, self._parameters())

    def valid_documents(self) -> Drawn:
        return self._known(self._indices(8), False, self._parameters())

    def valid_bulk(self) -> Drawn:
        return self._known(self._indices(100), False, {})

    def valid_http(self) -> Drawn:
        indices, is_query = self._indices(3), self.rng.random() < 0.5
        indices = indices[:1] if is_query else indices
        name, shape = ("query", [1]) if is_query else ("documents", [1, len(indices)])
        tensor = {
            "name": name, "shape": shape, "datatype": "BYTES",
            "data": [self.soak.expected.texts[i] for i in indices],
        }  # fmt: skip
        body = json.dumps({"inputs": [tensor], "outputs": [{"name": "embeddings"}]}).encode()

        async def run() -> Outcome:
            status, answer = await self._post(f"/v2/models/{MODEL_NAME}/infer", body)
            if status != 200:
                return Outcome(f"HTTP {status}", answer[:200].decode("utf-8", "replace"))
            output = json.loads(answer)["outputs"][0]
            rows = np.array(output["data"], dtype=np.float32).reshape(output["shape"])
            return Outcome(OK, rows=len(indices), wrong=self._num_wrong(rows, indices, is_query, {}))

        return frozenset({OK}), run

    def valid_stream(self) -> Drawn:
        """Several requests on one gRPC stream, where a second answer to any of them could be seen."""
        asked: dict[str, tuple[list[int], bool]] = {}
        requests = []
        for _ in range(self.rng.randint(1, 6)):
            is_query = self.rng.random() < 0.5
            indices = self._indices(1 if is_query else 4)
            message = infer_request([self.soak.expected.texts[i] for i in indices], is_query)
            message.id = self._next_id()
            asked[message.id] = (indices, is_query)
            requests.append(message)

        async def run() -> Outcome:
            outcome, answers = Outcome(OK), Counter[str]()

            async def send() -> AsyncIterator[Any]:
                for message in requests:
                    yield message

            async for answer in self.soak.stream(send()):
                response = answer.infer_response
                answers[response.id] += 1
                if answer.error_message:
                    # A stream's errors carry no code; of the model's messages those of UNAVAILABLE alone say to retry.
                    outcome.code = "UNAVAILABLE" if "retry" in answer.error_message else STREAM_ERROR
                    outcome.message = answer.error_message
                elif response.id in asked:
                    indices, is_query = asked[response.id]
                    outcome.rows += len(indices)
                    outcome.wrong += self._num_wrong(_rows(response), indices, is_query, {})
            repeated = sum(count - 1 for request_id, count in answers.items() if request_id in asked)
            outcome.extra = max(repeated, answers.total() - len(asked), 0)  # an error may come without an id
            if answers.total() < len(asked):
                raise TimeoutError(f"{answers.total()} answers to {len(asked)} requests of a stream")
            return outcome

        return frozenset({OK}), run

    def given_up(self) -> Drawn:
        """A valid request that its client cancels or gives a deadline, usually too short."""
        is_query = self.rng.random() < 0.3
        indices = self._indices(1 if is_query else 60)
        message = infer_request([self.soak.expected.texts[i] for i in indices], is_query)
        patience, cancels = self.rng.choice((0.0005, 0.005, 0.02, 0.1)), self.rng.random() < 0.5

        async def run() -> Outcome:
            call = self.soak.infer(message, timeout=None if cancels else patience)
            if cancels:
                await asyncio.sleep(patience)
                call.cancel()
            try:
                response = await call
            except asyncio.CancelledError:
                if not call.cancelled():
                    raise
                return Outcome("CANCELLED")
            return Outcome(OK, rows=len(indices), wrong=self._num_wrong(_rows(response), indices, is_query, {}))

        return GIVEN_UP, run

    def hostile_bytes(self) -> Drawn:
        elements = [self.rng.randbytes(self.rng.randrange(self.rng.choice((4, 300, 20_000)))) for _ in range(3)]
        return self._infer(ANY_TEXT, [_raw("documents", [1, len(elements)], elements)])

    def hostile_unicode(self) -> Drawn:
        index = len(self.soak.expected.texts) - self.rng.randint(1, NUM_UNICODE)
        return self._known([index], self.rng.random() < 0.5, self._parameters())

    def hostile_inputs(self) -> Drawn:
        query, documents = _raw("query", [1], [b"q"]), _raw("documents", [1, 1], [b"d"])
        unknown = _raw(self.rng.choice(("text", "Query", "", "\x00")), [1], [b"q"])
        inputs = self.rng.choice(([], [query, documents], [unknown], [query, query], [documents, unknown]))
        return self._infer(INVALID, inputs)

    def hostile_shape(self) -> Drawn:
        name = self.rng.choice(("query", "documents"))
        fine = ([1],) if name == "query" else tuple([1, n] for n in range(1, 9))
        while (shape := [self.rng.randrange(-1, 4) for _ in range(self.rng.randint(0, 4))]) in fine:
            pass
        count = int(np.prod([max(n, 0) for n in shape])) if shape else 1
        return self._infer(INVALID, [_raw(name, shape, [b"x"] * count)])

    def hostile_type(self) -> Drawn:
        datatype = self.rng.choice(("INT32", "FP32", "BOOL", "UINT8", "FP16", "TEXT", ""))
        return self._infer(INVALID, [("query", datatype, [1], self.rng.randbytes(4))])

    def hostile_length(self) -> Drawn:
        """BYTES whose length prefixes lie."""
        content = struct.pack("<I", self.rng.choice((0xFFFFFFFF, 0x7FFFFFFF, 5, 1))) + self.rng.randbytes(3)
        return self._infer(INVALID, [("query", "BYTES", [1], content)])

    def hostile_parameter(self) -> Drawn:
        drawn = "_" + any_characters(self.rng, 40)
        name = self.rng.choice(("instruction", "truncate", "dimensions", "Truncate", "a" * 1000, "\x00", "", drawn))
        value: str | bool | int | float = self.rng.choice(
            (True, self.rng.randrange(-(2**63), 2**63), self.rng.uniform(-1e9, 1e9), "no", "END ", "\x00", drawn,
             any_characters(self.rng, 1000))
        )  # fmt: skip
        # Any string may be an instruction; one that leaves nothing of the text to pool is refused.
        right = ANY_TEXT if name == "instruction" and isinstance(value, str) else INVALID
        return self._infer(right, [_raw("query", [1], [b"q"])], {name: value})

    def hostile_size(self) -> Drawn:
        size = self.rng.choice(("long text", "long text refused", "many documents", "many bytes", "long instruction"))
        query, right = [_raw("query", [1], [b"word " * 20_000])], ANY_TEXT
        if size == "long text":
            return self._infer(right, query)
        if size == "long text refused":
            return self._infer(right, query, {"truncate": "NONE"})
        if size == "long instruction":
            return self._infer(right, [_raw("query", [1], [b"q"])], {"instruction": "word " * 5000})
        if not self.soak.has_small_limits:
            return self.hostile_inputs()
        elements = [b""] * 201 if size == "many documents" else [b"x" * 100_000] * 5
        return self._infer(INVALID, [_raw("documents", [1, len(elements)], elements)])

    def hostile_model(self) -> Drawn:
        message = infer_request(["q"], True)
        if self.rng.random() < 0.5:
            message.model_name = self.rng.choice(("", "other", "../nv-embed-v2", "n" * 5000))
        else:
            message.model_version = self.rng.choice(("0", "2", "x", "9" * 30))
        return frozenset({"NOT_FOUND", "INVALID_ARGUMENT"}), lambda: self._plain(message)

    def hostile_output(self) -> Drawn:
        message = infer_request(["q"], True, (self.rng.choice(("embedding", "", "\x00", "query")),))
        return INVALID, lambda: self._plain(message)

    def hostile_protobuf(self) -> Drawn:
        message = self.rng.randbytes(self.rng.choice((1, 10, 500)))
        if self.rng.random() < 0.5:  # almost right: a valid message with a few bytes changed
            body = bytearray(infer_request(["some text"], True).SerializeToString())
            for _ in range(3):
                body[self.rng.randrange(len(body))] = self.rng.randrange(256)
            message = bytes(body)

        async def run() -> Outcome:
            await self.soak.infer_bytes(message)
            return Outcome(OK)  # what was meant nobody knows, so nobody knows its vectors

        # Whatever is no message gRPC itself refuses as INTERNAL; a changed name may be an unknown model.
        return ANY_TEXT | {"INTERNAL", "NOT_FOUND", "UNIMPLEMENTED"}, run

    def hostile_http(self) -> Drawn:
        paths = (f"/v2/models/{MODEL_NAME}/infer", f"/v2/models/{self.rng.choice(('x', '..', '%00'))}/infer",
                 "/v2/" + "a" * 3000, "/", f"/v2/models/{MODEL_NAME}/versions/7/infer")  # fmt: skip
        bodies = (
            b"", b"{", b"null", b"[]", b"{}", self.rng.randbytes(100), b'{"inputs": 1}', b"[" * 2000,
            b'{"inputs":[{"name":"query","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}',
            b'{"inputs":[{"name":"query","shape":[1],"datatype":"BYTES","data":[7]}]}',
            b'{"inputs":[{"name":"query","shape":[-1],"datatype":"BYTES","data":[]}]}',
            b'{"inputs":[{"name":"query","shape":[1],"datatype":"BYTES"}]}',
        )  # fmt: skip
        path, body = self.rng.choice(paths), self.rng.choice(bodies)

        async def run() -> Outcome:
            status, answer = await self._post(path, body)
            return Outcome(f"HTTP {status}", answer[:200].decode("utf-8", "replace"))

        # Triton itself answers broken JSON with 500.
        return frozenset({"HTTP 400", "HTTP 404", "HTTP 405", "HTTP 414", "HTTP 500"}), run

    def hostile_socket(self) -> Drawn:
        """Raw bytes on a port, then a broken connection. No answer is due, so none is counted."""
        port = self.rng.choice((self.soak.grpc_port, self.soak.http_port or self.soak.grpc_port))
        content = self.rng.randbytes(self.rng.choice((0, 10, 2000)))
        if self.rng.random() < 0.5:
            content = b"POST /v2/models/x/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n" + content

        async def run() -> Outcome:
            try:
                _, writer = await asyncio.open_connection(self.soak.host, port)
            except ConnectionError:
                return Outcome(REFUSED)
            writer.write(content)
            writer.transport.abort()
            return Outcome("hung up")

        return frozenset({"hung up"}), run

    # Shares of all requests; valid and hostile weigh the same in all.
    KINDS = (
        ("valid_query", 40), ("valid_documents", 28), ("valid_bulk", 1), ("valid_http", 9), ("valid_stream", 6),
        ("given_up", 16),
        ("hostile_bytes", 16), ("hostile_unicode", 10), ("hostile_inputs", 10), ("hostile_shape", 12),
        ("hostile_type", 6), ("hostile_length", 8), ("hostile_parameter", 12), ("hostile_size", 2),
        ("hostile_model", 6), ("hostile_output", 4), ("hostile_protobuf", 6), ("hostile_http", 6),
        ("hostile_socket", 2),
    )  # fmt: skip

    def draw(self) -> tuple[str, frozenset[str], Callable[[], Awaitable[Outcome]]]:
        """The next request: kind, codes that are right, and what to do."""
        kinds = [(k, w) for k, w in self.KINDS if "http" not in k or self.soak.http_port]
        kind = self.rng.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
        right, run = getattr(self, kind)()
        return kind, right, run

    def _next_id(self) -> str:
        self.count += 1
        return f"{self.number}-{self.count}"

    def _indices(self, at_most: int) -> list[int]:
        return self.rng.choices(range(len(self.soak.expected.texts)), k=self.rng.randint(1, at_most))

    def _parameters(self) -> dict[str, str]:
        return self.rng.choice(({}, {}, {"truncate": "END"}, {"instruction": OTHER_INSTRUCTION}))

    def _known(self, indices: list[int], is_query: bool, parameters: dict[str, str]) -> Drawn:
        message = infer_request([self.soak.expected.texts[i] for i in indices], is_query)
        for name, value in parameters.items():
            message.parameters[name].string_param = value

        async def run() -> Outcome:
            message.id = self._next_id()
            response = await self.soak.infer(message)
            wrong = self._num_wrong(_rows(response), indices, is_query, parameters)
            return Outcome(OK, rows=len(indices), wrong=wrong, extra=int(response.id != message.id))

        return frozenset({OK}), run

    def _infer(self, right: frozenset[str], inputs: Sequence[Input], parameters: dict[str, Any] | None = None) -> Drawn:
        message = pb.ModelInferRequest(model_name=MODEL_NAME)
        for name, datatype, shape, content in inputs:
            message.inputs.add(name=name, datatype=datatype, shape=shape)
            message.raw_input_contents.append(content)
        message.outputs.add(name="embeddings")
        for name, value in (parameters or {}).items():
            kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
            kind = kinds[type(value)]
            setattr(message.parameters[name], kind, value)
        return right, lambda: self._plain(message)

    async def _plain(self, message: Any) -> Outcome:
        """A request whose vectors nobody knows beforehand: its rows must be unit vectors, but are not checked rows."""
        message.id = self._next_id()
        response = await self.soak.infer(message)
        rows = _rows(response)
        wrong = int((abs(np.linalg.norm(rows, axis=1) - 1) > 1e-3).sum()) if np.isfinite(rows).all() else len(rows)
        return Outcome(OK, wrong=wrong, extra=int(response.id != message.id))

    def _num_wrong(self, rows: Any, indices: list[int], is_query: bool, parameters: dict[str, str]) -> int:
        expected = self.soak.expected.queries if is_query else self.soak.expected.documents
        if "instruction" in parameters:
            expected = self.soak.expected.instructed
        if rows.shape != expected[indices].shape:
            return len(indices)
        return int((~(abs(rows - expected[indices]).max(axis=1) <= TOLERANCE)).sum())  # not finite is wrong too

    async def _post(self, path: str, body: bytes) -> tuple[int | str, bytes]:
        def post() -> tuple[int | str, bytes]:
            connection = http.client.HTTPConnection(
                self.soak.host, self.soak.http_port, timeout=self.soak.arguments.answer_seconds
            )
            try:
                connection.request("POST", path, body)
                response = connection.getresponse()
                return response.status, response.read()
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:  # refused or broken: that is an answer too
                return "broken", repr(error).encode()
            finally:
                connection.close()

        return await asyncio.get_running_loop().run_in_executor(self.soak.threads, post)


Drawn = tuple[frozenset[str], Callable[[], Awaitable[Outcome]]]
Input = tuple[str, str, list[int], bytes]


def _raw(name: str, shape: list[int], elements: Sequence[bytes]) -> Input:
    return name, "BYTES", shape, b"".join(len(e).to_bytes(4, "little") + e for e in elements)


def _rows(response: Any) -> Any:
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(tuple(response.outputs[0].shape))


# --- the run --------------------------------------------------------------------------------------------


class Soak:
    """Everything that one run shares."""

    def __init__(
        self, arguments: argparse.Namespace, url: str, http_port: int | None, root_pid: int | None, engine: Any
    ) -> None:
        self.arguments, self.url, self.http_port = arguments, url, http_port
        self.root_pid, self.engine = root_pid, engine  # of a server started here
        self.host, _, port = url.rpartition(":")
        self.grpc_port = int(port)
        self.has_small_limits = root_pid is not None
        self.tally = Tally()
        self.usages: list[Usage] = []
        self.kills: list[dict[str, Any]] = []
        self.threads = ThreadPoolExecutor(16)
        self.up = asyncio.Event()
        self.excused_until = 0.0
        self.server: int | None = None  # its pid; none: it is being killed, or runs elsewhere
        self.done = False
        self.expected: Expected
        self.judged_from = 0.0
        self.seconds = 0.0

    async def run(self) -> None:
        """All of it."""
        arguments = self.arguments
        async with grpc.aio.insecure_channel(self.url, options=CHANNEL_OPTIONS) as channel:
            parse = {"response_deserializer": pb.ModelInferResponse.FromString}
            self.infer = channel.unary_unary(METHOD, request_serializer=pb.ModelInferRequest.SerializeToString, **parse)
            self.infer_bytes = channel.unary_unary(METHOD, **parse)
            self.stream = channel.stream_stream(
                STREAM_METHOD,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )
            self.expected = await self._expect()
            self.up.set()
            self.server = None if self.root_pid is None else processes_of(self.root_pid).get("server")
            started = time.monotonic()
            helpers = [asyncio.ensure_future(self._watch())]
            if arguments.kills:
                helpers.append(asyncio.ensure_future(self._kill()))
            deadline = time.monotonic() + 60 * arguments.minutes
            await asyncio.gather(*(self._client(Client(self, n), deadline) for n in range(arguments.clients)))
            self.seconds = time.monotonic() - started
            self.done = True
            for helper in helpers:
                await helper
            # Quiet again: the server must still answer, and rightly.
            _, run = Client(self, -1).valid_query()
            try:
                outcome = await asyncio.wait_for(run(), arguments.answer_seconds)
                self.tally.wrong_rows += outcome.wrong
            except (grpc.aio.AioRpcError, asyncio.TimeoutError) as error:
                self.tally.unexpected[f"the last query: {error!r}"[:150]] += 1
        self.threads.shutdown(wait=False)

    async def _expect(self) -> Expected:
        texts = texts_of(random.Random(f"{self.arguments.seed} texts"))
        if self.engine is not None:
            return Expected(texts, *(self.engine.embed(texts, i) for i in (QUERY_INSTRUCTION, "", OTHER_INSTRUCTION)))

        async def ask(text: str, is_query: bool, instruction: str | None) -> Any:
            message = infer_request([text], is_query)
            if instruction is not None:
                message.parameters["instruction"].string_param = instruction
            return _rows(await self.infer(message))[0]

        async def ask_all(is_query: bool, instruction: str | None = None) -> Any:
            return np.stack([await ask(text, is_query, instruction) for text in texts])

        return Expected(texts, await ask_all(True), await ask_all(False), await ask_all(False, OTHER_INSTRUCTION))

    async def _client(self, client: Client, deadline: float) -> None:
        tally = self.tally
        while tally.requests < self.arguments.requests and time.monotonic() < deadline:
            kind, right, run = client.draw()
            tally.requests += 1
            tally.hostile += kind.startswith("hostile")
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
                progress(f"unanswered: {kind}")
                continue
            tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - started)
            tally.codes[outcome.code] += 1
            tally.checked_rows += outcome.rows
            tally.wrong_rows += outcome.wrong
            tally.answered_twice += outcome.extra
            if outcome.wrong:
                progress(f"wrong rows: {outcome.wrong} of {kind}")
            if outcome.code not in right | BUSY:
                if self._is_excused(outcome.code, started):
                    tally.around_kills += 1
                    await asyncio.sleep(0.5)
                else:
                    tally.unexpected[f"{kind}: {outcome.code}: {outcome.message[:150]}"] += 1
            if outcome.code in BUSY | {REFUSED}:
                await asyncio.sleep(0.05)
            if not self.up.is_set():  # a server that is down would eat up all requests
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.up.wait(), deadline - time.monotonic())

    def _is_excused(self, code: str, started: float) -> bool:
        """Whether a kill explains this answer to a request of that moment."""
        return code in GOING_DOWN and started < self.excused_until

    def _notice(self, server: int) -> None:
        """A server that is another one than the last, though nobody ended that, replaces one that ended unasked."""
        if self.server not in (None, server):
            self.tally.unasked_ends += 1
            progress("the server ended unasked")
            self.server = server

    async def _watch(self) -> None:
        """Once a second: memory, and whether the server is there."""
        while not self.done:
            if self.root_pid is not None:
                ready = await self._is_ready()
                (self.up.set if ready else self.up.clear)()
                if ready and (usage := memory_of(self.root_pid)) is not None:
                    self.usages.append(usage)
                    self._notice(usage.pid)
            await asyncio.sleep(1)
        self.up.set()

    async def _is_ready(self) -> bool:
        assert self.http_port is not None
        return await asyncio.get_running_loop().run_in_executor(self.threads, is_ready, self.http_port)

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
            pids = processes_of(self.root_pid or 0)
            if self.done or whom not in pids:
                break
            await self._kill_once(pids, whom, with_signal)
        self.judged_from = time.monotonic()

    async def _kill_once(self, pids: dict[str, int], whom: str, with_signal: signal.Signals) -> None:
        """One kill, until another server is ready; what breaks from before the signal until after that is excused."""
        self._notice(pids["server"])
        killed, self.server, self.excused_until = time.monotonic(), None, float("inf")
        os.kill(pids[whom], with_signal)
        while not self.done:
            await asyncio.sleep(0.2)
            server = processes_of(self.root_pid or 0).get("server")
            if server not in (None, pids["server"]) and await self._is_ready():
                break
        else:
            return  # and the number of kills in the report is not the one asked for
        seconds = time.monotonic() - killed
        self.kills.append({"whom": whom, "signal": with_signal.name, "seconds_until_ready": round(seconds, 1)})
        progress(f"kill {len(self.kills)}: {whom} {with_signal.name}, ready again after {seconds:.1f} s")
        self.server = server
        self.up.set()
        self.excused_until = time.monotonic() + GRACE_SECONDS


# --- memory ---------------------------------------------------------------------------------------------


def processes_of(root: int) -> dict[str, int]:
    """Pids of the tritonserver and of the model's process below serve.sh."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, rest = (entry / "stat").read_text().rsplit(")", 1)
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(rest.split()[1])
            names[int(entry.name)] = name.partition("(")[2]
    found = {}
    for pid, name in names.items():
        kind = {"tritonserver": "server", "triton_python_b": "worker"}.get(name)
        ancestor = pid
        while kind and ancestor > 1 and ancestor != root:
            ancestor = parents.get(ancestor, 0)
        if kind and ancestor == root:
            found[kind] = pid
    return found


def memory_of(root: int) -> Usage | None:
    """Of the server below serve.sh; None while it is not complete."""
    pids = processes_of(root)
    try:
        sizes = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for pid in (pids["server"], pids["worker"])
        ]
        maps = Path(f"/proc/{pids['worker']}/maps").read_text(encoding="utf-8", errors="replace")
        regions = frozenset(Path("/dev/shm/" + part.split()[0]) for part in maps.split(" /dev/shm/")[1:])
        shm = sum(region.stat().st_blocks * 512 for region in regions)
    except (KeyError, OSError):
        return None
    return Usage(time.monotonic(), pids["server"], sizes[0], sizes[1], shm, regions)


def growth(usages: Sequence[Usage], since: float) -> dict[str, Any]:
    """Of the server's last life after `since`: medians of the second and of the last quarter of its samples."""
    if not usages:
        return {}
    life = [u for u in usages if u.pid == usages[-1].pid and u.at >= since]
    if len(life) < MIN_MEMORY_SAMPLES:
        return {"samples": len(life)}
    quarter = len(life) // 4
    early, late = life[quarter : 2 * quarter], life[-quarter:]
    result: dict[str, Any] = {"samples": len(life), "seconds": round(life[-1].at - life[0].at)}
    for name in ("server", "worker", "shm"):
        before, after = (float(np.median([getattr(u, name) for u in part])) for part in (early, late))
        result[name] = {
            "before_mib": round(before / 2**20, 1),
            "after_mib": round(after / 2**20, 1),
            "growth": round(after / before - 1, 4) if before else 0.0,
        }
    return result


# --- what is reported -----------------------------------------------------------------------------------


def report(soak: Soak) -> dict[str, Any]:
    """Print the table; return what the last line says."""
    tally = soak.tally
    memory = growth(soak.usages, soak.judged_from)
    flat = all(memory[name]["growth"] < MEMORY_GROWTH_LIMIT for name in ("server", "worker", "shm") if name in memory)
    failures = tally.unanswered + tally.answered_twice + tally.wrong_rows + tally.unexpected.total()
    complete = len(soak.kills) == soak.arguments.kills
    slowest = max((kill["seconds_until_ready"] for kill in soak.kills), default=0.0)
    left_behind = sum(region.exists() for region in {region for usage in soak.usages for region in usage.regions})
    rows: list[tuple[str, object]] = [
        ("requests", tally.requests),
        ("of them hostile", tally.hostile),
        ("seconds", round(soak.seconds)),
        ("kills", len(soak.kills)),
        ("slowest restart after a kill, s", slowest),
        ("ends of the server unasked", tally.unasked_ends),
        ("unanswered", tally.unanswered),
        ("answered twice", tally.answered_twice),
        ("rows checked", tally.checked_rows),
        ("wrong rows", tally.wrong_rows),
        ("wrong codes", tally.unexpected.total()),
        ("errors that a kill excuses", tally.around_kills),
        ("longest wait for an answer, s", round(tally.longest_seconds, 1)),
        ("files left behind in /dev/shm", left_behind),
    ]
    rows += [(f"answers {code}", count) for code, count in tally.codes.most_common()]
    for name in ("server", "worker", "shm"):
        if name in memory:
            m = memory[name]
            rows.append((f"memory of {name}, MiB", f"{m['before_mib']} to {m['after_mib']}: {m['growth']:+.1%}"))
    if "server" not in memory:
        rows.append(("memory", "not judged: the last life of the server was too short, or the server runs elsewhere"))
    for key, value in rows:
        print(f"{key:<32} {value}")
    for key, count in tally.unexpected.most_common(20):
        print(f"wrong code, {count} times: {key!a}")
    return {
        "benchmark": "soak",
        "passed": failures + left_behind + tally.unasked_ends == 0
        and flat
        and complete
        and slowest <= soak.arguments.restart_seconds,
        "requests": tally.requests,
        "hostile": tally.hostile,
        "seconds": round(soak.seconds, 1),
        "unanswered": tally.unanswered,
        "answered_twice": tally.answered_twice,
        "checked_rows": tally.checked_rows,
        "wrong_rows": tally.wrong_rows,
        "wrong_codes": dict(tally.unexpected),
        "excused_by_kills": tally.around_kills,
        "longest_seconds": round(tally.longest_seconds, 2),
        "codes": dict(tally.codes),
        "kinds": dict(tally.kinds),
        "kills": soak.kills,
        "slowest_restart_seconds": slowest,
        "unasked_ends": tally.unasked_ends,
        "memory": memory,
        "memory_judged": "server" in memory,
        "shm_files_left_behind": left_behind,
        "seed": soak.arguments.seed,
    }


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
    parser.add_argument("--device", default="cpu", help="of the server started here (%(default)s)")
    parser.add_argument("--log", type=Path, help="of the server started here (none: a temporary file)")
    arguments = parser.parse_args(argv)
    if arguments.url and arguments.kills:
        parser.error("--kills: expected a server that is started here; leave --url out")
    return arguments


async def soak_server(arguments: argparse.Namespace, *server: Any) -> Soak:
    soak = Soak(arguments, *server)
    await soak.run()
    return soak


def main() -> int:
    arguments = parse()
    end_on_sigterm()
    with ExitStack() as stack:
        if arguments.url:
            server: tuple[Any, ...] = (arguments.url, arguments.http_port, None, None)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            os.environ |= LIMITS  # the engine reads the longest text from them too
            engine = BareEngine(arguments.checkpoint, arguments.device)
            stack.callback(engine.stop)
            settings = {"MODEL_PATH": str(arguments.checkpoint), "DEVICE": arguments.device}
            if arguments.kills:
                settings |= {"RESTART": "always", "MAX_DELAY_SECONDS": "1"}
            progress("starting the server")
            process, ports = stack.enter_context(started_server(settings, arguments.log or folder / "server.log"))
            server = (f"127.0.0.1:{ports.grpc}", ports.http, process.pid, engine)
        soak = asyncio.run(soak_server(arguments, *server))
    result = report(soak)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
