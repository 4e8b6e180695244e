"""A picture of what a benchmark of servers measured; needs matplotlib."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from rounds import Samples
from started_server import progress


def plot(path: Path, samples: Samples) -> None:
    """Latency distributions of every load and throughput beside them, one colour a target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    streams = list(dict.fromkeys(stream for stream, _ in samples))
    targets = list(dict.fromkeys(target for _, target in samples))
    colours = {target: f"C{i}" for i, target in enumerate(targets)}
    figure, axes = pyplot.subplots(
        2, len(streams), figsize=(3.4 * len(streams), 6.4), squeeze=False, layout="constrained"
    )
    for column, stream in enumerate(streams):
        rate, latency = axes[0][column], axes[1][column]
        here = [target for target in targets if (stream, target) in samples]
        for i, target in enumerate(here):
            rounds = samples[stream, target]
            rates = [sample.num_texts / sample.seconds for sample in rounds if sample.seconds]
            rate.bar(i, statistics.median(rates) if rates else 0, color=colours[target], label=target)
            rate.plot([i] * len(rates), rates, ".", color="black", markersize=4)
            seconds = sorted(second for sample in rounds for second in sample.latencies)
            if seconds and not target.startswith("engine"):
                share = 1 - np.arange(len(seconds)) / len(seconds)
                latency.step(np.array(seconds) * 1000, share, color=colours[target], label=target)
        rate.set_title(stream)
        rate.set_xticks([])
        rate.set_ylabel("texts/s (dots: rounds)" if column == 0 else "")
        latency.set_xscale("log")
        latency.set_yscale("log")
        for axis in (latency.xaxis, latency.yaxis):
            axis.set_minor_formatter(NullFormatter())  # else their labels overlap within one decade
        latency.set_xlabel("latency, ms")
        latency.set_ylabel("share of requests that take longer" if column == 0 else "")
        latency.grid(alpha=0.3)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    figure.savefig(path, dpi=120)
    progress(f"plot: {path}")
