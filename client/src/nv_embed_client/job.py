"""One call of any number of texts: cuts it into requests, takes their outcomes, puts the arrays together. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from nv_embed_client import flow
from nv_embed_client.chunking import Chunk, Chunker
from nv_embed_client.connection import Settings
from nv_embed_client.embedding_type import EMBEDDING_TYPES, Embeddings, EmbeddingType
from nv_embed_client.errors import Failure, InvalidInput, NVEmbedError, PartialFailure, ServerFailure
from nv_embed_client.flow import Deadline, Flow
from nv_embed_client.instructions import QUERY_INSTRUCTION, checked_instruction
from nv_embed_client.wire import EmbedRequest, EmbedResult
from nv_embed_client.wire import InputType as InputType
from nv_embed_client.wire import Truncate as Truncate

_FAILURES_OF_THE_SERVER = 3  # this many single texts in a row: then the texts are not to blame


@dataclass(frozen=True, slots=True)
class Call:
    """What a caller asks for, beside the texts."""

    input_type: InputType = "passage"
    instruction: str | None = None  # None: the server's own for a query, nothing for a passage
    truncate: Truncate = "END"
    token_counts: bool = False
    progress: bool = False
    timeout: float | None = None  # seconds for the whole call
    max_texts_per_request: int | None = None  # None: the client's
    embedding_type: EmbeddingType = "float"
    is_truncated: bool = False

    def __post_init__(self) -> None:
        if self.input_type not in ("query", "passage"):
            raise InvalidInput.of(
                expected="'query' or 'passage' as input_type", got=repr(self.input_type), remedy="correct it"
            )
        if self.truncate not in ("END", "NONE"):
            raise InvalidInput.of(
                expected="'END' or 'NONE' as truncate",
                got=repr(self.truncate),
                remedy="'END' cuts a text that is too long, 'NONE' has it refused",
            )
        if self.embedding_type not in EMBEDDING_TYPES:
            raise InvalidInput.of(
                expected=f"one of {', '.join(map(repr, EMBEDDING_TYPES))} as embedding_type",
                got=repr(self.embedding_type),
                remedy="correct it, or leave it out for float32",
            )
        checked_instruction(self.instruction)
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInput.of(
                expected="a timeout of more than 0 seconds",
                got=str(self.timeout),
                remedy="leave it out for the client's default",
            )
        if self.max_texts_per_request is not None and self.max_texts_per_request < 1:
            raise InvalidInput.of(
                expected="max_texts_per_request of at least 1", got=str(self.max_texts_per_request), remedy="correct it"
            )

    def request(self, texts: tuple[str, ...]) -> EmbedRequest:
        """The request of one chunk."""
        return EmbedRequest(
            texts, self.input_type, self.instruction, self.truncate, self.token_counts,
            embedding_type=self.embedding_type, is_truncated=self.is_truncated,
        )  # fmt: skip

    def instruction_bytes(self) -> int:
        """What each text counts beside its own bytes."""
        if self.instruction is not None:
            return len(self.instruction.encode())
        return len(QUERY_INSTRUCTION) if self.input_type == "query" else 0


@dataclass(frozen=True, slots=True)
class _Embedded:
    indices: tuple[int, ...]
    result: EmbedResult


Outcome: TypeAlias = _Embedded | Failure


class _Patience:
    """Looks at one outcome after the other, and says when nothing more is worth sending."""

    def __init__(self) -> None:
        self._num_failures = 0  # of the server's, none of its embeddings since

    def ended_by(self, outcome: Outcome) -> NVEmbedError | None:
        """The error that ends the call, if this one does. Bad input and few server failures spoil only their texts."""
        if isinstance(outcome, _Embedded):
            self._num_failures = 0
            return None
        if isinstance(outcome.error, ServerFailure):
            self._num_failures += 1
            return outcome.error if self._num_failures >= _FAILURES_OF_THE_SERVER else None
        return None if isinstance(outcome.error, InvalidInput) else outcome.error


class Job:
    """The texts of one call on their way. Used by one thread or task."""

    def __init__(self, texts: Iterable[str], call: Call, settings: Settings) -> None:
        """
        Raises:
            InvalidInput: `texts` is a single str.
        """
        if isinstance(texts, str | bytes):
            raise InvalidInput.of(
                expected="an iterable of texts", got=f"one {type(texts).__name__}", remedy="put it into a list"
            )
        self._texts = texts
        self._call = call
        self._settings = settings
        self._deadline = None if call.timeout is None else Deadline.after(call.timeout)
        self._num_texts = 0  # taken from the caller
        self._complete = False
        self._given_up: NVEmbedError | None = None  # why nothing more is sent
        self._patience = _Patience()
        self._embedded: list[_Embedded] = []
        self._failures: list[Failure] = []
        self._query_prompt: str | None = None
        self._bar: Any = None  # even a disabled one starts a thread
        if call.progress:
            self._bar = tqdm(total=len(texts) if isinstance(texts, Sized) else None, unit=" texts")

    def chunks(self) -> Iterator[Chunk]:
        """The requests to send, as the caller's texts come. Ends early when the server is gone."""
        chunker = Chunker(
            max_texts=self._call.max_texts_per_request or self._settings.max_texts_per_request,
            max_bytes=self._settings.max_bytes_per_request,
            instruction_bytes=self._call.instruction_bytes(),
        )
        for index, text in enumerate(self._texts):
            self._num_texts = index + 1
            try:
                chunk = chunker.add(index, text)
            except InvalidInput as error:
                self.record([Failure((index,), error)])
                continue
            if chunk is not None:
                yield chunk
            if self._given_up is not None:
                # What has gathered since is not worth a request that will fail as well.
                if (unsent := chunker.rest()) is not None:
                    self.record([Failure(unsent.indices, self._given_up)])
                return
        self._complete = True
        if (chunk := chunker.rest()) is not None:
            yield chunk

    def flow(self, chunk: Chunk) -> Flow[list[Outcome]]:
        """One request, from the first attempt to what became of each text, in their order. Raises no `NVEmbedError`."""
        deadline = Deadline.after(self._settings.request_timeout).earlier(self._deadline)
        outcomes: list[Outcome] = []
        patience = _Patience()
        ended: NVEmbedError | None = None
        todo = [chunk]
        while todo:
            chunk = todo.pop()
            ended = ended or self._given_up
            if ended is not None:
                outcomes.append(Failure(chunk.indices, ended))
                continue
            try:
                request = self._call.request(chunk.texts)
                if request.needs_query_prompt:
                    request = replace(request, query_prompt=(yield from self._own_query_prompt(deadline)))
                result = yield from flow.embed(request, deadline, self._settings.retry)
            except (InvalidInput, ServerFailure) as error:
                # One text may fail its whole request, too long for NONE or for the device: find it, so that the
                # others get through.
                if len(chunk.texts) > 1 and (isinstance(error, ServerFailure) or self._call.truncate == "NONE"):
                    todo += reversed(chunk.halves())
                    continue
                outcomes.append(Failure(chunk.indices, type(error)(chunk.renumbered(str(error)))))
            except NVEmbedError as error:
                outcomes.append(Failure(chunk.indices, error))
            else:
                outcomes.append(_Embedded(chunk.indices, result))
            ended = patience.ended_by(outcomes[-1])
        return outcomes

    def _own_query_prompt(self, deadline: Deadline) -> Flow[str]:
        """The served model's; asked in each call, because a server may have come back with another."""
        if self._query_prompt is None:
            info = yield from flow.model_info(deadline, self._settings.retry)
            self._query_prompt = QUERY_INSTRUCTION if info is None else info.query_prompt
        return self._query_prompt

    def record(self, outcomes: list[Outcome]) -> None:
        """Take what a flow returned."""
        for outcome in outcomes:
            if self._bar is not None:
                self._bar.update(len(outcome.indices))
            if isinstance(outcome, _Embedded):
                self._embedded.append(outcome)
            else:
                self._failures.append(outcome)
            self._given_up = self._given_up or self._patience.ended_by(outcome)

    def close(self) -> None:
        """The call is over, whatever came of it."""
        if self._bar is not None:
            self._bar.close()

    def result(self) -> EmbedResult | None:
        """All arrays in input order; None when there were no texts.

        Raises:
            PartialFailure: some texts have embeddings and others do not.
            NVEmbedError: when no text has an embedding: what ended the call, else the first error.
        """
        if self._failures and not self._embedded:
            raise self._given_up or self._failures[0].error
        if not self._embedded:
            return None
        first = self._embedded[0].result.embeddings
        missing = np.nan if first.dtype.kind == "f" else 0
        embeddings: Embeddings = np.full((self._num_texts, first.shape[1]), missing, first.dtype)
        token_counts = np.zeros(self._num_texts, np.int32) if self._call.token_counts else None
        is_truncated = np.zeros(self._num_texts, np.bool_) if self._call.is_truncated else None
        while self._embedded:  # popped, so that each reply is freed as it is copied
            part = self._embedded.pop()
            rows = list(part.indices)
            embeddings[rows] = part.result.embeddings
            if token_counts is not None and part.result.token_counts is not None:
                token_counts[rows] = part.result.token_counts
            if is_truncated is not None and part.result.is_truncated is not None:
                is_truncated[rows] = part.result.is_truncated
        if self._failures:
            raise PartialFailure(
                embeddings, self._failures, complete=self._complete, token_counts=token_counts,
                is_truncated=is_truncated,
            )  # fmt: skip
        return EmbedResult(embeddings, token_counts, is_truncated)
