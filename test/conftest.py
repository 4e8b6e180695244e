"""Paths and servers that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def toy() -> Path:
    """A small random checkpoint in the published format, with the original implementation's outputs."""
    return ROOT / "test" / "data" / "toy"


@pytest.fixture(scope="session")
def mini() -> Path:
    """The embedded default checkpoint."""
    return ROOT / "checkpoints" / "nv-embed-mini"
