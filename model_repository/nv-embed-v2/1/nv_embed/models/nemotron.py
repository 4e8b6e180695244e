"""Nemotron-3-Embed: bidirectional Ministral 3 layers, and the mean of all tokens.

All that is this model's own is here. Shapes: T tokens of S sequences in one row, C hidden_size, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section
from nv_embed.models.mistral import MistralNetwork, MistralSizes, read_sizes, rms_norm, rotary
from nv_embed.models.pipeline import (
    loading_arguments,
    longest_text,
    mean_pooling,
    read_prompts,
    read_transformer,
)
from nv_embed.models.protocol import PackedBatch, Read, Work, mean_shares
from nv_embed.tokenizer import Template, Tokenizer

_TEMPLATE = Template(first="<s>", last="", is_instruction_pooled=True, is_first_optional=True)
_ROPE_KEYS = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim", "llama_4_scaling_beta",
    "apply_yarn_scaling", "max_position_embeddings",  # which change nothing
)  # fmt: skip
# What sentence-transformers may be told of how it loads and feeds the network, in sentence_bert_config.json.
_TRANSFORMER = {
    "do_lower_case": False, "module_output_name": "token_embeddings", "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}  # fmt: skip
# What it may pass on to transformers. `longest_text` reads model_max_length.
_ARGUMENTS = (
    "attn_implementation", "dtype", "low_cpu_mem_usage", "model_max_length", "padding_side", "torch_dtype",
    "trust_remote_code", "use_cache", "use_fast", "use_safetensors",
)  # fmt: skip
# Absent keys mean these to transformers.
_HEAD_DIM, _LONGEST_TEXT = 128, 262144


# --- the folder's files ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Yarn:
    """How positions rotate queries and keys (YaRN), and how they scale queries."""

    factor: float  # by which slow rotations are slowed down
    trained_tokens: int  # length of the texts before that
    beta_fast: float  # what turns as often or more within such a text is left as it is
    beta_slow: float  # what turns as often or less is slowed down in full
    is_rounded: bool  # whether what lies between begins and ends at a whole index
    amplitude: float  # of cosines and sines
    query_beta: float


@dataclass(frozen=True, slots=True)
class NemotronCheckpoint(MistralSizes):
    """What the folder's files say of the network and its texts."""

    yarn: Yarn
    dtype: str  # of the weights on disk, a torch dtype's name
    query_instruction: str
    document_instruction: str
    longest_text: int

    @classmethod
    def of_folder(cls, folder: Path) -> NemotronCheckpoint:
        """Raises CheckpointError naming the file, the key, the value and what is supported."""
        config = Section.of_folder(folder)
        config.require("model_type", "ministral3")
        config.require("is_causal", False)
        config.require("pooling", "avg", is_optional=True)
        for key in ("auto_map", "quantization_config", "sliding_window", "partial_rotary_factor"):
            if config.raw.get(key) is not None:
                config.refuse(key, "null: nothing of the kind is supported")
        layer_types = config.raw.get("layer_types") or []
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            config.refuse("layer_types", "'full_attention' for each layer")
        pooling = mean_pooling(folder)
        assert pooling, "the folder is of another kind"
        pooling.require("include_prompt", True, is_optional=True)
        sizes = read_sizes(
            config,
            head_dim=None if "head_dim" in config.raw else _HEAD_DIM,
            rope_type="yarn",
            rope_keys=_ROPE_KEYS,
        )
        whole = Section.of_file(folder / "config_sentence_transformers.json")
        whole.require("model_type", "SentenceTransformer", is_optional=True)
        if whole.raw.get("truncate_dim") is not None:
            whole.refuse("truncate_dim", "null: vectors are not cut")
        _check_loading(folder, config)
        limited = config
        if config.raw.get("max_position_embeddings") is None:
            limited = config.overlaid(Section({"max_position_embeddings": _LONGEST_TEXT}))
        query, document = read_prompts(whole)
        return cls(
            **asdict(sizes),
            yarn=_read_yarn(config, sizes.rope_theta),
            dtype=config.dtype(),
            query_instruction=query,
            document_instruction=document,
            longest_text=longest_text(folder, limited) or _LONGEST_TEXT,
        )

    @property
    def dimension(self) -> int:
        return self.hidden_size

    @property
    def pooling(self) -> str:
        return "mean"

    def tokenizer(self, folder: Path, max_sequence_tokens: int) -> Tokenizer:
        """Read the folder's tokenizer; raises CheckpointError."""
        return Tokenizer(
            folder / "tokenizer.json", _TEMPLATE, vocab_size=self.vocab_size, max_sequence_tokens=max_sequence_tokens
        )

    def network(self) -> NemotronNetwork:
        """Without values, on whatever device is current."""
        return NemotronNetwork(self)


def _read_yarn(config: Section, rope_theta: float) -> Yarn:
    """`rope_parameters`, which was `rope_scaling` before transformers 5. `read_sizes` has read what is not here."""
    places = [config.section(key) for key in ("rope_parameters", "rope_scaling") if config.raw.get(key) is not None]
    if not places:
        config.refuse("rope_parameters", "a JSON object with rope_type 'yarn'")
    rope = places[0]
    if rope.raw != places[-1].raw:
        config.refuse("rope_scaling", "null, or the same as rope_parameters")
    if rope_theta <= 1:
        (rope if rope.raw.get("rope_theta") is not None else config).refuse("rope_theta", "a number above 1")
    if rope.raw.get("rope_type") is None:
        rope.require("type", "yarn")
    if config.raw.get("original_max_position_embeddings") is not None:
        config.refuse("original_max_position_embeddings", f"null, because it stands in {rope.name}")
    if rope.raw.get("truncate") not in (None, True, False):
        rope.refuse("truncate", "true or false")
    factor = rope.number("factor")

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    # Zero stands for none, as in transformers.
    mscale, all_dim = (rope.number(key) if rope.raw.get(key) else 0.0 for key in ("mscale", "mscale_all_dim"))
    usual = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return Yarn(
        factor=factor,
        trained_tokens=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        is_rounded=rope.raw.get("truncate") is not False,
        amplitude=rope.number("attention_factor", usual),
        query_beta=rope.number("llama_4_scaling_beta"),
    )


def _check_loading(folder: Path, config: Section) -> None:
    """Raise CheckpointError for what makes sentence-transformers load or feed the model in another way."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: expected weights that need no adapter; got adapter_config.json; merge the adapter into them, "
            "and save them without it"
        )
    if (path := folder / "tokenizer_config.json").exists():
        tokenizer = Section.of_file(path)
        tokenizer.require("truncation_side", "right", is_optional=True)
        tokenizer.require("split_special_tokens", False, is_optional=True)
    transformer = read_transformer(folder)
    for key, value in _TRANSFORMER.items():
        transformer.require(key, value, is_optional=True)
    parts = [loading_arguments(transformer, part) for part in ("config", "model", "processor")]
    known = {"max_seq_length", "unpad_inputs", *_TRANSFORMER, *(part.name for part in parts)}
    for key, value in transformer.raw.items():
        if key not in known and value not in (None, {}):
            transformer.refuse(key, f"nothing beside {', '.join(sorted(known))}")
    for part in parts:
        for key, value in part.raw.items():
            is_said = part is parts[0] and key in config.raw and config.raw[key] == value
            if key not in _ARGUMENTS and not is_said:
                part.refuse(key, f"nothing beside {', '.join(_ARGUMENTS)}, which change no vector")


# --- network --------------------------------------------------------------------------------------------


class NemotronNetwork(MistralNetwork):
    """Packed tokens to one unit vector for each sequence."""

    optional_prefix = "model."
    frequencies: Tensor  # [D / 2] float32

    def __init__(self, config: NemotronCheckpoint) -> None:
        super().__init__(config)
        self.config = config

    def fold(self, read: Read) -> None:
        """Nothing is folded; the frequencies of rotation go where the weights are, in float32 whatever those are."""
        self.frequencies = yarn_frequencies(self.config).to(self.norm.device)

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """[T] to cosines and sines for keys, and those for queries: [T, 1, D] float32 each.

        A query is multiplied by a number that grows with its position, which its cosines and sines do on the way.
        """
        yarn = self.config.yarn
        cos, sin = (wave * yarn.amplitude for wave in rotary(position_ids, self.frequencies))
        scale = 1 + yarn.query_beta * torch.log(1 + torch.floor(position_ids / yarn.trained_tokens))
        scale = scale.to(self.norm.dtype).float()[:, None, None]  # rounded as the original rounds it
        return cos, sin, cos * scale, sin * scale

    def to_vectors(self, x: Tensor, batch: PackedBatch, work: Work) -> Tensor:
        """What the last layer returns, [T, C], to [S, C] float32 rows of length 1: the mean of normed tokens."""
        pooled = rms_norm(x.index_select(0, batch.pooled_indices), self.norm, self.config.rms_norm_eps)
        return functional.normalize(mean_shares(pooled, batch.pooled_seqlens, slice(0, len(pooled))), dim=-1)


def yarn_frequencies(config: NemotronCheckpoint) -> Tensor:
    """By how much each pair of elements turns from one position to the next: [D / 2] float32, on the CPU.

    Computed in the order in which transformers computes, because a rounding of a frequency is multiplied by the
    position, and long texts have large ones.
    """
    yarn, head_dim = config.yarn, config.head_dim

    def index(num_turns: float) -> float:
        """Of the pair that turns so many times within a text of the length of `trained_tokens`."""
        turn = num_turns * 2 * math.pi
        return head_dim * math.log(yarn.trained_tokens / turn) / (2 * math.log(config.rope_theta))

    low, high = index(yarn.beta_fast), index(yarn.beta_slow)
    if yarn.is_rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)  # of the usual frequency; the rest is divided by the factor
    periods: Tensor = config.rope_theta ** (2 * pairs / head_dim)
    return 1 / (yarn.factor * periods) * (1 - kept) + 1 / periods * kept
