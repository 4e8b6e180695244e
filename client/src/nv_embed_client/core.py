"""What both clients do, each method once, as a plan. The clients differ only in how they carry out a plan."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from nv_embed_client import flow
from nv_embed_client.connection import Connection, Settings
from nv_embed_client.embedding_type import Embeddings, EmbeddingType, packed
from nv_embed_client.errors import ClientClosed, ServerFailure
from nv_embed_client.exchange import Exchange, Plan, Together, alone
from nv_embed_client.flow import Deadline
from nv_embed_client.grpc_transport import GrpcTransport
from nv_embed_client.job import Call, Job
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.transport import Transport
from nv_embed_client.wire import EmbedResult, InputType, Truncate

T = TypeVar("T")

_CLOSED = -1  # arrives when the client is closed; requests have numbers from 0


def as_method_of(name: str, method: Callable[..., Any], plan: Callable[..., Any]) -> None:
    """Have the method of a client that carries out a plan look like it: its documentation and its arguments."""
    functools.update_wrapper(method, plan)
    method.__name__ = plan.__name__.removeprefix("_")
    method.__qualname__ = f"{name}.{method.__name__}"
    signature = inspect.signature(plan)
    returned = str(signature.return_annotation).removeprefix("Plan[").removesuffix("]")
    vars(method)["__signature__"] = signature.replace(return_annotation=returned)


class Core(Settings):
    """The settings of a client, its transport, and the plans of its methods.

    A copy, also one that was pickled, has the settings and makes a connection of its own.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._closed = False
        self._known_dimension: int | None = None
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_link", "_calls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def _connect(self) -> None:
        self._link: Transport = self.transport or GrpcTransport(
            Connection(self.url, self.model_name, self.tls, self.headers)
        )
        self._calls: set[Callable[[int], None]] = set()  # how the calls on their way are told that something arrived

    def _embed_query(
        self,
        text: str,
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        timeout: float | None = None,
        embedding_type: EmbeddingType = "float",
    ) -> Plan[Embeddings]:
        """One query with the standard instruction before it, or with `instruction`: [1, dim]."""
        call = Call("query", instruction, truncate, timeout=timeout, embedding_type=embedding_type)
        return (yield from self._embed_as(call, [text])).embeddings

    def _embed_queries(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        progress: bool = False,
        timeout: float | None = None,
        embedding_type: EmbeddingType = "float",
    ) -> Plan[Embeddings]:
        """Any number of queries, each embedded as `embed_query` does: [n, dim], in input order."""
        call = Call("query", instruction, truncate, progress=progress, timeout=timeout, embedding_type=embedding_type)
        return (yield from self._embed_as(call, texts)).embeddings

    def _embed_documents(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        progress: bool = False,
        timeout: float | None = None,
        embedding_type: EmbeddingType = "float",
    ) -> Plan[Embeddings]:
        """Any number of documents, without instruction unless one is given: [n, dim], in input order."""
        call = Call("passage", instruction, truncate, progress=progress, timeout=timeout, embedding_type=embedding_type)
        return (yield from self._embed_as(call, texts)).embeddings

    def _embed(
        self,
        texts: Iterable[str],
        *,
        input_type: InputType = "passage",
        instruction: str | None = None,
        truncate: Truncate = "END",
        token_counts: bool = False,
        progress: bool = False,
        timeout: float | None = None,
        max_texts_per_request: int | None = None,
        embedding_type: EmbeddingType = "float",
        is_truncated: bool = False,
    ) -> Plan[EmbedResult]:
        """Any number of texts, with every option; the other methods use this one.

        Args:
            texts: any iterable of any length; it is read as requests are sent.
            input_type: "query" puts the standard instruction before each text.
            instruction: replaces that of either type. It is the whole text before each text, template included.
            truncate: "END" cuts a text that is too long for the model, "NONE" has it refused.
            token_counts: also give the tokens of each text.
            progress: show a progress bar.
            timeout: seconds for the whole call; by default each of its requests has the client's `request_timeout`.
            max_texts_per_request: instead of the client's.
            embedding_type: "float16", "int8", "uint8", "binary" or "ubinary" for smaller vectors, see docs/vectors.md.
            is_truncated: also say which texts were cut.

        Raises:
            PartialFailure: some texts have embeddings and others do not. It holds the embeddings and names the others.
            ServerTooOld: the server knows neither this `embedding_type` nor `is_truncated`.
            NVEmbedError: no text has an embedding.
        """
        call = Call(
            input_type, instruction, truncate, token_counts, progress, timeout, max_texts_per_request, embedding_type,
            is_truncated,
        )  # fmt: skip
        return (yield from self._embed_as(call, texts))

    def _dimension(self, timeout: float | None = None) -> Plan[int]:
        """Numbers of an embedding; asks the server once, within `timeout` seconds.

        A server that is too old for `model_info` is asked by embedding a text.
        """
        if self._known_dimension is None:
            info = yield from self._asked_info(timeout)
            if info is None:
                yield from self._embed_as(Call(timeout=timeout), [""])
            else:
                self._known_dimension = info.dimension
        assert self._known_dimension is not None
        return self._known_dimension

    def _model_info(self, timeout: float | None = None) -> Plan[ModelInfo]:
        """What the model is and what holds now; asks the server each time, within `timeout` seconds.

        A busy server answers at once, too.

        Raises:
            ServerFailure: the server is too old to say.
        """
        info = yield from self._asked_info(timeout)
        if info is None:
            raise ServerFailure("expected a server that describes its model; got an older one; update the server")
        return info

    def _asked_info(self, timeout: float | None) -> Plan[ModelInfo | None]:
        call = Call(timeout=timeout)  # which says what is wrong with it
        deadline = Deadline.after(self.request_timeout if call.timeout is None else call.timeout)
        return (yield from alone(flow.model_info(deadline, self.retry)))

    def _is_ready(self) -> Plan[bool]:
        """Whether the server answers and the model is loaded."""
        return (yield from alone(flow.probe()))

    def _wait_until_ready(self, timeout: float = 600.0) -> Plan[None]:
        """Return as soon as the model is ready.

        Raises:
            DeadlineExceeded: it is not within `timeout` seconds.
        """
        yield from alone(flow.wait_until_ready(Deadline.after(timeout), self.url))

    def _embed_as(self, call: Call, texts: Iterable[str]) -> Plan[EmbedResult]:
        job = Job(texts, call, self)
        try:
            yield Together((job.flow(chunk) for chunk in job.chunks()), self.max_in_flight, job.record)
            result = job.result()
        finally:
            job.close()
        if result is None:
            nothing = np.empty((0, (yield from self._dimension(call.timeout))), np.float32)
            return EmbedResult(
                packed(nothing, call.embedding_type),
                np.empty(0, np.int32) if call.token_counts else None,
                np.empty(0, np.bool_) if call.is_truncated else None,
            )
        if call.embedding_type not in ("binary", "ubinary"):  # whose rows are shorter
            self._known_dimension = result.embeddings.shape[1]
        return result

    @contextmanager
    def _exchange(self, plan: Plan[T], arrived: Callable[[int], None]) -> Iterator[Exchange[T]]:
        """A call on its way, which closing the client ends."""
        self._calls.add(arrived)
        exchange = Exchange(plan, self._link, arrived)
        try:
            self._check_open()
            yield exchange
        finally:
            self._calls.discard(arrived)
            exchange.close()

    def _receive(self, exchange: Exchange[T], number: int) -> None:
        if number == _CLOSED:
            raise ClientClosed("expected an open client; got one that was closed meanwhile; make a new one")
        exchange.receive(number)

    def _close(self) -> None:
        self._closed = True
        for arrived in tuple(self._calls):
            arrived(_CLOSED)
        self._link.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("expected an open client; got one that was closed; make a new one")
