"""What a benchmark of servers says in the end: two tables, ratios, and one line of JSON for programs."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loads import Sample, rounded
from machine import machine
from rounds import WAYS, Rounds, Samples
from started_server import ROOT

BEFORE = ("load", "target")


def ratio(samples: Samples, over: tuple[str, str], under: tuple[str, str]) -> dict[str, float | None] | None:
    """Texts per second of one over another, round by round: median, lowest, highest."""
    ratios = [
        (a.num_texts / a.seconds) / (b.num_texts / b.seconds)
        for a, b in zip(samples.get(over, []), samples.get(under, []), strict=False)
        if a.num_texts and b.num_texts
    ]
    return spread(ratios)


def spread(ratios: Sequence[float]) -> dict[str, float | None] | None:
    """Median, lowest, highest; None without any."""
    if not ratios:
        return None
    return {"median": rounded(statistics.median(ratios)), "low": rounded(min(ratios)), "high": rounded(max(ratios))}


def report(
    arguments: argparse.Namespace,
    rounds: Rounds,
    names: Sequence[str],
    dtypes: dict[str, str | None],
    max_batch_tokens: int | None,
) -> dict[str, Any]:
    """Print it; return what the last line says.

    Args:
        arguments: of the command.
        rounds: that were run.
        names: of the servers; the first one is compared with the others.
        dtypes: by the servers' names; None where it is not known.
        max_batch_tokens: of the bare engine's full batches.
    """
    samples = rounds.samples
    results = print_rates(samples)
    core_times = [
        {"load": load, "target": target, **spent.per_request()} for (load, target), spent in rounds.core_times.items()
    ]
    print("\nCore-milliseconds a request:")
    print_table(
        [[*core_times[0]], *([_cell(value) for value in row.values()] for row in core_times)] if core_times else []
    )
    print()
    ratios = ratios_of(samples, names)
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f} by round)")
    passes = {name: statistics.median(seconds) for name, seconds in rounds.passes.items()}
    if passes:
        bound = 1.5 * passes["full batch"] + passes["one query"]
        print(
            f"forward pass: full batch of {max_batch_tokens} tokens {1000 * passes['full batch']:.0f} ms, one query "
            f"{1000 * passes['one query']:.1f} ms; 1.5 full batches and one query: {1000 * bound:.0f} ms"
        )
    print("dtype: " + "; ".join(f"{name}: {dtype or 'not known'}" for name, dtype in dtypes.items()))
    void = {name: rounds.void[name] for name in rounds.loads}
    print("void rounds, because of other work: " + ", ".join(f"{name} {count}" for name, count in void.items()))
    settings = {k: os.path.relpath(v, ROOT) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    if arguments.compare:  # what other servers were started with is not known
        settings["NV_EMBED_CACHE_MEBIBYTES"] = os.environ.get("NV_EMBED_CACHE_MEBIBYTES", "default")
    return {
        "benchmark": "serving",
        "settings": settings,
        "machine": machine(arguments.device),
        "dtypes": dtypes,
        "max_batch_tokens": max_batch_tokens,
        "void_rounds": void,
        "results": results,
        "core_ms_per_request": core_times,
        "ratios": ratios,
        "forward_pass_ms": {name: rounded(1000 * seconds) for name, seconds in passes.items()},
    }


def print_rates(samples: Samples) -> list[dict[str, Any]]:
    """Print throughput and latency; return them, an entry for each row."""
    rows = [[*BEFORE, "requests", "errors", "req/s", "texts/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms"]]
    results = []
    retries = []
    for (stream, target), rounds in samples.items():
        total = Sample()
        for sample in rounds:
            total.add(sample)
        summary = total.summary()
        results.append({"load": stream, "target": target, **summary})
        numbers = [summary["requests"], total.errors.total(), *list(summary.values())[3:]]
        rows.append([stream, target, *map(_cell, numbers)])
        if total.retries:
            retries.append(f"{stream}, {target}: {total.retries} requests sent again: the connection had been closed")
    print_table(rows)
    for line in retries:
        print(line)
    return results


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Load and target to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sides = zip(row, widths, strict=True)
        cells = [cell.ljust(w) if i < len(BEFORE) else cell.rjust(w) for i, (cell, w) in enumerate(sides)]
        print("  ".join(cells).rstrip())


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else f"{value:g}"


def ratios_of(samples: Samples, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """By what is compared, as far as both were measured."""
    ratios = {}
    for stream in ("query", "documents", "cached"):
        for other in names[1:]:
            over, under = (other, names[0]) if other == "gateway" else (names[0], other)
            ratios[f"{stream}: {over} / {under}"] = ratio(samples, (stream, over), (stream, under))
        for target in WAYS:
            ratios[f"{stream}: {names[0]} / {target}"] = ratio(samples, (stream, names[0]), (stream, target))
    for name in names:
        ratios[f"bulk beside queries / bulk alone: {name}"] = ratio(
            samples, ("bulk beside", name), ("bulk alone", name)
        )
    return {name: value for name, value in ratios.items() if value}
