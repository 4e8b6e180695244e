"""The modules of a sentence-transformers folder: which there are, how wide, and what of them is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section
from nv_embed.models.pipeline import loading_arguments, pooling_modes, read_modules, read_transformer
from nv_embed.models.shards import listed, not_plain, opened, shapes

_FIRST = ("Transformer", "StaticEmbedding")
_NEXT = ("Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
WITH_WEIGHTS = (*_FIRST, "Dense", "LayerNorm")
NO_CODE = "nothing, because it names code of the checkpoint's own, for which the library may put another model's"


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of modules.json."""

    kind: str  # the last part of its type
    folder: Path

    def config(self) -> Section:
        """Its config.json; raises CheckpointError."""
        return Section.of_file(self.folder / "config.json")


def known_modules(folder: Path) -> tuple[Module, ...]:
    """Raises CheckpointError for a kind that is not known here: its vectors might depend on neighbours or on tasks."""
    modules: list[Module] = []
    for name, inner in read_modules(folder):
        kinds = _NEXT if modules else _FIRST
        library, _, kind = name.rpartition(".")
        if not library.startswith("sentence_transformers.") or kind not in kinds:
            raise CheckpointError(
                f"{folder / 'modules.json'}: expected as {'a further' if modules else 'the first'} module "
                f"sentence_transformers' {' or '.join(kinds)}; got {name!a}, which is not known here; take another"
            )
        if not (folder / inner).resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{folder / 'modules.json'}: expected paths within the checkpoint; got {inner!a}; download it again"
            )
        modules.append(Module(kind, folder / inner))
    if not modules:
        raise CheckpointError(f"{folder / 'modules.json'}: expected modules; got none; download the file again")
    return tuple(modules)


def optional(path: Path) -> Section:
    return Section.of_file(path) if path.is_file() else Section({}, file=str(path))


def network_config(first: Module) -> Section:
    """config.json of the network, with the values that the library is given for it."""
    return first.config().overlaid(loading_arguments(read_transformer(first.folder), "config"))


def check_network(first: Module, config: Section) -> None:
    """Raise CheckpointError for what the library would compute in another way than the checkpoint's authors did.

    Args:
        first: a Transformer.
        config: see `network_config`.
    """
    inner = [config.section("text_config")] if config.raw.get("text_config") is not None else []
    for section in (config, *inner, loading_arguments(read_transformer(first.folder), "model")):
        for key, expected in (
            ("auto_map", NO_CODE),
            ("quantization_config", "nothing, because only plain weights are known here"),
        ):
            if section.raw.get(key) is not None:
                section.refuse(key, expected)
        for key in ("rope_parameters", "rope_scaling"):
            if re.search(r'"(dynamic|longrope)"', json.dumps(section.raw.get(key))):
                section.refuse(
                    key, "other types than dynamic and longrope, whose vectors depend on the texts beside them"
                )
    tokenizer = optional(first.folder / "tokenizer_config.json")
    if tokenizer.raw.get("auto_map") is not None:
        tokenizer.refuse("auto_map", NO_CODE)


def check_plain(module: Module) -> None:
    """Raise CheckpointError for weights of a module behind the network, or of a table, that would need a scale."""
    with opened(module.folder) as tensors:
        _refuse_not_plain(module.folder, {
            name: kind
            for name, kind in not_plain(tensors).items()
            # model2vec saves indices, and rows in 8 bits: all with one scale, without which directions are the same.
            if name != "mapping" and (name, kind) != ("embeddings", "I8")
        })  # fmt: skip


def check_weights(first: Module, network: Any) -> None:
    """Raise CheckpointError if the files hold layers that a network lacks, or numbers that it would take for others.

    Args:
        first: a Transformer.
        network: the library's, which passes over both in silence.
    """
    own = network.state_dict()
    layers = {_numberless(name) for name in own}
    with opened(first.folder) as tensors:
        # A file may have the names with more in front of them.
        names = {name: [name[dot + 1 :] for dot in (-1, *_dots(name))] for name in tensors}
        left_over = [
            name
            for name, ends in names.items()
            if not any(end in own for end in ends) and any(_numberless(end) in layers for end in ends)
        ]
        if left_over and not network.config.is_encoder_decoder:  # a decoder, which is not used, may have more layers
            raise CheckpointError(
                f"{first.folder}: expected config.json to describe all layers in the weights; got "
                f"{listed(left_over, ', ')} beside them; take all files from the same checkpoint"
            )
        _refuse_not_plain(first.folder, {
            name: kind
            for name, kind in not_plain(tensors).items()
            if any(end in own and own[end].is_floating_point() for end in names[name])
        })  # fmt: skip


def _dots(name: str) -> list[int]:
    return [index for index, character in enumerate(name) if character == "."]


def _numberless(name: str) -> str:
    """The same for a tensor of each layer."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def _refuse_not_plain(folder: Path, kinds: dict[str, str]) -> None:
    """Raise CheckpointError if there are tensors whose numbers do not stand for themselves; `kinds`: their types."""
    if kinds:
        got = listed([f"{kind} in {name}" for name, kind in kinds.items()], ", ")
        raise CheckpointError(
            f"{folder}: expected weights in float16, bfloat16 or float32; got {got}, whose scale is not known; take "
            "the checkpoint that was not quantized"
        )


def widths(first: Module, config: Section) -> tuple[int, int]:
    """Of the token vectors, and within the layers."""
    if first.kind == "StaticEmbedding":
        rows = {
            name: shape for name, shape in shapes(first.folder).items() if name in ("embedding.weight", "embeddings")
        }
        if [len(shape) for shape in rows.values()] != [2]:
            raise CheckpointError(
                f"{first.folder}: expected one table named embedding.weight or embeddings; got {rows}; take all files "
                "from the same checkpoint"
            )
        ((_, width),) = rows.values()
        return width, 0
    sizes = config.section("text_config", config.raw)
    names = [key for key in ("hidden_size", "d_model", "dim", "n_embd") if sizes.raw.get(key)]
    width = sizes.integer(names[0] if names else "hidden_size")
    inner = [key for key in ("intermediate_size", "d_ff", "hidden_dim", "n_inner") if sizes.raw.get(key)]
    return width, sizes.integer(inner[0]) if inner else 4 * width


def dimension_after(module: Module, dimension: int) -> int:
    """Numbers of a vector behind a module; raises CheckpointError if it names code of its own."""
    if module.kind == "Dense":
        config = module.config()
        activation = config.raw.get("activation_function")
        if activation is not None and not str(activation).startswith("torch."):
            config.refuse("activation_function", "one of torch's, because the library puts Tanh in another's place")
        return config.integer("out_features")
    if module.kind == "Pooling":
        return dimension * len(pooling_modes(module.config()))
    return dimension
