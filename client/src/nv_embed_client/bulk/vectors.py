"""The vectors of some texts, whatever the server goes through meanwhile."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from nv_embed_client.bulk import PATIENCE_SECONDS
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.embedding_type import NUMBERS, Embeddings, EmbeddingType
from nv_embed_client.errors import InvalidInput, ModelNotFound, PartialFailure, ServerFailure
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.wire import EmbedResult

UNTIL_THE_DEADLINE = RetryPolicy(max_attempts=2**31)
"""For a client whose `request_timeout` says how long a server may be away."""

_TEXTS_PER_REQUEST = 256
_REQUESTS_IN_FLIGHT = 4  # of one worker
_FAILURES = 3  # of a text alone, while others are computed: then the text is to blame
_MAX_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of n texts; k of them have a vector."""

    rows: npt.NDArray[np.int64]  # [k], which
    embeddings: Embeddings  # [k, dim], or [k, dim / 8] of signs
    num_tokens: npt.NDArray[np.int32]  # [k]
    is_truncated: npt.NDArray[np.bool_]  # [k]
    reasons: dict[int, str]  # why the others have none


@dataclass(frozen=True, slots=True)
class Embedder:
    """Embeds any number of texts. A text fails for a reason of its own, never because a server was away."""

    client: NVEmbedClient  # which waits for a server that is away
    embedding_type: EmbeddingType = "float"
    instruction: str | None = None
    patience_seconds: float = PATIENCE_SECONDS
    """How long a server may answer and compute nothing."""

    def vectors_of(self, texts: Sequence[str | None], width: int) -> Vectors:
        """
        Args:
            texts: None is a text that is missing.
            width: of a row.

        Raises:
            NVEmbedError: the server was away, or failed, for longer than patience lasts.
        """
        reasons = {row: "expected a text; got none; add it" for row, text in enumerate(texts) if text is None}
        there = [row for row, text in enumerate(texts) if text is not None]
        groups = [there[start : start + _TEXTS_PER_REQUEST] for start in range(0, len(there), _TEXTS_PER_REQUEST)]
        dtype = NUMBERS[self.embedding_type][1]
        embeddings, counts = np.empty((len(texts), width), dtype), np.zeros(len(texts), np.int32)
        truncated = np.zeros(len(texts), np.bool_)
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            for outcomes in pool.map(partial(self._of_group, texts), groups):
                for some, outcome in outcomes:
                    if isinstance(outcome, str):
                        reasons |= dict.fromkeys(some, outcome)
                        continue
                    if outcome.embeddings.shape[1] != width:
                        raise ServerFailure(
                            f"expected vectors of {width} numbers; got {outcome.embeddings.shape[1]}; "
                            "check that every server serves the same model"
                        )
                    assert outcome.token_counts is not None
                    assert outcome.is_truncated is not None
                    embeddings[some], counts[some] = outcome.embeddings, outcome.token_counts
                    truncated[some] = outcome.is_truncated
        rows = np.array([row for row in there if row not in reasons], np.int64)
        return Vectors(rows, embeddings[rows], counts[rows], truncated[rows], reasons)

    def _of_group(self, texts: Sequence[str | None], rows: list[int]) -> list[tuple[list[int], EmbedResult | str]]:
        return list(self._outcomes(rows, [texts[row] or "" for row in rows]))

    def _outcomes(self, rows: list[int], texts: list[str]) -> Iterator[tuple[list[int], EmbedResult | str]]:
        """What came of each text; those that fail together are tried in halves."""
        try:
            yield rows, self._embedded(texts)
        except (InvalidInput, ServerFailure, ModelNotFound, PartialFailure) as error:
            if len(rows) > 1:
                middle = len(rows) // 2
                yield from self._outcomes(rows[:middle], texts[:middle])
                yield from self._outcomes(rows[middle:], texts[middle:])
            elif isinstance(error, InvalidInput):
                yield rows, str(error)
            else:
                yield rows, self._alone(texts[0])

    def _alone(self, text: str) -> EmbedResult | str:
        """A text that failed. A server that dies while it computes also says that it failed, so this one asks again."""
        deadline = time.monotonic() + self.patience_seconds
        failures, pause = 0, 0.2
        while True:
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            try:
                return self._embedded([text])
            except InvalidInput as error:
                return str(error)
            except (ServerFailure, ModelNotFound) as error:
                if self._computes():
                    failures += 1
                    if failures == _FAILURES:
                        return str(error)
                elif time.monotonic() > deadline:
                    raise

    def _computes(self) -> bool:
        """Whether the server computes another text. No cache has seen this one."""
        try:
            self._embedded([uuid.uuid4().hex])
        except (ServerFailure, ModelNotFound):
            return False
        return True

    def _embedded(self, texts: list[str]) -> EmbedResult:
        return self.client.embed(
            texts, instruction=self.instruction, embedding_type=self.embedding_type, token_counts=True,
            is_truncated=True,
        )  # fmt: skip
