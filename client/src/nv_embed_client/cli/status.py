"""nv-embed status: whether a server is ready, and what it serves."""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import orjson

from nv_embed_client.addresses import places_of
from nv_embed_client.cli import Commands
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.errors import DeadlineExceeded, InvalidInput, NVEmbedError
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.retry import RetryPolicy

_TIMEOUT_SECONDS = 10.0
_ASKED_AT_ONCE = 16
_WAITING = ("queue_tokens", "queue_bytes")  # of the server's metrics


def add_to(commands: Commands, server: argparse.ArgumentParser) -> None:
    """Add the subcommand, with the arguments of `server`."""
    parser = commands.add_parser(
        "status",
        parents=[server],
        help="say whether the server is ready, and what it serves",
        description="Say of each server whether it is ready, what the model is, and its limits. If none is ready, the "
        "exit code is 1.",
    )
    parser.add_argument(
        "--metrics-url",
        metavar="URL",
        help="also say what waits now, from the server's metrics: http://HOST:8002/metrics by default of the server",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Ask each server and print; returns the exit code."""
    places_of(parsed.url)  # refuses what makes no sense
    urls: list[str] = parsed.url.split(",")
    with ThreadPoolExecutor(min(len(urls), _ASKED_AT_ONCE)) as pool:
        told = dict(zip(urls, pool.map(partial(_asked, model_name=parsed.model_name), urls), strict=True))
    info = next((each for each in told.values() if isinstance(each, ModelInfo)), None)
    states = {url: _state(each, info) for url, each in told.items()}
    waiting = _waiting(parsed.metrics_url, parsed.model_name) if info and parsed.metrics_url else {}
    if parsed.json:
        servers = [
            {"url": url, "ready": isinstance(each, ModelInfo), "state": states[url]} for url, each in told.items()
        ]
        words = {"url": parsed.url, "ready": info is not None, "servers": servers}
        words |= (asdict(info) if info else {}) | waiting
        sys.stdout.buffer.write(orjson.dumps(words, option=orjson.OPT_APPEND_NEWLINE))
    elif info is not None or len(urls) > 1:
        for url, state in states.items():
            print(f"{'server':12}{url}{', ' if isinstance(told[url], ModelInfo) else ': '}{state}")
        for name, value in (_in_words(info, waiting) if info else {}).items():
            print(f"{name:12}{value}")
    if info is None:
        raise next(each for each in told.values() if isinstance(each, NVEmbedError))
    return 0


def _asked(url: str, model_name: str) -> ModelInfo | NVEmbedError:
    """What one server says, or why it does not."""
    with NVEmbedClient(url, model_name, retry=RetryPolicy(max_attempts=1)) as client:
        try:
            return client.model_info(_TIMEOUT_SECONDS)
        except NVEmbedError as error:
            return error


def _state(told: ModelInfo | NVEmbedError, first: ModelInfo | None) -> str:
    if isinstance(told, ModelInfo):
        same = first is None or told.fingerprint == first.fingerprint
        return "ready" if same else f"ready with another model, whose fingerprint is {told.fingerprint}"
    is_absent = isinstance(told, DeadlineExceeded) or "failed to connect" in str(told)
    return "no answer" if is_absent else str(told)


def _in_words(info: ModelInfo, waiting: dict[str, int]) -> dict[str, str]:
    words = {
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
