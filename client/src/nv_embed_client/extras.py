"""What only an extra of this package brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports: a module that is missing becomes an error that names the extra.

    Raises:
        ModuleNotFoundError: a module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nv_embed_client"):
            raise
        raise ModuleNotFoundError(
            f"expected the module {error.name}; found none; the extra {extra} brings it: "
            f'pip install "./client[{extra}]" in a clone of the repository',
            name=error.name,
        ) from error
