"""Any folder of sentence-transformers, through that library: what its files say, and how it is loaded.

The library is imported when a tokenizer or weights are loaded, not before. Nothing is downloaded, and no code that
comes with a folder is run. The library fills missing tensors with random numbers and passes over what it does not know.
So this file refuses what it would load wrongly in silence. At every start it compares tokens and vectors of padded
batches with those that the library gives to one text at a time.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers

from nv_embed.errors import CheckpointError, DeviceError, in_short
from nv_embed.models.config_file import Section, read_json
from nv_embed.models.library_model import LibraryModel, LibraryTokenizer, import_library, spoil_missing
from nv_embed.models.pipeline import pooling_modes, read_modules, read_prompts

logger = logging.getLogger(__name__)

_FIRST = ("Transformer", "StaticEmbedding")
_NEXT = ("Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
_WITH_WEIGHTS = (*_FIRST, "Dense", "LayerNorm")
_NO_CODE = "nothing, because it names code of the checkpoint's own, for which the library may put another model's"


# --- what the files say ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of modules.json."""

    kind: str  # the last part of its type
    folder: Path

    def config(self) -> Section:
        """Its config.json; raises CheckpointError."""
        return Section.of_file(self.folder / "config.json")


@dataclass(frozen=True, slots=True)
class SentenceTransformersCheckpoint:
    """What the folder's files say of the model; see `Described`."""

    modules: tuple[Module, ...]
    dimension: int
    query_instruction: str
    document_instruction: str
    pooling: str
    longest_text: int | None
    hidden_size: int
    numbers_per_token: int  # that a pass keeps at most: an estimate
    dtype: str
    is_prompt_pooled: bool
    has_float16: bool  # whether its numbers stay within that range

    @classmethod
    def of_folder(cls, folder: Path) -> SentenceTransformersCheckpoint:
        """Raises CheckpointError for what is missing or damaged, or would be computed wrongly in silence."""
        modules = _known_modules(folder)
        whole = _optional(folder / "config_sentence_transformers.json")
        whole.require("model_type", "SentenceTransformer", is_optional=True)
        query, document = read_prompts(whole)
        first, longest_text, config = modules[0], None, Section({})
        if first.kind == "Transformer":
            config = first.config()
            _check_network(config)
            tokenizer = _optional(first.folder / "tokenizer_config.json")
            if tokenizer.raw.get("auto_map") is not None:
                tokenizer.refuse("auto_map", _NO_CODE)
            longest_text = _longest_text(first, config)
        hidden_size, intermediate_size = _widths(first, config)
        dimension = hidden_size
        for module in modules:
            dimension = _dimension_after(module, dimension)
        return cls(
            modules=modules,
            dimension=min(dimension, whole.integer("truncate_dim", dimension)),
            query_instruction=query,
            document_instruction=document,
            pooling="+".join(
                mode for module in modules if module.kind == "Pooling" for mode in pooling_modes(module.config())
            )
            or "mean",
            longest_text=longest_text,
            hidden_size=hidden_size,
            numbers_per_token=6 * hidden_size + 3 * intermediate_size if intermediate_size else 2,
            dtype=config.dtype() if config.raw.get("dtype") or config.raw.get("torch_dtype") else "float32",
            is_prompt_pooled=all(
                module.config().raw.get("include_prompt") is not False for module in modules if module.kind == "Pooling"
            ),
            has_float16=not str(config.raw.get("model_type")).startswith("gemma3"),
        )

    def num_parameters(self) -> int:
        """Numbers in the files of weights; raises CheckpointError if one is missing or damaged."""
        weighted = [module for module in self.modules if module.kind in _WITH_WEIGHTS]
        return sum(int(np.prod(shape)) for module in weighted for _, shape in _shapes(module))

    def tokenizer(self, folder: Path, max_sequence_tokens: int) -> LibraryTokenizer:
        """Read the folder's tokenizer; raises CheckpointError."""
        first = self.modules[0]
        if first.kind == "StaticEmbedding":
            table = _rust_tokenizer(first)
            limit = min((table.truncation or {}).get("max_length", max_sequence_tokens), max_sequence_tokens)
            num_rows, empty_ids = _table_rows(first)
            return LibraryTokenizer(table, limit, adds_special_tokens=False, empty_ids=empty_ids, num_rows=num_rows)
        import_library()
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        settings = _settings(first).raw
        arguments = settings.get("processor_kwargs") or settings.get("tokenizer_args") or {}
        # Last what no folder may set.
        arguments |= _special_token_arguments(first) | {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(first.folder), **arguments)
        except Exception as error:  # of any kind, from whatever class the folder names
            raise _does_not_load(folder, error) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(
                f"{first.folder}: expected a tokenizer that the tokenizers library runs; got a "
                f"{type(tokenizer).__name__}; take a folder with tokenizer.json"
            )
        sizes = first.config().section("text_config", first.config().raw)
        rust = tokenizer.backend_tokenizer
        if settings.get("do_lower_case"):
            rust.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [rust.normalizer])])
        rust.encode_special_tokens = tokenizer.split_special_tokens
        return LibraryTokenizer(
            rust,
            max_sequence_tokens,
            cut_side=tokenizer.truncation_side,
            special_ids=None if self.is_prompt_pooled else frozenset(tokenizer.all_special_ids),
            num_rows=sizes.integer("vocab_size", 2**31),
        )

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> LibraryModel:
        """Read its weights, and compare what it makes of sample texts with what the library does.

        Raises:
            CheckpointError: files or tensors are missing or damaged, or the two differ.
            DeviceError: the model cannot be computed in this precision.
        """
        if dtype == torch.float16 and not self.has_float16:
            raise DeviceError(
                "dtype: expected bfloat16 or float32, because Gemma3's numbers exceed the range of float16; got "
                "float16; set dtype to 'bfloat16'"
            )
        import_library()
        from sentence_transformers import SentenceTransformer

        first = self.modules[0]
        is_network = first.kind == "Transformer"
        try:
            library = SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, trust_remote_code=False,
                model_kwargs={"dtype": dtype, "use_safetensors": True} if is_network else {},
                processor_kwargs=_special_token_arguments(first) if is_network else {},
            )  # fmt: skip
            missing = spoil_missing(library.transformers_model) if is_network else []
            # A network is in this precision already, but for what it computes in float32, such as rotary frequencies.
            # Rounded, those would turn the vectors of long texts.
            library.eval().to(device=device, dtype=None if is_network else dtype)
            pad_id = (library.tokenizer.pad_token_id or 0) if is_network else None
            model = LibraryModel(library, device, self.dimension, pad_id=pad_id)
            longest = library.max_seq_length or 2**31
            if longest < (self.longest_text or 2**31):
                raise CheckpointError(
                    f"{folder}: expected sentence_bert_config.json to say how long a text may be, as max_seq_length; "
                    f"got a model of {longest} tokens that does not say so; add it"
                )
            prompts = {"query": self.query_instruction, "document": self.document_instruction}
            model.compare(self.tokenizer(folder, self.longest_text or 2**31), prompts, missing)
        except (CheckpointError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # of any kind, from whatever class the folder names
            raise _does_not_load(folder, error) from None
        kinds = ", ".join(module.kind for module in self.modules)
        logger.info("sentence-transformers %s computes %s", version("sentence-transformers"), kinds)
        return model


# --- its files -------------------------------------------------------------------------------------------


def _known_modules(folder: Path) -> tuple[Module, ...]:
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


def _optional(path: Path) -> Section:
    return Section.of_file(path) if path.is_file() else Section({}, file=str(path))


def _settings(first: Module) -> Section:
    """sentence_bert_config.json, or the same with another network's name."""
    found = sorted(first.folder.glob("sentence_*_config.json"))
    return Section.of_file(found[0]) if found else Section({})


def _check_network(config: Section) -> None:
    """Raise CheckpointError for what the library would compute in another way than the checkpoint's authors did."""
    for key, expected in (
        ("auto_map", _NO_CODE),
        ("quantization_config", "nothing, because only plain weights are known here"),
    ):
        if config.raw.get(key) is not None:
            config.refuse(key, expected)
    for key in ("rope_parameters", "rope_scaling"):
        if re.search(r'"(dynamic|longrope)"', json.dumps(config.raw.get(key))):
            config.refuse(key, "other types than dynamic and longrope, whose vectors depend on the texts beside them")


def _longest_text(first: Module, config: Section) -> int | None:
    """As the library finds it: what the folder says, else the least of what tokenizer and network say."""
    settings = _settings(first)
    if settings.raw.get("max_seq_length") is not None:
        return settings.integer("max_seq_length")
    tokenizer = _optional(first.folder / "tokenizer_config.json").raw
    sizes = [tokenizer.get("model_max_length"), config.raw.get("max_position_embeddings")]
    return min((int(size) for size in sizes if isinstance(size, int | float) and 0 < size < 2**31), default=None)


def _widths(first: Module, config: Section) -> tuple[int, int]:
    """Of the token vectors, and within the layers."""
    if first.kind == "StaticEmbedding":
        rows = {name: shape for name, shape in _shapes(first) if name in ("embedding.weight", "embeddings")}
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


def _dimension_after(module: Module, dimension: int) -> int:
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


def _shapes(module: Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor; raises CheckpointError for a file that is missing or damaged."""
    folder = module.folder
    index = folder / "model.safetensors.index.json"
    files = {folder / "model.safetensors"}
    if index.is_file():
        files = {folder / str(name) for name in Section.of_file(index).section("weight_map").raw.values()}
    for path in sorted(files):
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: expected {path.name}; got none; download it, or write one from pytorch_model.bin with "
                "sentence-transformers' save_pretrained"
            )
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    yield name, tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: expected a complete safetensors file; got one of {path.stat().st_size} bytes that is cut "
                f"short or damaged ({error}); download it again"
            ) from None


def _table_rows(table: Module) -> tuple[int, frozenset[int]]:
    """Rows of a table of token vectors, and those that are zero, so that a text of them alone has no vector."""
    with safe_open(table.folder / "model.safetensors", framework="pt") as file:
        names = file.keys()
        rows = file.get_tensor("embeddings" if "embeddings" in names else "embedding.weight").any(dim=1)
        try:
            if "mapping" in names:  # as model2vec saves rows that tokens share, and what a token's row is multiplied by
                rows = rows[file.get_tensor("mapping").long()]
            if "weights" in names:
                rows &= file.get_tensor("weights") != 0
        except (IndexError, RuntimeError) as error:
            raise _does_not_load(table.folder, error) from None
    return len(rows), frozenset((~rows).nonzero().flatten().tolist())


def _rust_tokenizer(module: Module) -> RustTokenizer:
    path = module.folder / "tokenizer.json"
    read_json(path)
    try:
        return RustTokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise _does_not_load(path, error) from None


def _special_token_arguments(first: Module) -> dict[str, bool]:
    """What makes transformers put a last token where only tokenizer_config.json asks for it, which it ignores.

    Both arguments, because one alone would drop the other's token.
    """
    asks = _optional(first.folder / "tokenizer_config.json").raw.get("add_eos_token") is True
    if not asks or not (first.folder / "tokenizer.json").is_file():
        return {}
    rust = _rust_tokenizer(first)
    bare, whole = (rust.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    if whole[-1:] != bare[-1:]:
        return {}
    return {"add_bos_token": whole[:1] != bare[:1], "add_eos_token": True}


def _does_not_load(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a checkpoint that sentence-transformers loads from these files alone; "
        f"got {type(error).__name__}: {in_short(error)}; take all files from the same checkpoint"
    )
