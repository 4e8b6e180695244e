"""results.json and the model card, README.md, written beside the weights from what the run recorded."""

import json
from pathlib import Path
from typing import Any

from text import SOURCES, WORDNET


def write(out: Path, results: dict[str, Any]) -> None:
    """`results`: run (settings and counts), figures by model, learning curve."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    run, figures, curve = results["run"], results["figures"], results["curve"]
    judged = [
        f"\n| {key} | {'0.65' if key.startswith('Spearman, mean') else ''} | "
        + " | ".join(f"{of_model[key]:.3f}" for of_model in figures.values())
        + " |"
        for key in figures["student"]
        if key.startswith("Spearman")
    ]
    points = [
        f"| {p['texts']:,} | {p['tokens']:,} | {p['seconds'] / 60:.0f} | {p['cosine']:.3f} |"
        for i, p in enumerate(curve)
        if i % max(1, len(curve) // 12) == 0 or p is curve[-1]
    ]
    sources = [
        f"| `{name}` {run['packages'][name]} | {licence} | {run['texts'].get(name, 0):,} |"
        for name, licence, *_ in (WORDNET, *SOURCES)
    ]
    generated = [f"{run['texts'].get(name, 0):,}" for name in ("remix", "templates")]
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    card = template.format(
        **run, **figures, last=curve[-1], generated=generated, judged_sets="".join(judged), curve="\n".join(points),
        sources="\n".join(sources), libraries=", ".join(f"{name} {number}" for name, number in run["versions"].items()),
        megabytes=sum((out / name).stat().st_size for name in ("model.safetensors", "tokenizer.json")) / 1e6,
        minutes=curve[-1]["seconds"] / 60, passes=curve[-1]["texts"] / run["num_texts"],
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
