"""safetensors to a filled `Network`, complete or not at all; knows names and files, not devices' limits or requests.

The checkpoint is memory-mapped and each tensor is copied once, to its place on the device: neither the host nor the
device ever holds the weights twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from nv_embed.compute.precision import Rounding
from nv_embed.config import CheckpointConfig
from nv_embed.errors import CheckpointError
from nv_embed.network import Layer, Network

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
_CROSS_ATTENTION = "latent_attention_model.cross_attend_blocks.0."
_MLP = "latent_attention_model.cross_attend_blocks.1."


def published_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with these sizes, as published."""
    hidden_size = config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    cross_size = config.num_cross_heads * config.cross_head_dim
    layer = {
        "input_layernorm.weight": (hidden_size,),
        "self_attn.q_proj.weight": (q_size, hidden_size),
        "self_attn.k_proj.weight": (kv_size, hidden_size),
        "self_attn.v_proj.weight": (kv_size, hidden_size),
        "self_attn.o_proj.weight": (hidden_size, q_size),
        "post_attention_layernorm.weight": (hidden_size,),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden_size),
        "mlp.up_proj.weight": (config.intermediate_size, hidden_size),
        "mlp.down_proj.weight": (hidden_size, config.intermediate_size),
    }
    return {
        "embedding_model.embed_tokens.weight": (config.vocab_size, hidden_size),
        **{
            f"embedding_model.layers.{i}.{name}": shape
            for i in range(config.num_layers)
            for name, shape in layer.items()
        },
        "embedding_model.norm.weight": (hidden_size,),
        "latent_attention_model.latents": (config.num_latents, hidden_size),
        _CROSS_ATTENTION + "norm.weight": (hidden_size,),
        _CROSS_ATTENTION + "norm.bias": (hidden_size,),
        _CROSS_ATTENTION + "norm_context.weight": (hidden_size,),
        _CROSS_ATTENTION + "norm_context.bias": (hidden_size,),
        _CROSS_ATTENTION + "fn.to_q.weight": (cross_size, hidden_size),
        _CROSS_ATTENTION + "fn.to_kv.weight": (2 * cross_size, hidden_size),
        _CROSS_ATTENTION + "fn.to_out.weight": (hidden_size, cross_size),
        _MLP + "norm.weight": (hidden_size,),
        _MLP + "norm.bias": (hidden_size,),
        _MLP + "fn.net.0.weight": (8 * hidden_size, hidden_size),
        _MLP + "fn.net.0.bias": (8 * hidden_size,),
        _MLP + "fn.net.2.weight": (hidden_size, 4 * hidden_size),
        _MLP + "fn.net.2.bias": (hidden_size,),
    }


def load_network(folder: Path, network: Network, device: torch.device, rounding: Rounding | None = None) -> None:
    """Fill a network on the meta device from a checkpoint folder; see `fill_network`.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are; one report names them all.
    """
    with ExitStack() as stack:
        tensors = _open(folder, stack)
        _check_complete(tensors, network.config)
        fill_network(network, tensors, device, rounding)


def fill_network(
    network: Network, tensors: Mapping[str, Any], device: torch.device, rounding: Rounding | None = None
) -> None:
    """Give a network on the meta device its memory on `device`, then copy and fold published tensors into it, by name.

    `tensors`: anything that a slice or a tuple of slices makes a tensor of. Layers come last and one by one; with
    `rounding`, each is rounded before there is memory for the next.
    """
    folded = (network.pooling.keys, network.pooling.values)
    progress = _Progress(_num_bytes(network) - sum(parameter.nbytes for parameter in folded))
    network.to_empty(device=device, recurse=False)
    network.pooling.to_empty(device=device)
    for name, place in _outer_places(network):
        progress.copy(tensors[name], place)
    _fold_cross_attention(network, tensors)
    if rounding:
        rounding.begin()
    for i, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        layer.to_empty(device=device)
        for name, place in _layer_places(layer):
            progress.copy(tensors[f"embedding_model.layers.{i}.{name}"], place)
        if rounding:
            rounding.round(layer)
    if rounding:
        rounding.check()
    logger.info("loaded %.2f GB of weights in %.1f s", _num_bytes(network) / 1e9, time.monotonic() - progress.started)


def _on_device(mapped: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, so that the file is read while what was read before is copied; numbers as they are."""
    return mapped.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else mapped


def _num_bytes(network: Network) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


class _Progress:
    """Copies tensors, and says now and then how many."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.num_bytes = total_bytes, 0
        self.started = self._reported = time.monotonic()

    def copy(self, source: Any, place: Tensor) -> None:
        place.copy_(_on_device(source[:], place.device))
        self.num_bytes += place.nbytes
        if time.monotonic() - self._reported > _PROGRESS_SECONDS:
            self._reported = time.monotonic()
            logger.info("loading weights: %.1f of %.1f GB", self.num_bytes / 1e9, self.total_bytes / 1e9)


def _outer_places(network: Network) -> Iterator[tuple[str, Tensor]]:
    """Where each published tensor goes that is copied as it is and is no layer's."""
    pooling = network.pooling
    yield "embedding_model.embed_tokens.weight", network.embed_tokens
    yield "embedding_model.norm.weight", network.norm
    yield _CROSS_ATTENTION + "norm.weight", pooling.norm_weight
    yield _CROSS_ATTENTION + "norm.bias", pooling.norm_bias
    yield _MLP + "norm.weight", pooling.mlp_norm_weight
    yield _MLP + "norm.bias", pooling.mlp_norm_bias
    yield _MLP + "fn.net.0.weight", pooling.mlp_in_weight
    yield _MLP + "fn.net.0.bias", pooling.mlp_in_bias
    yield _MLP + "fn.net.2.weight", pooling.mlp_out_weight
    yield _MLP + "fn.net.2.bias", pooling.mlp_out_bias


def _layer_places(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """Where each tensor of one published layer goes: a parameter, or its rows of a fused one."""
    config = layer.config
    kv_size = config.num_kv_heads * config.head_dim
    q, k, v = layer.qkv.weight.split_with_sizes((config.num_heads * config.head_dim, kv_size, kv_size))
    gate, up = layer.gate_up.weight.chunk(2)
    yield "input_layernorm.weight", layer.input_norm
    yield "self_attn.q_proj.weight", q
    yield "self_attn.k_proj.weight", k
    yield "self_attn.v_proj.weight", v
    yield "self_attn.o_proj.weight", layer.o.weight
    yield "post_attention_layernorm.weight", layer.post_attention_norm
    yield "mlp.gate_proj.weight", gate
    yield "mlp.up_proj.weight", up
    yield "mlp.down_proj.weight", layer.down.weight


def _fold_cross_attention(network: Network, tensors: Mapping[str, Any]) -> None:
    """Fold latents and the four projections of the cross-attention into `keys` and `values`, a head at a time.

    With no bias in any of them, (LN(x) Wq^T) (Wk c)^T = LN(x) (c Wk^T Wq)^T, and likewise for values and output.
    In float32 whatever the network's precision; one head of one matrix is all that is on the device beside it.
    """
    config, pooling = network.config, network.pooling

    def read(name: str, *where: slice) -> Tensor:
        source = tensors[_CROSS_ATTENTION + name if name.startswith(("fn.", "norm")) else name]
        tensor: Tensor = source[where or slice(None)]
        return _on_device(tensor, pooling.keys.device).float()

    context = functional.layer_norm(
        read("latent_attention_model.latents"),
        (config.hidden_size,),
        read("norm_context.weight"),
        read("norm_context.bias"),
    )  # [L, C]
    cross_size = config.num_cross_heads * config.cross_head_dim
    for head in range(config.num_cross_heads):
        rows = slice(head * config.cross_head_dim, (head + 1) * config.cross_head_dim)
        value_rows = slice(cross_size + rows.start, cross_size + rows.stop)  # keys first, then values
        k = context @ read("fn.to_kv.weight", rows).T  # [L, cross_head_dim]
        v = context @ read("fn.to_kv.weight", value_rows).T
        folded = slice(head * config.num_latents, (head + 1) * config.num_latents)
        pooling.keys[folded] = k @ read("fn.to_q.weight", rows) * config.cross_head_dim**-0.5
        pooling.values[folded] = v @ read("fn.to_out.weight", slice(None), rows).T


# --- files ----------------------------------------------------------------------------------------------


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Memory-map every shard; name -> unread slice. `safe_open` has no public type for the latter."""
    tensors: dict[str, Any] = {}
    for path in _shards(folder):
        path.open("rb").close()  # an OSError says what keeps this user from it; the library's do not
        try:
            shard = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected a complete safetensors file; got one of {path.stat().st_size} bytes that is cut "
                f"short or damaged ({error}); download it again"
            ) from None
        tensors |= {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
    return tensors


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(
                f"{folder}: expected {index.name} and its shards, or {single.name}; got neither; model_path must hold "
                "the whole published checkpoint"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index}: expected JSON with a 'weight_map'; got something else; download it again"
        ) from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing)}; download them"
        )
    return [folder / name for name in names]


def _check_complete(tensors: dict[str, Any], config: CheckpointConfig) -> None:
    expected = published_shapes(config)
    found = {name: tuple(source.get_shape()) for name, source in tensors.items()}
    problems = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    problems += [f"unexpected {name} {list(found[name])}" for name in found if name not in expected]
    problems += [
        f"misshapen {name}: expected {list(shape)}, got {list(found[name])}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"the weights are not those config.json describes, {len(problems)} tensors differ; take all files from the "
            "same checkpoint:\n  " + "\n  ".join(problems)
        )
