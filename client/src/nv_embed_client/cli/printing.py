"""What goes to people: numbers first and texts last, so that columns stay straight whatever script a text is in."""

from __future__ import annotations

import os
import shutil
import sys

from nv_embed_client.wire import EmbedResult


def one_line(text: str, used: int = 0) -> str:
    """A text as the rest of a line, without what could change the terminal's state.

    Args:
        text: its line breaks become spaces.
        used: characters that the line has before it. On a terminal the text is cut to what is left.
    """
    text = " ".join(_harmless(text, " ").split())
    if not sys.stdout.isatty():
        return text
    room = max(shutil.get_terminal_size().columns - used, 20)
    return text if len(text) <= room else text[: room - 1] + "…"


def warn_of_cut(*results: EmbedResult) -> None:
    """Say on the standard error which of these texts were cut, counted from 1."""
    cuts = [cut for result in results if result.is_truncated is not None for cut in result.is_truncated]
    if numbers := [str(number) for number, cut in enumerate(cuts, 1) if cut]:
        print(
            f"nv-embed: expected texts that the model reads to their ends; got longer ones: {', '.join(numbers)}; "
            "shorten them, because their scores are those of their beginnings",
            file=sys.stderr,
        )


def place(path: str, line: int) -> str:
    """Of a file with an absolute path: relative where it is in the current folder, so that it can be clicked."""
    relative = os.path.relpath(path)
    return f"{_harmless(path if relative.startswith('..') else relative, '?')}:{line}"


def _harmless(text: str, instead: str) -> str:
    """The text with something instead of each character that could change the terminal's state."""
    return "".join(c if c.isprintable() else instead for c in text)
