"""Texts of like length together: little padding, and few shapes."""

from collections.abc import Callable, Sequence


def padded(length: int) -> int:
    """The width of rows of at most that many tokens: less than an eighth more, so that there are but eight an octave.

    On a CPU each new shape of a half-precision product is compiled: with any length, up to a third of the time.
    """
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def by_length(rows: Sequence[Sequence[int]], max_tokens: int, width: Callable[[int], int] = int) -> list[list[int]]:
    """Indices of rows in batches, shortest first, of at most `max_tokens`, each row counted as the batch's `width`.

    A row of more than that is a batch by itself.
    """
    made: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not made or (len(made[-1]) + 1) * width(len(rows[i])) > max_tokens:
            made.append([])
        made[-1].append(i)
    return made
