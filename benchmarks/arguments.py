"""What the benchmarks' command lines accept as a number."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _checked(int, text, "a whole number of at least 1", lambda number: number >= 1)


def positive(text: str) -> float:
    """Seconds, or so many in a second."""
    return _checked(float, text, "a number above 0", lambda number: 0 < number < float("inf"))


def share(text: str) -> float:
    """A part of a whole."""
    return _checked(float, text, "a share from 0 to 1", lambda number: 0 <= number <= 1)


def _checked(kind: type[N], text: str, expected: str, is_right: Callable[[N], bool]) -> N:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not is_right(number):  # NaN is not
        raise ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number
