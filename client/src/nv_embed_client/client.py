"""The client for code without an event loop; may be used by many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nv_embed_client import flow
from nv_embed_client.chunking import Chunk
from nv_embed_client.core import ClientCore, empty_result
from nv_embed_client.errors import ClientClosed
from nv_embed_client.flow import AskReady, Deadline, Flow, Send, Step, T
from nv_embed_client.job import InputType, Job, Outcome, Truncate
from nv_embed_client.wire import EmbedResult


class NVEmbedClient(ClientCore):
    """NV-Embed-v2 at the other end of a gRPC connection.

    with NVEmbedClient("localhost:8001") as client:
        scores = client.embed_query("...") @ client.embed_documents(["...", "..."]).T

    Every method raises `NVEmbedError` and nothing else on purpose; `errors` has the tree.
    """

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._triton_or_none: InferenceServerClient | None = None
        self._pool_or_none: ThreadPoolExecutor | None = None

    def embed_query(
        self,
        text: str,
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """One query with the standard instruction before it, or with `instruction`: [1, dim]."""
        return self.embed(
            [text], input_type="query", instruction=instruction, truncate=truncate, timeout=timeout
        ).embeddings

    def embed_queries(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        progress: bool = False,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Any number of queries, each as `embed_query` has it: [n, dim], in input order."""
        return self.embed(
            texts,
            input_type="query",
            instruction=instruction,
            truncate=truncate,
            progress=progress,
            timeout=timeout,
        ).embeddings

    def embed_documents(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        truncate: Truncate = "END",
        progress: bool = False,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Any number of documents, without instruction unless one is given: [n, dim], in input order."""
        return self.embed(
            texts, instruction=instruction, truncate=truncate, progress=progress, timeout=timeout
        ).embeddings

    def embed(
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
        """What the other methods are made of.

        Args:
            texts: any iterable of any length; it is read as requests are sent.
            input_type: "query" puts the standard instruction before each text.
            instruction: replaces that of either type; the whole text before the query, template included.
            truncate: "END" cuts a text that is too long for the model, "NONE" has it refused.
            token_counts: also give the tokens of each text.
            progress: show a progress bar.
            timeout: seconds for the whole call; by default each of its requests has the client's `request_timeout`.
            max_texts_per_request: instead of the client's.

        Raises:
            PartialFailure: some texts have embeddings and others do not; it holds the former and names the latter.
            NVEmbedError: no text has an embedding.
        """
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
            self._run_job(job)
            result = job.result()
        finally:
            job.close()
        if result is None:
            return empty_result(self.dimension(timeout), token_counts=token_counts)
        return self._remember(result)

    def dimension(self, timeout: float | None = None) -> int:
        """Of the embeddings; asks the server once, by embedding one text, within `timeout` seconds."""
        if self._dimension is None:
            self.embed([""], timeout=timeout)
        assert self._dimension is not None
        return self._dimension

    def is_ready(self) -> bool:
        """Whether the server answers and the model is loaded."""
        self._check_open()
        return self._run(flow.probe())

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Return as soon as the model is ready.

        Raises:
            DeadlineExceeded: it is not within `timeout` seconds.
        """
        self._check_open()
        self._run(flow.wait_until_ready(Deadline.after(timeout), self.url))

    def close(self) -> None:
        """Give up what is on its way and the connection."""
        with self._lock:
            self._closed = True
            self._closing.set()
            if self._pool_or_none is not None:
                # Without cancel_futures: nothing wakes who waits for one that had not begun. What is queued begins,
                # and ends at once, as the client is closed.
                self._pool_or_none.shutdown(wait=False)
            if self._triton_or_none is not None:
                self._triton_or_none.close()

    def __enter__(self) -> NVEmbedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run_job(self, job: Job) -> None:
        chunks = job.chunks()
        first = next(chunks, None)
        if first is None:
            return
        second = next(chunks, None)
        if second is None:  # one request, the usual case, needs no thread
            job.record(self._run(job.flow(first)))
            return
        pending: set[Future[list[Outcome]]] = set()
        try:
            pending.add(self._submit(job, first))
            chunk: Chunk | None = second
            while chunk is not None:
                if len(pending) >= self._max_in_flight:
                    pending = self._record_some(job, pending)
                pending.add(self._submit(job, chunk))
                chunk = next(chunks, None)
            while pending:
                pending = self._record_some(job, pending)
        finally:
            for future in pending:
                future.cancel()

    def _submit(self, job: Job, chunk: Chunk) -> Future[list[Outcome]]:
        with self._lock:
            self._check_open()
            if self._pool_or_none is None:
                # A thread waits for one reply, and another is made only when all do: one call must not wait for others.
                self._pool_or_none = ThreadPoolExecutor(max(1024, self._max_in_flight), "nv-embed-client")
            return self._pool_or_none.submit(lambda: self._run(job.flow(chunk)))

    @staticmethod
    def _record_some(job: Job, pending: set[Future[list[Outcome]]]) -> set[Future[list[Outcome]]]:
        done, rest = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            job.record(future.result())
        return rest

    def _run(self, steps: Flow[T]) -> T:
        """Carry out the steps of a flow."""
        try:
            step = next(steps)
            while True:
                try:
                    outcome = self._carry_out(step)
                except (InferenceServerException, ValueError) as raw:
                    # A channel that closes ends its calls as if the server were gone; a closed one takes none.
                    if self._closed:
                        raise _closed_meanwhile() from None
                    if isinstance(raw, ValueError):
                        raise
                    step = steps.throw(raw)
                else:
                    step = steps.send(outcome)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def _carry_out(self, step: Step) -> Any:
        match step:
            case Send(request, timeout_seconds):
                return self._triton().infer(
                    self.model_name,
                    headers=self._connection.headers,
                    client_timeout=timeout_seconds,
                    **request.arguments(),
                )
            case AskReady(timeout_seconds):
                return self._triton().is_model_ready(
                    self.model_name, headers=self._connection.headers, client_timeout=timeout_seconds
                )
            case flow.Sleep(seconds):
                if self._closing.wait(seconds):
                    raise _closed_meanwhile()

    def _triton(self) -> InferenceServerClient:
        with self._lock:
            self._check_open()
            if self._triton_or_none is None:
                self._triton_or_none = InferenceServerClient(**self._connection.client_arguments())
            return self._triton_or_none


def _closed_meanwhile() -> ClientClosed:
    return ClientClosed("expected an open client; got one that was closed meanwhile; make a new one")
