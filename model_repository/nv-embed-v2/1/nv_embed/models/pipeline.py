"""What a folder says in the files of sentence-transformers; needs neither torch nor that library."""

from __future__ import annotations

from pathlib import Path

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section, read_json


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of each module in `modules.json`, such as ('Pooling', '1_Pooling'); none without that file.

    Classes moved from version to version of that library, so of a class only the last part of its name counts.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / "modules.json"
    if not path.exists():
        return []
    modules = read_json(path)
    try:
        return [(module["type"].rpartition(".")[2], str(module["path"])) for module in modules]
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: expected a list of modules, each with its type and path; got something else; download it again"
        ) from None


def mean_pooling(folder: Path) -> Section | None:
    """The pooling's own config.json, if the modules are a Transformer, the mean of tokens and perhaps Normalize.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    modules = read_modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0][1]:
        return None
    config = Section.of_file(folder / modules[1][1] / "config.json")
    mode = config.raw.get("pooling_mode")
    if mode is None:  # older versions wrote a boolean for each mode
        mode = [key for key, value in config.raw.items() if key.startswith("pooling_mode_") and value]
    return config if mode in ("mean", ["mean"], ["pooling_mode_mean_tokens"], []) else None
