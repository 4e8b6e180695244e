"""What holds now: what the server says about the model that it serves."""

from __future__ import annotations

import json

from nv_embed.settings import Settings

# Of these a client learns the value that is in force, under the setting's own name.
_TOLD = (
    "dtype", "device", "query_prompt", "document_prompt", "max_sequence_tokens", "max_request_documents",
    "max_request_bytes", "max_queue_bytes", "max_queue_tokens", "max_queue_texts", "max_queue_milliseconds",
)  # fmt: skip


def model_info(settings: Settings, *, name: str, kind: str, fingerprint: str, dimension: int, pooling: str) -> bytes:
    """A JSON object in UTF-8.

    Args:
        settings: those in force, none of them "auto".
        name: as Triton knows the model.
        kind: of its checkpoint.
        fingerprint: of its checkpoint's files.
        dimension: numbers of a vector.
        pooling: how the vectors of tokens become one.
    """
    told = {setting: getattr(settings, setting) for setting in _TOLD}
    told["device"] = ",".join(settings.device)
    info = {"name": name, "kind": kind, "fingerprint": fingerprint, "dimension": dimension, "pooling": pooling}
    return json.dumps(info | told).encode()
