"""Columns of tables with texts and vectors, as `nv-embed embed` and bulk jobs read and write them."""

from __future__ import annotations

from typing import Any

EMBEDDING = "embedding"
ADDED = (EMBEDDING, "num_tokens", "is_truncated")
"""What the output has beside the input's columns."""


def holds_strings(column_type: Any) -> bool:
    """Whether a column of this type, a pyarrow.DataType, may be one of texts. Needs pyarrow."""
    import pyarrow as pa

    kind = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
