"""The client for code without an event loop; may be used by many threads at once."""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from nv_embed_client.core import Core, as_method_of
from nv_embed_client.exchange import Plan

P = ParamSpec("P")
R = TypeVar("R")


def _carried_out(plan: Callable[Concatenate[Core, P], Plan[R]]) -> Callable[Concatenate[NVEmbedClient, P], R]:
    """A plan as a method of the sync client, with the same arguments."""

    def method(self: NVEmbedClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(plan(self, *args, **kwargs))

    as_method_of("NVEmbedClient", method, plan)
    return method


class NVEmbedClient(Core):
    """NV-Embed-v2 at the other end of a gRPC connection.

    with NVEmbedClient("localhost:8001") as client:
        scores = client.embed_query("...") @ client.embed_documents(["...", "..."]).T

    Its arguments are the fields of `Settings`. Every method raises `NVEmbedError` and nothing else on purpose; `errors`
    has the tree. A forked child may use the client of its parent: it makes a connection of its own. Fork while no call
    is on its way, because gRPC may abort the child otherwise.
    """

    embed_query = _carried_out(Core._embed_query)
    embed_queries = _carried_out(Core._embed_queries)
    embed_documents = _carried_out(Core._embed_documents)
    embed = _carried_out(Core._embed)
    dimension = _carried_out(Core._dimension)
    model_info = _carried_out(Core._model_info)
    is_ready = _carried_out(Core._is_ready)
    wait_until_ready = _carried_out(Core._wait_until_ready)

    def close(self) -> None:
        """Give up what is on its way and the connection."""
        self._close()

    def __enter__(self) -> NVEmbedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, plan: Plan[R]) -> R:
        arrivals: queue.SimpleQueue[int] = queue.SimpleQueue()
        with self._exchange(plan, arrivals.put) as exchange:
            while (seconds := exchange.advance()) is not None:
                try:
                    number = arrivals.get(timeout=seconds)
                except queue.Empty:
                    continue
                self._receive(exchange, number)
            return exchange.result
