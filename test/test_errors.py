"""What is kept of a library's error."""

from __future__ import annotations

import pytest
from nv_embed.errors import in_short


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("out of memory", "out of memory"),
        ("", "RuntimeError"),
        (
            "Error(s) in loading state_dict for Linear:\n\tsize mismatch for weight: [2, 3]",
            "Error(s) in loading state_dict for Linear: size mismatch for weight: [2, 3]",
        ),
        ("\n\n  one\n   two\n", "one two"),
    ],
)
def test_every_line_of_an_error_is_kept_on_one(message, expected):
    assert in_short(RuntimeError(message)) == expected


@pytest.mark.parametrize("filling", ["line\n" * 1000, "x" * 5000])
def test_of_a_long_error_the_start_and_the_end_are_kept(filling):
    kept = in_short(RuntimeError(f"what failed:\n{filling}\nwhy it failed"))
    assert kept.startswith("what failed: ")
    assert " ... " in kept
    assert kept.endswith("why it failed")
    assert len(kept) < 600
