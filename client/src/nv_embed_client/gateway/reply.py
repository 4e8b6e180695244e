"""Vectors to JSON, a slice at a time, so that other requests are answered between the slices of a large reply."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from fastapi import Response
from fastapi.responses import StreamingResponse

from nv_embed_client.embedding_type import Embeddings
from nv_embed_client.wire import EmbedResult

TRUNCATED_TEXTS = "X-Truncated-Texts"  # header: how many texts were cut; absent if none was
_NUMBERS_PER_SLICE = 2**14  # a millisecond or two


class Replies:
    """The large replies of one gateway take turns: one slice is encoded in each round of the event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    def response(self, result: EmbedResult, item: Callable[[int, Any], Any], head: bytes, tail: bytes) -> Response:
        """`head`, the items of all vectors with commas between them, `tail`.

        Args:
            result: of n texts, at least one.
            item: what stands in JSON for a vector, by its index. Numbers are written by orjson from the array,
                never one by one in Python.
        """
        vectors = result.embeddings
        num_truncated = 0 if result.is_truncated is None else int(result.is_truncated.sum())
        headers = {TRUNCATED_TEXTS: str(num_truncated)} if num_truncated else {}
        num_rows = max(1, _NUMBERS_PER_SLICE // vectors.shape[1])

        def encoded(start: int) -> bytes:
            stop = min(start + num_rows, len(vectors))
            items = [item(index, vectors[index]) for index in range(start, stop)]
            return orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]

        if len(vectors) <= num_rows:
            return Response(b"".join((head, encoded(0), tail)), headers=headers, media_type="application/json")
        return StreamingResponse(
            self._slices(len(vectors), num_rows, encoded, head, tail), headers=headers, media_type="application/json"
        )

    async def _slices(
        self, count: int, num_rows: int, encoded: Callable[[int], bytes], head: bytes, tail: bytes
    ) -> AsyncIterator[bytes]:
        before = head
        for start in range(0, count, num_rows):
            async with self._turn:
                piece = before + encoded(start)
                await asyncio.sleep(0)  # whatever else is due comes first, and only then the next slice of any reply
            yield piece
            before = b","
        yield tail


def as_base64(vector: Embeddings) -> str:
    """A vector's numbers in little-endian order."""
    return base64.b64encode(vector.astype(vector.dtype.newbyteorder("<"), copy=False).data).decode("ascii")
