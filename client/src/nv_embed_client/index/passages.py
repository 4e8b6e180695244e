"""Text to passages of bounded length; knows no files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_CHARACTERS = 1500
"""Of a passage: three or four paragraphs, some 350 tokens of English."""

# Where a text is cut, best first: before a heading of Markdown, between paragraphs, lines, sentences, words.
_SEPARATORS = tuple(
    map(re.compile, (r"\n(?=#{1,6} )", r"\n\s*\n", r"\n", r"(?<=[.!?])\s+|(?<=[。！？])", r"\s+"))
)  # fmt: skip
_HEADING = re.compile(r"#{1,6} ")


def digest_of(text: str) -> str:
    """The same for the same text, and another one for any other."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Passage:
    """Some text of a file, without the space around it."""

    line: int
    """Where it begins, from 1."""
    text: str

    def parts(self) -> list[Passage]:
        """Two or more passages in place of this one; itself if it has one character."""
        return list(passages_of(self.text, max(len(self.text) // 2, 1), self.line))


def passages_of(text: str, max_characters: int = MAX_CHARACTERS, first_line: int = 1) -> Iterator[Passage]:
    """The passages of a text, in order.

    Neighbours are joined while they are short. So a change of the text changes the passages around it, and mostly not
    those far behind it.

    Args:
        max_characters: of a passage.
        first_line: the number of the text's first line.
    """
    line, counted = first_line, 0
    for start, end in _joined(text, max_characters):
        passage = text[start:end]
        start += len(passage) - len(passage.lstrip())
        if passage := passage.strip():
            line += text.count("\n", counted, start)
            counted = start
            yield Passage(line, passage)


def _joined(text: str, max_characters: int) -> Iterator[tuple[int, int]]:
    """Spans of the text, as long as they may be; one that starts with a heading is not joined to what is before it."""
    start = end = 0
    for piece_start, piece_end in _pieces(text, 0, len(text), max_characters, 0):
        if end > start and (piece_end - start > max_characters or _HEADING.match(text, piece_start)):
            yield start, end
            start = piece_start
        end = piece_end
    if end > start:
        yield start, end


def _pieces(text: str, start: int, end: int, max_characters: int, level: int) -> Iterator[tuple[int, int]]:
    """Spans of the text that are short enough, cut at headings and then at the best separators that make them so."""
    if level and end - start <= max_characters:
        yield start, end
    elif level == len(_SEPARATORS):
        for at in range(start, end, max_characters):
            yield at, min(at + max_characters, end)
    else:
        for separator in _SEPARATORS[level].finditer(text, start, end):
            yield from _pieces(text, start, separator.end(), max_characters, level + 1)
            start = separator.end()
        if start < end:
            yield from _pieces(text, start, end, max_characters, level + 1)
