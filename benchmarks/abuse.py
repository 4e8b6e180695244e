"""Requests, half of them hostile, each with the codes that are right for it, and its answer judged.

Knows nothing of kills, which excuse other codes, nor of what is counted.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from loads import WORDS, infer_request
from tritonclient.grpc import service_pb2 as pb

NUM_UNICODE = 60
OTHER_INSTRUCTION = "Instruct: Retrieve semantically similar text\nQuery: "
TOLERANCE = 1e-4  # of one element of a unit vector; batches differ from single texts by about 1e-6
OK = "OK"
INVALID = frozenset({"INVALID_ARGUMENT", "HTTP 400"})
BUSY = frozenset({"UNAVAILABLE", "HTTP 503"})
STREAM_ERROR = "stream error"
REFUSED = "connection refused"  # on gRPC, whose own code for it is that of a busy server
ANY_TEXT = frozenset({OK, "HTTP 200"}) | INVALID  # nobody can say beforehand whether random bytes are a valid text
GIVEN_UP = frozenset({OK, "DEADLINE_EXCEEDED", "CANCELLED"})


@dataclass(slots=True)
class Expected:
    """Vectors of the texts that valid requests are made of."""

    texts: list[str]
    queries: Any  # [texts, dim], the model's own instruction
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


@dataclass(frozen=True, slots=True)
class Target:
    """The model that requests are put on, its server, and what is known of it."""

    model_name: str
    host: str
    grpc_port: int
    http_port: int | None  # None: no HTTP requests
    infer: Any  # calls of gRPC: a message to its answer,
    infer_bytes: Any  # bytes that need not be a message to an answer,
    stream: Any  # messages to answers
    threads: Executor  # for HTTP
    expected: Expected
    has_small_limits: bool
    seed: int
    answer_seconds: float  # until a request counts as unanswered


@dataclass(slots=True)
class Outcome:
    """How a request ended: a code, a message, and whether its rows were what they should be."""

    code: str
    message: str = ""
    rows: int = 0
    wrong: int = 0
    extra: int = 0  # answers beyond one for each request


class Client:
    """Draws requests and judges their answers; one for each concurrent client, on one model."""

    def __init__(self, target: Target, number: int) -> None:
        self.target, self.number, self.count = target, number, 0
        self.rng = random.Random(f"{target.seed} client {number}")

    # Every method named as a kind returns the codes that are right for it and the coroutine that does it.

    def valid_query(self) -> Drawn:
        index = self.rng.randrange(len(self.target.expected.texts))
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
            "data": [self.target.expected.texts[i] for i in indices],
        }  # fmt: skip
        body = json.dumps({"inputs": [tensor], "outputs": [{"name": "embeddings"}]}).encode()

        async def run() -> Outcome:
            status, answer = await self._post(f"/v2/models/{self.target.model_name}/infer", body)
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
            message = self._request([self.target.expected.texts[i] for i in indices], is_query)
            message.id = self._next_id()
            asked[message.id] = (indices, is_query)
            requests.append(message)

        async def run() -> Outcome:
            outcome, answers = Outcome(OK), Counter[str]()

            async def send() -> AsyncIterator[Any]:
                for message in requests:
                    yield message

            async for answer in self.target.stream(send()):
                response = answer.infer_response
                answers[response.id] += 1
                if answer.error_message:
                    # A stream's errors carry no code; of the model's messages those of UNAVAILABLE alone say to retry.
                    outcome.code = "UNAVAILABLE" if "retry" in answer.error_message else STREAM_ERROR
                    outcome.message = answer.error_message
                elif response.id in asked:
                    indices, is_query = asked[response.id]
                    outcome.rows += len(indices)
                    outcome.wrong += self._num_wrong(rows_of(response), indices, is_query, {})
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
        message = self._request([self.target.expected.texts[i] for i in indices], is_query)
        patience, cancels = self.rng.choice((0.0005, 0.005, 0.02, 0.1)), self.rng.random() < 0.5

        async def run() -> Outcome:
            call = self.target.infer(message, timeout=None if cancels else patience)
            if cancels:
                await asyncio.sleep(patience)
                call.cancel()
            try:
                response = await call
            except asyncio.CancelledError:
                if not call.cancelled():
                    raise
                return Outcome("CANCELLED")
            return Outcome(OK, rows=len(indices), wrong=self._num_wrong(rows_of(response), indices, is_query, {}))

        return GIVEN_UP, run

    def hostile_bytes(self) -> Drawn:
        elements = [self.rng.randbytes(self.rng.randrange(self.rng.choice((4, 300, 20_000)))) for _ in range(3)]
        return self._infer(ANY_TEXT, [_raw("documents", [1, len(elements)], elements)])

    def hostile_unicode(self) -> Drawn:
        index = len(self.target.expected.texts) - self.rng.randint(1, NUM_UNICODE)
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
        long = [_raw("query", [1], [b"word " * 20_000])]
        drawn: list[tuple[frozenset[str], list[Input], dict[str, Any]]] = [
            (ANY_TEXT, long, {}),
            (ANY_TEXT, long, {"truncate": "NONE"}),
            (ANY_TEXT, [_raw("query", [1], [b"q"])], {"instruction": "word " * 5000}),
        ]
        if self.target.has_small_limits:
            drawn += [(INVALID, [_raw("documents", [1, 201], [b""] * 201)], {}),
                      (INVALID, [_raw("documents", [1, 5], [b"x" * 100_000] * 5)], {})]  # fmt: skip
        return self._infer(*self.rng.choice(drawn))

    def hostile_model(self) -> Drawn:
        message = self._request(["q"], True)
        if self.rng.random() < 0.5:
            message.model_name = self.rng.choice(("", "other", "../nv-embed-v2", "n" * 5000))
        else:
            message.model_version = self.rng.choice(("0", "2", "x", "9" * 30))
        return frozenset({"NOT_FOUND", "INVALID_ARGUMENT"}), lambda: self._plain(message)

    def hostile_output(self) -> Drawn:
        message = self._request(["q"], True, (self.rng.choice(("embedding", "", "\x00", "query")),))
        return INVALID, lambda: self._plain(message)

    def hostile_protobuf(self) -> Drawn:
        message = self.rng.randbytes(self.rng.choice((1, 10, 500)))
        if self.rng.random() < 0.5:  # almost right: a valid message with a few bytes changed
            body = bytearray(self._request(["some text"], True).SerializeToString())
            for _ in range(3):
                body[self.rng.randrange(len(body))] = self.rng.randrange(256)
            message = bytes(body)

        async def run() -> Outcome:
            await self.target.infer_bytes(message)
            return Outcome(OK)  # what was meant nobody knows, so nobody knows its vectors

        # Whatever is no message gRPC itself refuses as INTERNAL; a changed name may be an unknown model.
        return ANY_TEXT | {"INTERNAL", "NOT_FOUND", "UNIMPLEMENTED"}, run

    def hostile_http(self) -> Drawn:
        model = f"/v2/models/{self.target.model_name}"
        paths = (f"{model}/infer", f"/v2/models/{self.rng.choice(('x', '..', '%00'))}/infer",
                 "/v2/" + "a" * 3000, "/", f"{model}/versions/7/infer")  # fmt: skip
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
        port = self.rng.choice((self.target.grpc_port, self.target.http_port or self.target.grpc_port))
        content = self.rng.randbytes(self.rng.choice((0, 10, 2000)))
        if self.rng.random() < 0.5:
            content = b"POST /v2/models/x/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n" + content

        async def run() -> Outcome:
            try:
                _, writer = await asyncio.open_connection(self.target.host, port)
            except ConnectionError:
                return Outcome(REFUSED)
            writer.write(content)
            writer.transport.abort()
            return Outcome("hung up")

        return frozenset({"hung up"}), run

    # Shares of all requests; valid and hostile weigh the same in all.
    KINDS: ClassVar = {
        "valid_query": 40, "valid_documents": 28, "valid_bulk": 1, "valid_http": 9, "valid_stream": 6, "given_up": 16,
        "hostile_bytes": 16, "hostile_unicode": 10, "hostile_inputs": 10, "hostile_shape": 12, "hostile_type": 6,
        "hostile_length": 8, "hostile_parameter": 12, "hostile_size": 2, "hostile_model": 6, "hostile_output": 4,
        "hostile_protobuf": 6, "hostile_http": 6, "hostile_socket": 2,
    }  # fmt: skip

    def draw(self) -> tuple[str, frozenset[str], Callable[[], Awaitable[Outcome]]]:
        """The next request: kind, codes that are right, and what to do."""
        kinds = [kind for kind in self.KINDS if "http" not in kind or self.target.http_port]
        kind = self.rng.choices(kinds, [self.KINDS[kind] for kind in kinds])[0]
        right, run = getattr(self, kind)()
        return kind, right, run

    def _request(self, texts: Sequence[str], is_query: bool, outputs: Sequence[str] = ("embeddings",)) -> Any:
        return infer_request(texts, is_query, outputs, self.target.model_name)

    def _next_id(self) -> str:
        self.count += 1
        return f"{self.number}-{self.count}"

    def _indices(self, at_most: int) -> list[int]:
        return self.rng.choices(range(len(self.target.expected.texts)), k=self.rng.randint(1, at_most))

    def _parameters(self) -> dict[str, str]:
        return self.rng.choice(({}, {}, {"truncate": "END"}, {"instruction": OTHER_INSTRUCTION}))

    def _known(self, indices: list[int], is_query: bool, parameters: dict[str, str]) -> Drawn:
        message = self._request([self.target.expected.texts[i] for i in indices], is_query)
        for name, value in parameters.items():
            message.parameters[name].string_param = value

        async def run() -> Outcome:
            message.id = self._next_id()
            response = await self.target.infer(message)
            wrong = self._num_wrong(rows_of(response), indices, is_query, parameters)
            return Outcome(OK, rows=len(indices), wrong=wrong, extra=int(response.id != message.id))

        return frozenset({OK}), run

    def _infer(self, right: frozenset[str], inputs: Sequence[Input], parameters: dict[str, Any] | None = None) -> Drawn:
        message = pb.ModelInferRequest(model_name=self.target.model_name)
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
        response = await self.target.infer(message)
        rows = rows_of(response)
        wrong = int((abs(np.linalg.norm(rows, axis=1) - 1) > 1e-3).sum()) if np.isfinite(rows).all() else len(rows)
        return Outcome(OK, wrong=wrong, extra=int(response.id != message.id))

    def _num_wrong(self, rows: Any, indices: list[int], is_query: bool, parameters: dict[str, str]) -> int:
        expected = self.target.expected.queries if is_query else self.target.expected.documents
        if "instruction" in parameters:
            expected = self.target.expected.instructed
        if rows.shape != expected[indices].shape:
            return len(indices)
        return int((~(abs(rows - expected[indices]).max(axis=1) <= TOLERANCE)).sum())  # not finite is wrong too

    async def _post(self, path: str, body: bytes) -> tuple[int | str, bytes]:
        def post() -> tuple[int | str, bytes]:
            connection = http.client.HTTPConnection(
                self.target.host, self.target.http_port, timeout=self.target.answer_seconds
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

        return await asyncio.get_running_loop().run_in_executor(self.target.threads, post)


Drawn = tuple[frozenset[str], Callable[[], Awaitable[Outcome]]]
Input = tuple[str, str, list[int], bytes]


def _raw(name: str, shape: list[int], elements: Sequence[bytes]) -> Input:
    return name, "BYTES", shape, b"".join(len(e).to_bytes(4, "little") + e for e in elements)


def rows_of(response: Any) -> Any:
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(tuple(response.outputs[0].shape))
