"""Random weights under the published names: for networks in memory, and as a checkpoint to time a server with.

    python benchmarks/synthetic.py /tmp/nv-embed-synthetic                # 15.7 GB, on the GPU if there is one
    .venv/bin/python benchmarks/synthetic.py /tmp/one-layer --layers 1    # 2.2 GB; then
    MODEL_PATH=/tmp/one-layer DEVICE=cpu ./serve.sh
    export NV_EMBED_CACHE_MEBIBYTES=0
    python benchmarks/serving.py --compare --engine --device cuda:0 --checkpoint /tmp/nv-embed-synthetic

Published names, shapes, precision and four shards; the tokenizer is the default checkpoint's. Its vectors mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from started_server import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "model_repository" / "nv-embed-v2" / "1"))

from nv_embed.compute.weights import checkpoint_shapes
from nv_embed.models import read_checkpoint
from nv_embed.models.protocol import Checkpoint

NUM_SHARDS = 4
TOKENIZER = ROOT / "checkpoints" / "nv-embed-mini" / "tokenizer.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="of the published 32 (%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="all sizes in proportion (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    num_bytes = write_layout(arguments.folder, arguments.layers, arguments.hidden_size)
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    for path in sorted(arguments.folder.glob("*.safetensors")):
        fill(path, generator)
    shutil.copyfile(TOKENIZER, arguments.folder / "tokenizer.json")
    print(json.dumps({"folder": str(arguments.folder), "gigabytes": round(num_bytes / 1e9, 3)}))


def published_config(
    text_config: Mapping[str, object], latent_config: Mapping[str, int], dtype: str = "float16"
) -> dict[str, Any]:
    """config.json in the published form; what the arguments leave out is as published."""
    hidden_size = text_config["hidden_size"]
    return {
        "model_type": "nvembed", "is_mask_instruction": True, "add_eos": True, "padding_side": "right",
        "mask_type": "b", "hidden_size": hidden_size, "torch_dtype": dtype,
        "text_config": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, **text_config},
        "latent_attention_config": {**latent_config, "hidden_dim": hidden_size, "latent_dim": hidden_size},
    }  # fmt: skip


def drawn(
    name: str, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, spread: float | None = None
) -> Tensor:
    """One tensor by its published name, on the generator's device.

    Without `spread` norms are one, biases zero, and matrices so small that a deep stack keeps within half precision.
    With it every element of every tensor differs by about so much from these, so that each matters.
    """
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    usual = 0.0 if len(shape) == 1 else 0.7 * shape[-1] ** -0.5
    tensor = torch.empty(tuple(shape), device=generator.device, dtype=dtype)
    return tensor.normal_(mean, usual if spread is None else spread, generator=generator)


def random_weights(
    config: Checkpoint, device: torch.device, dtype: torch.dtype, seed: int, spread: float | None = None
) -> dict[str, Tensor]:
    """Every published tensor, as `drawn` has it."""
    generator = torch.Generator(device).manual_seed(seed)
    return {name: drawn(name, shape, generator, dtype, spread) for name, shape in shapes_of(config).items()}


def shapes_of(config: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of every published tensor, by name."""
    with torch.device("meta"):
        return checkpoint_shapes(config.network())


def write_layout(folder: Path, num_layers: int, hidden_size: int) -> int:
    """Everything but the tokenizer, all tensors zero, in files that take no room; returns the bytes of all tensors."""
    config = published_config(
        {
            "vocab_size": 32000, "hidden_size": hidden_size, "num_hidden_layers": num_layers,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": hidden_size * 7 // 2,
        },
        {"cross_dim_head": hidden_size},
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = {name: (shape, 2 * prod(shape)) for name, shape in shapes_of(read_checkpoint(folder)).items()}
    total = sum(size for _, size in sizes.values())
    shards: list[dict[str, tuple[tuple[int, ...], int]]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, sized in sizes.items():
        shards[min(NUM_SHARDS - 1, written * NUM_SHARDS // total)][name] = sized
        written += sized[1]
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        header, offset = {}, 0
        for name, (shape, size) in tensors.items():
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return total


def fill(path: Path, generator: torch.Generator) -> None:
    """Draw the tensors of one file."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    for name, tensor in header.items():
        shape = tuple(tensor["shape"])
        values = np.memmap(path, np.float16, "r+", 8 + header_size + tensor["data_offsets"][0], shape)
        values[:] = drawn(name, shape, generator, torch.float16).cpu().numpy()
        values.flush()


if __name__ == "__main__":
    main()
