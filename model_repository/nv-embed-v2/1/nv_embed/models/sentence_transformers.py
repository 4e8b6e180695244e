"""Any folder of sentence-transformers, through that library: what its files say, and how it is loaded.

The library is imported when a tokenizer or weights are loaded, not before. Nothing is downloaded, and no code that
comes with a folder is run. The library fills missing tensors with random numbers and passes over what it does not know.
So this file refuses what it would load wrongly in silence. At every start it compares tokens and vectors of padded
batches with those that the library gives to one text at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers

from nv_embed.errors import CheckpointError, DeviceError, in_short
from nv_embed.models.config_file import Section, read_json
from nv_embed.models.library_model import LibraryModel, LibraryTokenizer, import_library, spoil_missing
from nv_embed.models.modules import (
    WITH_WEIGHTS,
    Module,
    check_network,
    check_plain,
    check_weights,
    dimension_after,
    known_modules,
    network_config,
    optional,
    widths,
)
from nv_embed.models.pipeline import loading_arguments, longest_text, pooling_modes, read_prompts, read_transformer
from nv_embed.models.shards import check_finite, opened, shapes

logger = logging.getLogger(__name__)


# --- what the files say ----------------------------------------------------------------------------------


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
        modules = known_modules(folder)
        whole = optional(folder / "config_sentence_transformers.json")
        whole.require("model_type", "SentenceTransformer", is_optional=True)
        query, document = read_prompts(whole)
        first, longest, config = modules[0], None, Section({})
        if first.kind == "Transformer":
            config = network_config(first)
            check_network(first, config)
            longest = longest_text(first.folder, config)
        hidden_size, intermediate_size = widths(first, config)
        dimension = hidden_size
        for module in modules:
            dimension = dimension_after(module, dimension)
        return cls(
            modules=modules,
            dimension=min(dimension, whole.integer("truncate_dim", dimension)),
            query_instruction=query,
            document_instruction=document,
            pooling="+".join(
                mode for module in modules if module.kind == "Pooling" for mode in pooling_modes(module.config())
            )
            or "mean",
            longest_text=longest,
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
        weighted = [module for module in self.modules if module.kind in WITH_WEIGHTS]
        return sum(int(np.prod(shape)) for module in weighted for shape in shapes(module.folder).values())

    def tokenizer(self, folder: Path, max_sequence_tokens: int) -> LibraryTokenizer:
        """Read the folder's tokenizer; raises CheckpointError."""
        first = self.modules[0]
        if first.kind == "StaticEmbedding":
            check_plain(first)
            table = _rust_tokenizer(first)
            limit = min((table.truncation or {}).get("max_length", max_sequence_tokens), max_sequence_tokens)
            num_rows, empty_ids = _table_rows(first)
            return LibraryTokenizer(table, limit, adds_special_tokens=False, empty_ids=empty_ids, num_rows=num_rows)
        import_library()
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        transformer = read_transformer(first.folder)
        # Last what no folder may set.
        arguments = (
            loading_arguments(transformer, "processor").raw
            | _special_token_arguments(first)
            | {"local_files_only": True, "trust_remote_code": False}
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(first.folder), **arguments)
        except Exception as error:  # of any kind, from whatever class the folder names
            raise _does_not_load(folder, error) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(
                f"{first.folder}: expected a tokenizer that the tokenizers library runs; got a "
                f"{type(tokenizer).__name__}; take a folder with tokenizer.json"
            )
        config = network_config(first)
        sizes = config.section("text_config", config.raw)
        rust = tokenizer.backend_tokenizer
        if transformer.raw.get("do_lower_case"):
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
            for module in self.modules[is_network:]:
                if module.kind in WITH_WEIGHTS:
                    check_plain(module)
            if is_network:
                check_weights(first, library.transformers_model)
            for name, tensor in library.named_parameters():
                check_finite(name, tensor)
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


def _table_rows(table: Module) -> tuple[int, frozenset[int]]:
    """Rows of a table of token vectors, and those that are zero, so that a text of them alone has no vector."""
    with opened(table.folder) as tensors:
        rows = tensors["embeddings" if "embeddings" in tensors else "embedding.weight"][:].any(dim=1)
        try:
            if "mapping" in tensors:  # model2vec saves rows that tokens share, and what a token's row is multiplied by
                rows = rows[tensors["mapping"][:].long()]
            if "weights" in tensors:
                rows &= tensors["weights"][:] != 0
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
    asks = optional(first.folder / "tokenizer_config.json").raw.get("add_eos_token") is True
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
