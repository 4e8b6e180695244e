"""A corpus to vectors in Parquet with Ray (`job`), and from there into LanceDB (`lance`); needs the extra `bulk`."""

from __future__ import annotations

ROWS_PER_FILE = 4096
"""Of OUTPUT, and of what a kill may cost."""
WORKERS = 4
"""Processes that send requests."""
PATIENCE_SECONDS: float = 1800
"""How long a server may be away before a job ends with an error."""
