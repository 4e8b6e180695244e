"""What came of each text of a part of many: vectors for most, a reason for those that failed."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nv_embed_client.client import NVEmbedClient
from nv_embed_client.embedding_type import Embeddings, EmbeddingType
from nv_embed_client.errors import InvalidInput, NVEmbedError, PartialFailure, ServerFailure
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.wire import EmbedResult, InputType, Truncate

T = TypeVar("T")
R = TypeVar("R")

_FAILURES_OF_THE_SERVER = 3  # with so many texts and no vector, the texts are not to blame
AHEAD = 2  # parts on their way at once, so that the server has work while a part ends


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of n texts."""

    embeddings: Embeddings
    """[n, dim]; rows of texts that failed are NaN, or 0 in a type without NaN."""
    token_counts: npt.NDArray[np.int32]
    """[n]; 0 of texts that failed."""
    is_truncated: npt.NDArray[np.bool_]
    """[n]; False of texts that failed."""
    errors: dict[int, NVEmbedError]
    """Why texts failed, by their positions."""


class Embedder:
    """A client with the options of many calls, for which a text that fails is no exception."""

    def __init__(
        self,
        client: NVEmbedClient,
        model: ModelInfo,
        *,
        input_type: InputType = "passage",
        instruction: str | None = None,
        truncate: Truncate = "END",
        embedding_type: EmbeddingType = "float",
    ) -> None:
        """Embeds a word, so that options which no text can have are refused at once.

        Args:
            client: to the server or servers.
            model: what they served when the caller asked. Nothing of another model is returned.

        Raises:
            NVEmbedError: the server refuses the options, or is absent.
        """
        self._client = client
        self._model = model
        self._options: dict[str, Any] = {
            "input_type": input_type, "instruction": instruction, "truncate": truncate,
            "embedding_type": embedding_type, "token_counts": True, "is_truncated": True,
        }  # fmt: skip
        word = client.embed(["text"], **self._options).embeddings
        self.width: int = word.shape[1]
        """Numbers of a row."""
        self.dtype: np.dtype[Any] = word.dtype

    def outcome(self, texts: Sequence[str | NVEmbedError]) -> Outcome:
        """What came of each text; those that are an error already keep it.

        Raises:
            NVEmbedError: the server is gone, fails whatever the text, or came back with another model.
        """
        number = len(texts)
        missing = np.nan if self.dtype.kind == "f" else 0
        outcome = Outcome(
            np.full((number, self.width), missing, self.dtype), np.zeros(number, np.int32), np.zeros(number, np.bool_),
            {position: text for position, text in enumerate(texts) if isinstance(text, NVEmbedError)},
        )  # fmt: skip
        positions = [position for position in range(number) if position not in outcome.errors]
        self._fill(outcome, positions, [text for text in texts if isinstance(text, str)])
        self._check_model()  # after each part, so that each one lies between two good answers
        return outcome

    def _check_model(self) -> None:
        now = self._client.model_info()
        for name in ("fingerprint", "document_prompt", "query_prompt", "dimension"):
            expected, got = getattr(self._model, name), getattr(now, name)
            if expected != got:
                raise InvalidInput.of(
                    expected=f"the same model until all is done, with {name} {expected!r}",
                    got=f"{now.name} with {got!r}",
                    remedy="serve that model again, or start anew with this one",
                )

    def _fill(self, outcome: Outcome, positions: list[int], texts: list[str]) -> None:
        if not texts:
            return
        result: EmbedResult | PartialFailure
        try:
            result = self._client.embed(texts, **self._options)
        except PartialFailure as error:
            last = None if error.complete else error.failures[-1].error
            ended = next((failure.error for failure in error.failures if not _is_of_text(failure.error)), last)
            if ended is not None:
                raise ended from error
            for failure in error.failures:
                outcome.errors.update((positions[index], _unnumbered(failure.error)) for index in failure.indices)
            result = error
        except (InvalidInput, ServerFailure) as error:
            if len(texts) == 1:
                outcome.errors[positions[0]] = _unnumbered(error)
                return
            if isinstance(error, ServerFailure) and len(texts) >= _FAILURES_OF_THE_SERVER:
                raise
            middle = len(texts) // 2  # none has a vector, and the error is that of only one
            self._fill(outcome, positions[:middle], texts[:middle])
            self._fill(outcome, positions[middle:], texts[middle:])
            return
        assert result.token_counts is not None
        assert result.is_truncated is not None
        if result.embeddings.shape[1] != self.width:
            self._check_model()
            raise ServerFailure(
                f"expected rows of {self.width} numbers; got {result.embeddings.shape[1]}; check that every server "
                "serves the same model"
            )
        outcome.embeddings[positions] = result.embeddings
        outcome.token_counts[positions] = result.token_counts
        outcome.is_truncated[positions] = result.is_truncated


def _is_of_text(error: NVEmbedError) -> bool:
    return isinstance(error, (InvalidInput, ServerFailure))


def _unnumbered(error: NVEmbedError) -> NVEmbedError:
    """The same error of a text whose position among those that were sent together says nothing to the user."""
    return type(error)(re.sub(r"\btext \d+\b", "a text", str(error)))


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item with what the function made of it, in order, while the pool works on the next ones.

    Args:
        items: read as they are needed, at most `AHEAD` before the one that is given.
    """
    ahead: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        ahead.append((item, pool.submit(function, item)))
        if len(ahead) > AHEAD:
            first, future = ahead.popleft()
            yield first, future.result()
    while ahead:
        first, future = ahead.popleft()
        yield first, future.result()
