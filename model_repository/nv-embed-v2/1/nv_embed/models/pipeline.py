"""What a folder says in the files of sentence-transformers; needs neither torch nor that library."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section, read_json

logger = logging.getLogger(__name__)

# Of whose names the file of the Transformer module may have one. The library takes the first.
_NETWORKS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_NO_LIMIT = 2**31


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


def read_transformer(folder: Path) -> Section:
    """How the Transformer module in a folder is loaded, from the file that the library takes; empty without one.

    Raises:
        CheckpointError: the file is damaged.
    """
    for path in (folder / f"sentence_{network}_config.json" for network in _NETWORKS):
        if path.is_file() and (section := Section.of_file(path)).raw:
            return section
    return Section({}, file=str(folder / f"sentence_{_NETWORKS[0]}_config.json"))


def loading_arguments(transformer: Section, part: str) -> Section:
    """What transformers is given to load a part with: 'config', 'model' or 'processor', which is the tokenizer.

    Args:
        transformer: see `read_transformer`.
        part: which.
    """
    older = {"config": "config_args", "model": "model_args", "processor": "tokenizer_args"}[part]
    return transformer.section(older if older in transformer.raw else f"{part}_kwargs", {})


def longest_text(folder: Path, config: Section) -> int | None:
    """In tokens, prompt and special tokens included, as the library finds it; None if no file says it.

    Args:
        folder: of the Transformer module.
        config: its config.json.

    Raises:
        CheckpointError: a length is none.
    """
    transformer = read_transformer(folder)
    arguments = loading_arguments(transformer, "processor")
    for section, key in ((arguments, "model_max_length"), (transformer, "max_seq_length")):
        if section.raw.get(key) is not None:
            return section.integer(key)
    limits = []
    tokenizer = Section.of_file(path) if (path := folder / "tokenizer_config.json").is_file() else Section({})
    for section, key in ((tokenizer, "model_max_length"), (config, "max_position_embeddings")):
        if section.raw.get(key) not in (None, -1):  # as XLNet's config says that it has no limit
            limit = section.raw[key]  # 1e30 where there is no limit
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
                section.refuse(key, "a number of tokens")
            limits.append(limit)
    shortest = min(limits, default=_NO_LIMIT)
    return int(shortest) if shortest < _NO_LIMIT else None


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
