"""A corpus to vectors, from the first look at it to the file that says that all is done. Ray carries it out.

Each part of OUTPUT has the rows that the plan gives to its number, and its file comes whole or not at all. So whoever
writes it, and however often, an id is there once: neither a log of what was done nor a set of ids is needed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data
from tqdm.auto import tqdm

from nv_embed_client.bulk import PATIENCE_SECONDS, WORKERS, parts
from nv_embed_client.bulk.folder import Folder, absolute
from nv_embed_client.bulk.plan import SUCCESS, Plan, Wish
from nv_embed_client.bulk.progress import Progress, Shown
from nv_embed_client.bulk.source import corpus_of
from nv_embed_client.bulk.survey import planned
from nv_embed_client.bulk.worker import Worker, raised
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.connection import DEFAULT_MODEL_NAME, DEFAULT_URL
from nv_embed_client.errors import InvalidInput

_CPUS_OF_A_WORKER = 0.25  # it mostly waits for the server


@dataclass(frozen=True, slots=True)
class Summary:
    """What is in OUTPUT."""

    num_rows: int  # with vectors
    num_failed: int
    num_before: int
    """Of both, what earlier runs did."""
    num_tokens: int = 0  # that this run computed
    seconds: float = 0.0
    """From the start of its workers to its last part."""


def embed_corpus(
    wish: Wish,
    output: str,
    *,
    url: str = DEFAULT_URL,
    model_name: str = DEFAULT_MODEL_NAME,
    ray_address: str | None = None,
    workers: int = WORKERS,
    patience_seconds: float = PATIENCE_SECONDS,
    progress: Shown = "nothing",
) -> Summary:
    """Embed the rows of `wish.input` into Parquet files in `output`; continue what was begun there.

    Args:
        wish: what to embed, and how.
        output: a folder or an address; of a cluster's job, one that all nodes share.
        url: of the server or servers.
        ray_address: of a cluster of Ray; None starts Ray on this machine.
        workers: processes that send requests.
        patience_seconds: how long a server may be away before the job ends with an error.
        progress: what to show on the standard error.

    Raises:
        InvalidInput: something must be mended before the job can go on.
        NVEmbedError: no server, or none for too long. The same call continues.
        OSError: a file cannot be read or written. The same call continues.
    """
    wish, output = _checked(wish, output, workers, patience_seconds)
    folder = Folder.at(output)
    plan = Plan.read(folder)
    if (told := folder.read(SUCCESS)) is not None and plan is not None:
        plan.check(wish, None, output)
        return Summary(**json.loads(told), num_before=plan.num_rows)
    if plan is None and not folder.is_empty():
        raise InvalidInput.of(
            expected="an empty folder, or one that this command began", got=repr(output), remedy="choose another OUTPUT"
        )
    with NVEmbedClient(url, model_name) as client:
        model = client.model_info().identity
    files, others = corpus_of(Folder.at(wish.input), wish.input)
    if others:
        tqdm.write(f"{len(others)} other files are left out, such as {others[0].name}", file=sys.stderr)
    if plan is not None:
        plan.check(wish, tuple(files), output)
        plan.model.check(model, output)
    with _ray(ray_address):
        if plan is None:
            plan = planned(wish, model, tuple(files))
            plan.write(folder)
            done_parts = {}
        else:
            done_parts = parts.finished(folder, range(len(plan.pieces)))
        num_before = sum(plan.pieces[number].num_rows for number in done_parts)
        todo = [number for number in range(len(plan.pieces)) if number not in done_parts]
        shown = Progress(plan.num_rows, num_before, progress)
        try:
            if todo:
                _embed(plan, todo, (output, url, model_name, patience_seconds), workers, shown)
            seconds = shown.seconds
        finally:
            shown.close()
    return replace(_finish(folder, plan, num_before), num_tokens=shown.num_tokens, seconds=seconds)


def _checked(wish: Wish, output: str, workers: int, patience_seconds: float) -> tuple[Wish, str]:
    for name, value in (("rows_per_file", wish.rows_per_file), ("workers", workers), ("patience", patience_seconds)):
        if not value > 0:
            raise InvalidInput.of(expected=f"{name} of more than 0", got=str(value), remedy="correct it")
    fields = {name: getattr(wish, name) for name in Wish.__dataclass_fields__}
    wish, output = Wish(**fields | {"input": absolute(wish.input)}), absolute(output)
    if f"{output}/".startswith(f"{wish.input.rstrip('/')}/"):
        raise InvalidInput.of(
            expected="an OUTPUT outside INPUT, because all files there are read", got=output, remedy="choose another"
        )
    return wish, output


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells nobody about this machine, unless asked to
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its own words go to the terminal, between the progress
    here: dict[str, Any] = {"address": "local", "include_dashboard": False}
    try:
        _check_reachable(address)
        with _without_rays_first_line():
            ray.init(
                **(here if address is None else {"address": address}),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, ValueError) as error:
        raise InvalidInput.of(
            expected="a cluster of Ray at --ray-address",
            got=f"{address!r}: {error}",
            remedy="start one with `ray start --head`, or leave it out to use this machine",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_rays_first_line() -> Iterator[None]:
    """Without what Ray's C++ writes to the standard error only because RAY_BACKEND_LOG_LEVEL is set."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if b"Set ray log level" not in line:
                    os.write(2, line)


def _check_reachable(address: str | None) -> None:
    """Raise an OSError or a ValueError at once, where Ray would try for more than a minute and then abort."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def _embed(plan: Plan, todo: list[int], told: tuple[str, str, str, float], workers: int, progress: Progress) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks
    context.print_on_execution_start = False
    numbers = ray.data.from_items([{"number": number} for number in todo], override_num_blocks=len(todo))
    rows = numbers.map_batches(
        Worker,
        fn_constructor_args=told,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
        num_cpus=_CPUS_OF_A_WORKER,
    )
    for row in rows.iter_rows():
        if row["kind"]:
            raise raised(row["kind"], row["message"])
        num_rows = plan.pieces[row["number"]].num_rows
        progress.add(num_rows, num_rows - row["num_rows"], row["num_tokens"])


def _finish(folder: Folder, plan: Plan, num_before: int) -> Summary:
    """Look at every file once more, and say in OUTPUT that all is there."""
    there = parts.finished(folder, range(len(plan.pieces)))
    missing = [number for number in range(len(plan.pieces)) if number not in there]
    if missing:
        raise OSError(
            f"expected {len(plan.pieces)} files in {folder.path}; got none, or a broken one, for {len(missing)}, such "
            f"as {parts.name_of(missing[0])}; run the same command again, and let nobody else write there"
        )
    num_rows = sum(there.values())
    counts = {"num_rows": num_rows, "num_failed": plan.num_rows - num_rows}
    folder.write(SUCCESS, json.dumps(counts).encode())
    folder.tidy()
    return Summary(**counts, num_before=num_before)
