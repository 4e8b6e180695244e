"""The client for code in an event loop; any number of tasks of that loop may use it at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nv_embed_client import flow
from nv_embed_client.chunking import Chunk
from nv_embed_client.core import ClientCore, empty_result
from nv_embed_client.errors import ClientClosed
from nv_embed_client.flow import AskReady, Deadline, Flow, Send, Step, T
from nv_embed_client.job import InputType, Job, Outcome, Truncate
from nv_embed_client.wire import EmbedResult


class AsyncNVEmbedClient(ClientCore):
    """`NVEmbedClient` for asyncio: the same settings, methods and errors, to be awaited.

    async with AsyncNVEmbedClient("localhost:8001") as client:
        scores = await client.embed_query("...") @ (await client.embed_documents(["...", "..."])).T

    It belongs to the event loop of its first use. Cancelling a call cancels its requests on the server too.
    """

    def _prepare(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._triton_or_none: InferenceServerClient | None = None

    async def embed_query(
        self,
        text: str,
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """One query with the standard instruction before it, or with `instruction`: [1, dim]."""
        result = await self.embed(
            [text], input_type="query", instruction=instruction, truncate=truncate, timeout=timeout
        )
        return result.embeddings

    async def embed_queries(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        progress: bool = False,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Any number of queries, each as `embed_query` has it: [n, dim], in input order."""
        result = await self.embed(
            texts,
            input_type="query",
            instruction=instruction,
            truncate=truncate,
            progress=progress,
            timeout=timeout,
        )
        return result.embeddings

    async def embed_documents(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        progress: bool = False,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Any number of documents, without instruction unless one is given: [n, dim], in input order."""
        result = await self.embed(texts, instruction=instruction, truncate=truncate, progress=progress, timeout=timeout)
        return result.embeddings

    async def embed(
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
    ) -> EmbedResult:
        """What the other methods are made of; arguments and errors as `NVEmbedClient.embed`."""
        job = self._job(
            texts,
            input_type=input_type,
            instruction=instruction,
            truncate=truncate,
            token_counts=token_counts,
            progress=progress,
            timeout=timeout,
            max_texts_per_request=max_texts_per_request,
        )
        try:
            await self._run_job(job)
            result = job.result()
        finally:
            job.close()
        if result is None:
            return empty_result(await self.dimension(timeout), token_counts=token_counts)
        return self._remember(result)

    async def dimension(self, timeout: float | None = None) -> int:
        """Of the embeddings; asks the server once, by embedding one text, within `timeout` seconds."""
        if self._dimension is None:
            await self.embed([""], timeout=timeout)
        assert self._dimension is not None
        return self._dimension

    async def is_ready(self) -> bool:
        """Whether the server answers and the model is loaded."""
        self._check_open()
        return await self._run(flow.probe())

    async def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Return as soon as the model is ready.

        Raises:
            DeadlineExceeded: it is not within `timeout` seconds.
        """
        self._check_open()
        await self._run(flow.wait_until_ready(Deadline.after(timeout), self.url))

    async def close(self) -> None:
        """Give up what is on its way and the connection."""
        self._closed = True
        if self._triton_or_none is not None:
            await self._triton_or_none.close()

    async def __aenter__(self) -> AsyncNVEmbedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run_job(self, job: Job) -> None:
        chunks = job.chunks()
        first = next(chunks, None)
        if first is None:
            return
        second = next(chunks, None)
        if second is None:  # one request, the usual case, needs no task
            job.record(await self._run(job.flow(first)))
            return
        pending = {asyncio.create_task(self._run(job.flow(first)))}
        try:
            chunk: Chunk | None = second
            while chunk is not None:
                if len(pending) >= self._max_in_flight:
                    pending = await self._record_some(job, pending)
                pending.add(asyncio.create_task(self._run(job.flow(chunk))))
                chunk = next(chunks, None)
            while pending:
                pending = await self._record_some(job, pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    @staticmethod
    async def _record_some(job: Job, pending: set[asyncio.Task[list[Outcome]]]) -> set[asyncio.Task[list[Outcome]]]:
        done, rest = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            job.record(task.result())
        return rest

    async def _run(self, steps: Flow[T]) -> T:
        """Carry out the steps of a flow."""
        try:
            step = next(steps)
            while True:
                try:
                    outcome = await self._carry_out(step)
                except InferenceServerException as raw:
                    step = steps.throw(raw)
                except asyncio.CancelledError:
                    # A channel that closes cancels its calls, which is not to look as if somebody cancelled this task.
                    if self._closed and not _is_cancelled():
                        raise ClientClosed(
                            "expected an open client; got one that was closed meanwhile; make a new one"
                        ) from None
                    raise
                else:
                    step = steps.send(outcome)
        except StopIteration as stop:
            value: T = stop.value
            return value

    async def _carry_out(self, step: Step) -> Any:
        match step:
            case Send(request, timeout_seconds):
                return await self._triton().infer(
                    self.model_name,
                    headers=self._connection.headers,
                    client_timeout=timeout_seconds,
                    **request.arguments(),
                )
            case AskReady(timeout_seconds):
                return await self._triton().is_model_ready(
                    self.model_name, headers=self._connection.headers, client_timeout=timeout_seconds
                )
            case flow.Sleep(seconds):
                await asyncio.sleep(seconds)

    def _triton(self) -> InferenceServerClient:
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._triton_or_none is None:
            self._loop = loop
            self._triton_or_none = InferenceServerClient(**self._connection.client_arguments())
        elif self._loop is not loop:
            raise ClientClosed(
                "expected the event loop of the client's first use; got another; make a client in each loop"
            )
        return self._triton_or_none


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task; Python 3.10 cannot say."""
    task = asyncio.current_task()
    return task is not None and sys.version_info >= (3, 11) and task.cancelling() > 0
