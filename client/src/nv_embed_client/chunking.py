"""Texts of any number to requests of bounded size; knows neither tensors nor the network."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nv_embed_client.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Chunk:
    """The texts of one request, in the order of the call."""

    indices: tuple[int, ...]  # positions within the texts of the call
    texts: tuple[str, ...]

    def halves(self) -> tuple[Chunk, Chunk]:
        """Two chunks of at least one text each."""
        assert len(self.texts) > 1
        middle = len(self.texts) // 2
        return Chunk(self.indices[:middle], self.texts[:middle]), Chunk(self.indices[middle:], self.texts[middle:])

    def renumbered(self, message: str) -> str:
        """A message that says 'text 3' of this request, saying it of the call."""

        def position(match: re.Match[str]) -> str:
            number = int(match[1])
            return f"text {self.indices[number]}" if number < len(self.indices) else match[0]

        return re.sub(r"\btext (\d+)\b", position, message)


def num_bytes_of(text: object, index: int) -> int:
    """The length of a text in UTF-8.

    Raises:
        InvalidInput: it is no `str`, or holds half a surrogate pair.
    """
    if not isinstance(text, str):
        raise InvalidInput.of(
            expected="a str as every text", got=f"{type(text).__name__} as text {index}", remedy="convert it to str"
        )
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput.of(
            expected="valid Unicode",
            got=f"text {index} with an unpaired surrogate at position {error.start}",
            remedy="repair it, for example with text.encode(errors='replace').decode()",
        ) from None


class Chunker:
    """Gathers texts until the next would be one too many."""

    def __init__(self, *, max_texts: int, max_bytes: int, instruction_bytes: int) -> None:
        """
        Args:
            max_texts: of one chunk.
            max_bytes: of one chunk, the instruction counted once for each text as the server does. A single text may
                have more, because only the server knows its own limit.
            instruction_bytes: what each text brings beside its own.
        """
        self._max_texts = max_texts
        self._max_bytes = max_bytes
        self._instruction_bytes = instruction_bytes
        self._indices: list[int] = []
        self._texts: list[str] = []
        self._num_bytes = 0

    def add(self, index: int, text: str) -> Chunk | None:
        """Take one text; give the chunk before it when that is full.

        Raises:
            InvalidInput: the text cannot be sent.
        """
        num_bytes = num_bytes_of(text, index) + self._instruction_bytes
        full = len(self._texts) >= self._max_texts or self._num_bytes + num_bytes > self._max_bytes
        chunk = self.rest() if full else None
        self._indices.append(index)
        self._texts.append(text)
        self._num_bytes += num_bytes
        return chunk

    def rest(self) -> Chunk | None:
        """What has gathered, None when nothing has; start anew."""
        if not self._texts:
            return None
        chunk = Chunk(tuple(self._indices), tuple(self._texts))
        self._indices, self._texts, self._num_bytes = [], [], 0
        return chunk
