"""What a folder says in the files of sentence-transformers; needs neither torch nor that library."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section, read_json

logger = logging.getLogger(__name__)


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of each module in `modules.json`, such as ('x.y.Pooling', '1_Pooling'); none without that file.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / "modules.json"
    if not path.exists():
        return []
    modules = read_json(path)
    try:
        return [(str(module["type"]), str(module["path"])) for module in modules]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path}: expected a list of modules, each with its type and path; got something else; download it again"
        ) from None


def mean_pooling(folder: Path) -> Section | None:
    """The pooling's own config.json, if the modules are a Transformer, the mean of tokens and perhaps Normalize.

    Classes moved from version to version of that library, so of a class only the last part of its name counts.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    modules = read_modules(folder)
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0][1]:
        return None
    config = Section.of_file(folder / modules[1][1] / "config.json")
    return config if pooling_modes(config) == ["mean"] else None


def pooling_modes(config: Section) -> list[str]:
    """How a pooling makes one vector of those of the tokens: one mode or several, such as 'mean', 'cls', 'lasttoken'.

    Args:
        config: the pooling's own config.json.
    """
    modes = config.raw.get("pooling_mode")
    if modes is None:  # older versions wrote a boolean for each mode
        keys = [key for key, value in config.raw.items() if key.startswith("pooling_mode_") and value is True]
        modes = [re.sub(r"^pooling_mode_|_tokens?$", "", key) for key in keys]
    return [str(mode) for mode in modes] or ["mean"] if isinstance(modes, list) else [str(modes)]


def read_prompts(config: Section) -> tuple[str, str]:
    """What stands before queries and before documents; raises CheckpointError for what is no text.

    Args:
        config: config_sentence_transformers.json.
    """
    prompts = config.section("prompts", {})
    for name, prompt in prompts.raw.items():
        if prompt is not None and not isinstance(prompt, str):
            prompts.refuse(name, "a string")
        if re.search("[\ud800-\udfff]", prompt or ""):  # JSON can spell half a surrogate pair
            prompts.refuse(name, "valid Unicode")
    query, document, passage = (prompts.raw.get(name) or "" for name in ("query", "document", "passage"))
    # sentence-transformers begins with an empty prompt named "document", and so never uses one named "passage".
    if passage and not document:
        logger.warning(
            "the prompt named 'passage', %a, is not used, as in sentence-transformers, because documents have the "
            "one named 'document'; to use it, set document_prompt",
            passage,
        )
    return query, document
