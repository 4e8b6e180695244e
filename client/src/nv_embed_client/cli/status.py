"""nv-embed status: whether a server is ready, and what it serves."""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request
from dataclasses import asdict
from typing import Any

import orjson

from nv_embed_client.cli import Commands
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.errors import InvalidInput, Unavailable
from nv_embed_client.model_info import ModelInfo

_TIMEOUT_SECONDS = 10.0
_WAITING = ("queue_tokens", "queue_bytes")  # of the server's metrics


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "status",
        parents=[server],
        help="say whether the server is ready, and what it serves",
        description="Say what the model is, and its limits. If it is not ready, the exit code is 1.",
    )
    parser.add_argument(
        "--metrics-url",
        metavar="URL",
        help="also say what waits now, from the server's metrics: http://HOST:8002/metrics by default of the server",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Ask and print; returns the exit code."""
    with NVEmbedClient(parsed.url, parsed.model_name) as client:
        info = client.model_info(_TIMEOUT_SECONDS) if client.is_ready() else None
    waiting = _waiting(parsed.metrics_url, parsed.model_name) if info and parsed.metrics_url else {}
    if parsed.json:
        told = {"url": parsed.url, "ready": info is not None} | (asdict(info) if info else {}) | waiting
        sys.stdout.buffer.write(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
    elif info is not None:
        for name, value in _in_words(parsed.url, info, waiting).items():
            print(f"{name:12}{value}")
    if info is None:
        raise Unavailable(f"the model {parsed.model_name} is not ready")
    return 0


def _in_words(url: str, info: ModelInfo, waiting: dict[str, int]) -> dict[str, str]:
    words = {
        "server": f"{url}, ready",
        "model": f"{info.name} ({info.kind}), {info.dtype} on {info.device}",
        "fingerprint": info.fingerprint,
        "dimension": f"{info.dimension}, pooling {info.pooling}",
        "query": repr(info.query_prompt),
        "document": repr(info.document_prompt),
        "text": f"up to {info.max_sequence_tokens:,} tokens; longer ones are cut",
        "request": f"up to {info.max_request_documents:,} texts and {info.max_request_bytes:,} bytes",
        "queue": f"up to {info.max_queue_tokens:,} tokens, {info.max_queue_texts:,} texts and "
        f"{info.max_queue_bytes:,} bytes, for {info.max_queue_milliseconds:,} ms",
    }
    if waiting:
        words["waiting"] = f"{waiting['queue_tokens']:,} tokens, and {waiting['queue_bytes']:,} bytes of other text"
    return words


def _waiting(url: str, model_name: str) -> dict[str, int]:
    """What the server's metrics say of its queue."""
    if not re.match(r"https?://", url):
        raise InvalidInput.of(expected="http:// or https:// as --metrics-url", got=repr(url), remedy="correct it")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            page = response.read().decode()
    except (OSError, ValueError) as error:
        raise InvalidInput.of(
            expected=f"metrics at {url}", got=str(error), remedy="correct --metrics-url, or leave it out"
        ) from None
    found: dict[str, Any] = {}
    for name in _WAITING:
        series = rf'^nv_embed_{name}\{{[^}}]*model="{re.escape(model_name)}"[^}}]*\}} (\S+)$'
        values = re.findall(series, page, re.MULTILINE)
        if not values:
            raise InvalidInput.of(
                expected=f"nv_embed_{name} of {model_name} at {url}", got="a page without it",
                remedy="give the address of this server's metrics",
            )  # fmt: skip
        found[name] = int(sum(map(float, values)))
    return found
