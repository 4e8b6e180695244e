"""results.json and the model card, README.md, written beside the weights from what the run recorded."""

import json
from pathlib import Path
from typing import Any

from text import SOURCES

ROWS = [
    ("cosine_to_teacher", "mean cosine to the teacher"),
    ("recall_at_10", "recall@10 of the teacher's ten nearest among {num_nearest:,}"),
    ("definition_accuracy_at_1", "definition to headword, accuracy@1 among {num_words:,}"),
    ("definition_accuracy_at_10", "definition to headword, accuracy@10"),
    ("question_answer_accuracy_at_1", "question-answer pairs, first set of {set_size}, accuracy@1"),
    ("question_answer_accuracy_at_1_all", "the same, mean of {question_sets} sets"),
    ("spearman_public_sets", "Spearman, public sets of judged sentence pairs, mean"),
    ("spearman_own_pairs", "Spearman, {own_pairs} sentence pairs judged by the makers of this model"),
    ("spearman_random_pairs", "Spearman with the teacher, 100,000 random pairs"),
    ("neural_networks_margin", "margin of a query on neural networks, as described below"),
    (
        "long_cosine_to_mean_of_parts",
        "long texts: cosine to the mean of the parts' teacher vectors (the teacher reads 128 tokens only)",
    ),
    ("numbers_cosine_to_teacher", "mean cosine to the teacher, texts with numbers"),
    ("untidy_cosine", "cosine of a text and its upper-case form (the student's and the teacher's tokenizers lower it)"),
    (
        "spaced_cosine",
        "cosine of a text and itself with a tab after every space, three spaces doubled, two newlines at the end",
    ),
    ("instruction_cosine_mean", "question with and without the standard instruction, mean cosine"),
    ("instruction_cosine_min", "the same, lowest"),
    ("other_instruction_cosine_mean", "question with an instruction never trained on and with none, mean cosine"),
    ("other_instruction_cosine_min", "the same, lowest"),
]


AIMS = [  # of the student: key, at least, in words
    ("cosine_to_teacher", 0.85, "mean cosine to the teacher"),
    ("recall_at_10", 0.60, "recall@10 of the teacher's ten nearest"),
    ("definition_share", 0.85, "definitions: accuracy@1 as a share of the teacher's"),
    ("question_answer_accuracy_at_1", 0.90, "question-answer pairs, first set, accuracy@1"),
    ("spearman_public_sets", 0.65, "Spearman, public sets of judged sentence pairs"),
    ("instruction_cosine_mean", 0.90, "question with and without the instruction, mean cosine"),
]


def reached(student: dict[str, float]) -> list[str]:
    """The rows of a table of aims; figures count as they are shown, to three digits."""
    rows = ["| aim | at least | is | |", "| --- | ---: | ---: | --- |"]
    for key, aim, words in AIMS:
        figure = round(student[key], 3) if key in student else None
        verdict = "not measured" if figure is None else "reached" if figure >= aim else "**not reached**"
        rows.append(f"| {words} | {aim:.2f} | {'' if figure is None else f'{figure:.3f}'} | {verdict} |")
    return rows


def write(out: Path, results: dict[str, Any]) -> None:
    """`results`: run (settings and counts), figures by model, learning curve."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    run, figures, curve = results["run"], results["figures"], results["curve"]
    names = list(figures)
    table = [f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    public = [(f"spearman {name}", f"Spearman, {name}, {count} pairs") for name, count in run["public_sets"].items()]
    for key, label in ROWS + public:
        cells = [f"{figures[n][key]:.3f}" if key in figures[n] else "" for n in names]
        if any(cells):
            table.append(f"| {label.format(**run)} | {' | '.join(cells)} |")
    thinned = [p for i, p in enumerate(curve) if i % max(1, len(curve) // 12) == 0 or p is curve[-1]]
    learning = ["| texts seen | tokens | minutes | cosine to the teacher | correlation of similarities |",
                "| ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    learning += [
        f"| {p['texts']:,} | {p['tokens']:,} | {p['seconds'] / 60:.0f} | {p['cosine']:.3f} | {p['similarity_r']:.3f} |"
        for p in thinned
    ]
    sources = ["| source | package | licence | texts |", "| --- | --- | --- | ---: |"]
    counts, packages = run["texts_by_source"], run["package_versions"]
    sources += [
        f"| {s.name} | `{s.package}` {packages.get(s.package, '')} | {s.licence} | {counts.get(s.name, 0):,} |"
        for s in SOURCES
    ]
    size = sum((out / name).stat().st_size for name in ("model.safetensors", "tokenizer.json", "config.json"))
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    card = template.format(
        figures="\n".join(table), curve="\n".join(learning), sources="\n".join(sources),
        libraries=", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        megabytes=size / 1e6, minutes=curve[-1]["seconds"] / 60,
        tokens=curve[-1]["tokens"], seen=curve[-1]["texts"],
        aims="\n".join(reached(figures["student"])), long_tokens=figures["student"]["long_tokens_mean"],
        **run,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
