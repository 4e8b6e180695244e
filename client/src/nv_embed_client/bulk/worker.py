"""One part of OUTPUT from its rows to its file. Runs in an actor of Ray, on any machine of the cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nv_embed_client import errors
from nv_embed_client.bulk import parts
from nv_embed_client.bulk.folder import Folder
from nv_embed_client.bulk.plan import Plan
from nv_embed_client.bulk.source import rows_of, texts_of
from nv_embed_client.bulk.vectors import UNTIL_THE_DEADLINE, Embedder
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.errors import InvalidInput, NVEmbedError

Row = dict[str, npt.NDArray[Any]]


class Worker:
    """What Ray Data calls with the number of one part after the other."""

    def __init__(self, output: str, url: str, model_name: str, patience_seconds: float) -> None:
        """
        Args:
            output: the address of OUTPUT. The plan there says all else.
            url: of the server or servers.
            patience_seconds: how long they may be away.
        """
        self._address = output
        self._folder = Folder.at(output)
        self._plan = Plan.read(self._folder)
        self._client = NVEmbedClient(url, model_name, request_timeout=patience_seconds, retry=UNTIL_THE_DEADLINE)
        self._patience_seconds = patience_seconds

    def __call__(self, batch: Row) -> Row:
        """Do the part whose number is in `batch`. Errors are data, because Ray would bury them under its own."""
        (number,) = batch["number"].tolist()
        num_rows, num_tokens, kind, message = 0, 0, "", ""
        try:
            num_rows, num_tokens = self._done(number)
        except (NVEmbedError, OSError) as error:
            kind, message = type(error).__name__, str(error)
        return {
            "number": np.array([number]),
            "num_rows": np.array([num_rows]),
            "num_tokens": np.array([num_tokens]),
            "kind": np.array([kind], object),
            "message": np.array([message], object),
        }

    def _done(self, number: int) -> tuple[int, int]:
        """The rows and the tokens of a part, once it is there."""
        plan = self._plan
        if plan is None:
            raise InvalidInput.of(
                expected=f"{self._address} with the plan of this job on each node of the cluster",
                got="a node without it",
                remedy="use a folder that all nodes share, or an object store",
            )
        there = parts.num_rows_of(self._folder, number)
        if there is not None:  # Ray repeats what it lost sight of
            return there, parts.num_tokens_of(self._folder, number)
        table = rows_of(Folder.at(plan.wish.input), plan.pieces[number], plan.schema)
        texts = texts_of(table, plan.wish.text_column)
        wish = plan.wish
        embedder = Embedder(self._client, wish.embedding_type, wish.instruction, self._patience_seconds)
        # Before and after, because a server may come back with another model on the way.
        self._check_model(plan)
        vectors = embedder.vectors_of(texts, plan.width)
        self._check_model(plan)
        parts.write(self._folder, plan, number, table, vectors)
        return len(vectors.rows), int(vectors.num_tokens.sum())

    def _check_model(self, plan: Plan) -> None:
        plan.model.check(self._client.model_info().identity, self._address)


def raised(kind: str, message: str) -> Exception:
    """The error that a worker met."""
    error: type[Exception] = getattr(errors, kind, OSError)
    return error(message)
