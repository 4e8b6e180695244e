"""Everything that can go wrong, as types.

NVEmbedError
├── InvalidInput        the caller can mend it; the same call will fail again
├── AccessDenied        the server wants another header, certificate or key
├── ModelNotFound       the server does not serve this model
├── ServerTooOld        the server does not know what the call asks for
├── Unavailable         no server answers, or it is full or stopping; the same call may succeed later
├── DeadlineExceeded    no answer in the time the call was given
├── ServerFailure       the server failed, through no fault of the caller
├── ClientClosed        the client was closed, or belongs to another event loop
└── PartialFailure      some texts of a call have embeddings and others do not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nv_embed_client.embedding_type import Embeddings


class NVEmbedError(Exception):
    """Base of all errors this package raises on purpose."""


class InvalidInput(NVEmbedError, ValueError):
    """The caller can mend it; the same call will fail again."""

    @classmethod
    def of(cls, *, expected: str, got: str, remedy: str) -> InvalidInput:
        """The one form of message: what was expected, what came, what to do."""
        return cls(f"expected {expected}; got {got}; {remedy}")


class AccessDenied(NVEmbedError):
    """The server wants another header, certificate or key."""


class ModelNotFound(NVEmbedError):
    """The server does not serve this model."""


class ServerTooOld(NVEmbedError):
    """The server, or the config.pbtxt of this model, does not know what the call asks for."""


class Unavailable(NVEmbedError):
    """No server answers, or it is full or stopping; the same call may succeed later."""


class DeadlineExceeded(NVEmbedError, TimeoutError):
    """No answer in the time the call was given."""


class ServerFailure(NVEmbedError):
    """The server failed, through no fault of the caller; its log says more."""


class ClientClosed(NVEmbedError, RuntimeError):
    """The client was closed, or belongs to another event loop."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Texts that have no embedding, and why."""

    indices: tuple[int, ...]  # positions within the texts of the call
    error: NVEmbedError


class PartialFailure(NVEmbedError):
    """Some texts of a call have embeddings and others do not.

    Attributes:
        embeddings: [n, dim] of the call's type for the n texts that were taken from the caller. Rows that failed are
            NaN, or 0 in a type without NaN.
        token_counts, is_truncated: [n] if the call asked for them, else None. Texts that failed have 0 and False.
        failures: which texts have none, and why; each text at most once.
        complete: False when the call was given up before the caller's texts were all taken, as the server was gone.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        failures: Sequence[Failure],
        *,
        complete: bool,
        token_counts: npt.NDArray[np.int32] | None = None,
        is_truncated: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.embeddings = embeddings
        self.token_counts = token_counts
        self.is_truncated = is_truncated
        self.failures = tuple(failures)
        self.complete = complete
        indices = self.failed
        shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
        given_up = "" if complete else "; the texts after them were not sent"
        super().__init__(
            f"expected embeddings of all texts; got none for {len(indices)} of {len(embeddings)} "
            f"(positions {shown}{given_up}); the first error: {self.failures[0].error}; "
            "take the others from this error's `embeddings`, and repeat the positions in `failed`"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {name: getattr(self, name) for name in ("complete", "token_counts", "is_truncated")}
        return partial(PartialFailure, **rest), (self.embeddings, self.failures)

    @property
    def failed(self) -> tuple[int, ...]:
        """Positions of the texts that have no embedding, in order."""
        return tuple(sorted(index for failure in self.failures for index in failure.indices))
