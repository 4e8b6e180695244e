"""The client for code in an event loop; any number of tasks, of any number of loops, may use it at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from nv_embed_client.core import Core, as_method_of
from nv_embed_client.exchange import Plan

P = ParamSpec("P")
R = TypeVar("R")


def _awaited(
    plan: Callable[Concatenate[Core, P], Plan[R]],
) -> Callable[Concatenate[AsyncNVEmbedClient, P], Coroutine[Any, Any, R]]:
    """A plan as a method of the async client, with the same arguments."""

    async def method(self: AsyncNVEmbedClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(plan(self, *args, **kwargs))

    as_method_of("AsyncNVEmbedClient", method, plan)
    return method


class AsyncNVEmbedClient(Core):
    """`NVEmbedClient` for asyncio: the same settings, methods and errors, to be awaited.

    async with AsyncNVEmbedClient("localhost:8001") as client:
        scores = await client.embed_query("...") @ (await client.embed_documents(["...", "..."])).T

    Cancelling a call cancels its requests on the server too.
    """

    embed_query = _awaited(Core._embed_query)
    embed_queries = _awaited(Core._embed_queries)
    embed_documents = _awaited(Core._embed_documents)
    embed = _awaited(Core._embed)
    dimension = _awaited(Core._dimension)
    model_info = _awaited(Core._model_info)
    is_ready = _awaited(Core._is_ready)
    wait_until_ready = _awaited(Core._wait_until_ready)

    async def close(self) -> None:
        """Give up what is on its way and the connection."""
        self._close()

    async def __aenter__(self) -> AsyncNVEmbedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, plan: Plan[R]) -> R:
        loop = asyncio.get_running_loop()
        arrivals: deque[int] = deque()
        awake: asyncio.Future[None] = loop.create_future()

        def arrived_here(number: int) -> None:
            arrivals.append(number)
            if not awake.done():
                awake.set_result(None)

        def arrived(number: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the call with it
                loop.call_soon_threadsafe(arrived_here, number)

        with self._exchange(plan, arrived) as exchange:
            while (seconds := exchange.advance()) is not None:
                if not arrivals:
                    awake = loop.create_future()
                    # Not asyncio.wait_for: before Python 3.12 a task that is cancelled as something arrives goes on.
                    await asyncio.wait([awake], timeout=seconds)
                if arrivals:
                    self._receive(exchange, arrivals.popleft())
            return exchange.result
