"""How fast the network computes, beside what the device could do at most and beside the usual way.

    python benchmarks/engine.py                          # full size, on the GPU; needs 40 GB of its memory
    python benchmarks/engine.py --device cpu --quick     # anywhere, in a minute: a small network, short texts

Weights are random, drawn on the device under the published names: no files. Both sides get the same ones. Ours is the
serving engine, from lists of token ids to vectors on the host, its batches filled up to a budget of tokens. The usual
way is `transformers`' Mistral with SDPA on padded rows and the latent head unfolded, as in benchmarks/baseline; its
batches are filled up to the same budget, padding counted, in the order of the texts (unsorted) or by length (sorted).

The ceiling is what a large matrix product reaches in the same run, in the same precision; beside 8 bits, ceiling and
usual way are in the precision that the rest of the network has. `ceiling_fraction` is the
share of it that our side's operations come to, the attention's counted, nothing counted that folding saved.

Every measurement of a side is a pass over the same texts; the sides take turns, and the median pass counts. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from started_server import ROOT, progress
from synthetic import published_config, random_weights

sys.path[:0] = [
    str(ROOT / "model_repository" / "nv-embed-v2" / "1"),
    str(ROOT / "benchmarks" / "baseline" / "model_repository" / "nv-embed-v2" / "1"),
]

from nv_embed.compute.attention import choose_attention  # noqa: E402
from nv_embed.compute.devices import existing_device  # noqa: E402
from nv_embed.compute.engine import Engine, PackedModel  # noqa: E402
from nv_embed.compute.precision import Precision, Rounding  # noqa: E402
from nv_embed.compute.weights import fill_network  # noqa: E402
from nv_embed.models.config_file import Section  # noqa: E402
from nv_embed.models.nv_embed import NVEmbedCheckpoint  # noqa: E402
from nv_embed.models.protocol import Attend, Network  # noqa: E402
from nv_embed.sequence import TokenSequence  # noqa: E402
from padded import PaddedNetwork  # noqa: E402

NUM_MASKED = 18  # of the standard instruction
QUERY_TOKENS = 30  # of a short question, the instruction included


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is."""

    name: str
    text_config: dict[str, Any]
    latent_config: dict[str, int]
    lengths: tuple[int, ...]
    longest: int  # of the log-normal mix
    num_tokens: int  # of each mix, at least
    budgets: tuple[int, ...]
    budget: int  # of every mix
    matrix: int  # rows and columns of the matrices that show the ceiling


FULL = Size(
    name="published",
    text_config={
        "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336,
    },
    latent_config={"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 4096},
    lengths=(16, 64, 512, 2048, 8192, 32768), longest=8192, num_tokens=131_072,
    budgets=(1024, 2048, 4096, 8192, 16384, 32768, 65536), budget=16384, matrix=8192,
)  # fmt: skip
QUICK = Size(
    name="small",
    text_config={
        "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 896,
    },
    latent_config={"num_latents_value": 32, "num_cross_heads": 8, "cross_dim_head": 256},
    lengths=(16, 64, 512), longest=512, num_tokens=8192, budgets=(512, 2048), budget=2048, matrix=1024,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", help="as the server's parameter (float16 on a GPU, float32 on a CPU)")
    parser.add_argument("--attention", default="auto", help="as the server's parameter (%(default)s)")
    parser.add_argument("--compile", default="auto", help="as the server's parameter (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small network, short texts, few passes")
    parser.add_argument("--lengths", help="only these, separated by commas; the log-normal mix always")
    parser.add_argument("--passes", type=int, help="of every measurement (5; quick: 3)")
    parser.add_argument("--no-baseline", action="store_true", help="leave the usual way out")
    parser.add_argument("--seed", type=int, default=1, help="of weights and lengths (%(default)s)")
    parser.add_argument("--plot", type=Path, help="write a picture there; needs matplotlib")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # which kernels, compiled or not
    size = QUICK if arguments.quick else FULL
    if arguments.lengths:
        size = replace(size, lengths=tuple(int(length) for length in arguments.lengths.split(",")))
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "float16")
    passes = arguments.passes or (3 if arguments.quick else 5)
    with torch.inference_mode():
        result = run(
            size, device, dtype, arguments.attention, arguments.compile, passes, not arguments.no_baseline,
            arguments.seed,
        )  # fmt: skip
    print(table(result))
    if arguments.plot:
        plot(result, arguments.plot)
    print(json.dumps(result))


def run(
    size: Size, device: torch.device, dtype_name: str, attention: str, compile_layers: str, passes: int,
    has_baseline: bool, seed: int,
) -> dict[str, Any]:  # fmt: skip
    config = NVEmbedCheckpoint.read(Section(published_config(size.text_config, size.latent_config)))
    precision = Precision.choose(dtype_name, device, config)
    dtype = precision.dtype  # of the usual way and of the ceiling, which know no 8 bits
    raw = published_config(size.text_config, size.latent_config)
    weights = random_weights(config, device, dtype, seed)
    network = empty_network(config, precision, choose_attention(attention, config.heads, device, dtype))
    rounding = Rounding(network, precision, sequences([40, 25], config.vocab_size, seed)) if precision.matrix else None
    fill_network(network, weights, device, rounding)
    engine = Engine(PackedModel(network, device, compile_layers), existing_device(str(device)))
    baseline = PaddedNetwork(raw, weights) if has_baseline else None
    if baseline:
        check_alike(engine, baseline, config, seed, precision.matrix.least_cosine if precision.matrix else 0.999)
    ceiling = measure_ceiling(size, device, dtype)
    progress(f"ceiling: {ceiling['flops'] / 1e12:.3g} TFLOP/s, {ceiling['bytes_per_s'] / 1e9:.3g} GB/s copied")

    mixes = {str(length): [length] * max(1, size.num_tokens // length) for length in size.lengths}
    mixes["lognormal"] = lognormal(size, seed)
    result: dict[str, Any] = {"mixes": {}, "budgets": {}}
    for name, lengths in mixes.items():
        texts = sequences(lengths, config.vocab_size, seed)
        result["mixes"][name] = measure_mix(engine, baseline, config, texts, size.budget, ceiling["flops"], passes)
        progress(f"{name}: {result['mixes'][name]}")
    texts = sequences(mixes["lognormal"], config.vocab_size, seed)
    for budget in size.budgets:
        seconds = median_seconds([lambda b=budget: embed_packed(engine, texts, b)], device, passes)[0]
        result["budgets"][str(budget)] = round(sum(mixes["lognormal"]) / seconds, 1)
    result["query_ms"] = measure_query(engine, baseline, config, device)
    return result | {
        "ceiling": {name: float(f"{value:.4g}") for name, value in ceiling.items()},
        "size": size.name,
        "budget": size.budget,
        "passes": passes,
        "attention": network.attend.__name__,
        "compiled": engine.model.is_compiled,
        "dtype": dtype_name,
        "threads": torch.get_num_threads(),
        **machine(str(device)),
    }


def empty_network(config: NVEmbedCheckpoint, precision: Precision, attend: Attend) -> Network:
    with torch.device("meta"):
        network = config.network().to(precision.dtype).eval()
    network.attend = attend
    return network


# --- weights and texts ----------------------------------------------------------------------------------


def lognormal(size: Size, seed: int) -> list[int]:
    """Lengths in tokens as documents have them: half of them below 200, a few as long as is allowed."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < size.num_tokens:
        lengths.append(int(np.clip(generator.lognormal(np.log(min(200, size.longest / 4)), 1.0), 8, size.longest)))
    return lengths


def sequences(lengths: Sequence[int], vocab_size: int, seed: int, num_masked: int = 0) -> list[TokenSequence]:
    generator = np.random.default_rng(seed)
    return [TokenSequence(generator.integers(3, vocab_size, n).astype(np.int32), num_masked) for n in lengths]


# --- the two sides --------------------------------------------------------------------------------------


def batches(texts: Sequence[TokenSequence], budget: int, *, is_padded: bool) -> Iterator[list[TokenSequence]]:
    """In order, each of at most `budget` tokens, or of one text."""
    batch: list[TokenSequence] = []
    longest = total = 0
    for text in texts:
        longest, total = max(longest, text.num_tokens), total + text.num_tokens
        if batch and (longest * (len(batch) + 1) if is_padded else total) > budget:
            yield batch
            batch, longest, total = [], text.num_tokens, text.num_tokens
        batch.append(text)
    yield batch


def embed_packed(engine: Engine, texts: Sequence[TokenSequence], budget: int) -> None:
    """As the server does: on a GPU one thread starts a batch while the other one waits for its own."""
    waiting = batches(texts, budget, is_padded=False)
    with ThreadPoolExecutor(1 if engine.device.type == "cpu" else 2) as threads:
        for work in [threads.submit(embed_all, engine, waiting) for _ in range(2)]:
            work.result()


def embed_all(engine: Engine, waiting: Iterator[list[TokenSequence]]) -> None:
    while engine.compute(lambda: next(waiting, None)):  # which never runs in two threads at a time
        pass


def embed_padded(baseline: PaddedNetwork, texts: Sequence[TokenSequence], budget: int) -> None:
    for batch in batches(texts, budget, is_padded=True):
        baseline.embed([text.input_ids.tolist() for text in batch], batch[0].num_masked).cpu()


def check_alike(
    engine: Engine, baseline: PaddedNetwork, config: NVEmbedCheckpoint, seed: int, least_cosine: float
) -> None:
    """Two networks that do not compute the same are not worth a comparison."""
    texts = sequences([40, 25, 33], config.vocab_size, seed, NUM_MASKED)
    ours = torch.from_numpy(engine.embed(texts))
    rows = [text.input_ids.tolist() for text in texts]
    padded, alone = baseline.embed(rows, NUM_MASKED), torch.cat([baseline.embed([row], NUM_MASKED) for row in rows])
    cosine = min((ours * theirs.cpu()).sum(1).min().item() for theirs in (padded, alone))
    if not cosine >= least_cosine:
        raise SystemExit(f"expected the same vectors from both sides; got a cosine of {cosine:.5f}")


# --- measuring ------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(sides: Sequence[Callable[[], object]], device: torch.device, passes: int) -> list[float]:
    """Of each side, after one pass that does not count; sides take turns, so that drift meets all alike."""
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(passes + 1):
        for side, taken in zip(sides, seconds, strict=True):
            synchronize(device)
            started = time.perf_counter()
            side()
            synchronize(device)
            if number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def measure_ceiling(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of a large matrix product, bytes per second of a large copy (read and written)."""
    a, b = (torch.randn(size.matrix, size.matrix, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    repeats = 10

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    source = torch.empty(2**28, dtype=torch.uint8, device=device)  # beyond every cache
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    product, copied = median_seconds([multiply, copy], device, 5)
    return {
        "flops": repeats * 2 * size.matrix**3 / product,
        "bytes_per_s": repeats * 2 * source.numel() / copied,
    }


def operations(config: NVEmbedCheckpoint, lengths: Sequence[int]) -> float:
    """Multiplications and additions of our forward pass: matrix products and attention, all tokens pooled."""
    c, q = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    layer = c * (q + 2 * kv) + q * c + 3 * c * config.intermediate_size
    head = 2 * c * config.num_cross_heads * config.num_latents + 8 * c * c
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    return 2.0 * (
        tokens * (config.num_layers * layer + head) + 2 * config.num_layers * q * squares + len(lengths) * 4 * c * c
    )


def measure_mix(
    engine: Engine, baseline: PaddedNetwork | None, config: NVEmbedCheckpoint,
    texts: list[TokenSequence], budget: int, ceiling: float, passes: int,
) -> dict[str, Any]:  # fmt: skip
    device = engine.device
    by_length = sorted(texts, key=lambda text: text.num_tokens)
    if device.type == "cuda":  # of ours alone: what else is allocated is the other side's weights
        own = sum(parameter.nbytes for parameter in engine.model.network.parameters())
        others = torch.cuda.memory_allocated(device) - own
        torch.cuda.reset_peak_memory_stats(device)
        embed_packed(engine, texts, budget)
        peak = torch.cuda.max_memory_allocated(device) - others
    sides: list[Callable[[], object]] = [lambda: embed_packed(engine, texts, budget)]
    if baseline:
        sides += [lambda: embed_padded(baseline, texts, budget), lambda: embed_padded(baseline, by_length, budget)]
    seconds = median_seconds(sides, device, passes)
    lengths = [text.num_tokens for text in texts]
    found: dict[str, Any] = {
        "tokens_per_s": round(sum(lengths) / seconds[0], 1),
        "texts_per_s": round(len(lengths) / seconds[0], 2),
        "ceiling_fraction": round(operations(config, lengths) / seconds[0] / ceiling, 3),
    }
    if baseline:
        found["baseline_ratio"] = round(seconds[1] / seconds[0], 2)
        found["baseline_sorted_ratio"] = round(seconds[2] / seconds[0], 2)
    if device.type == "cuda":
        found["peak_memory_bytes"] = peak
    return found


def measure_query(
    engine: Engine, baseline: PaddedNetwork | None, config: NVEmbedCheckpoint, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of one short query alone."""
    texts = sequences([QUERY_TOKENS], config.vocab_size, 0, NUM_MASKED)
    sides: list[Callable[[], object]] = [lambda: engine.embed(texts)]
    if baseline:
        sides.append(lambda: embed_padded(baseline, texts, QUERY_TOKENS))
    seconds = median_seconds(sides, device, 30)
    return {name: round(1000 * s, 3) for name, s in zip(("engine", "baseline"), seconds, strict=False)}


# --- reporting ------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['size']} size, {result['dtype']}, {result['device']}, torch {result['torch']}, {result['date']}",
        f"ceiling {result['ceiling']['flops'] / 1e12:.3g} TFLOP/s; batches of {result['budget']} tokens; median of "
        f"{result['passes']} passes",
        "",
        f"{'tokens a text':<14}{'tokens/s':>10}{'of ceiling':>12}{'x usual way':>13}{'x sorted':>10}{'peak GB':>9}",
    ]
    for name, found in result["mixes"].items():
        ratio, by_length = (found.get(key, "-") for key in ("baseline_ratio", "baseline_sorted_ratio"))
        memory = f"{found['peak_memory_bytes'] / 1e9:.1f}" if "peak_memory_bytes" in found else "-"
        share = f"{100 * found['ceiling_fraction']:.0f} %"
        lines.append(f"{name:<14}{found['tokens_per_s']:>10,.0f}{share:>12}{ratio:>13}{by_length:>10}{memory:>9}")
    lines += ["", "log-normal mix by batch budget, tokens/s: " + ", ".join(
        f"{budget}: {rate:,.0f}" for budget, rate in result["budgets"].items()
    )]  # fmt: skip
    lines += ["one short query, ms: " + ", ".join(f"{name} {ms}" for name, ms in result["query_ms"].items()), ""]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(result["mixes"])
    left.bar(names, [100 * found["ceiling_fraction"] for found in result["mixes"].values()])
    left.set(xlabel="tokens a text", ylabel="% of the matrix-product ceiling", ylim=(0, 100))
    ratios = [found.get("baseline_ratio", 0) for found in result["mixes"].values()]
    right.bar(names, ratios)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="tokens a text", ylabel="times the usual way (unsorted)")
    figure.suptitle(f"{result['device']}, {result['dtype']}, {result['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
