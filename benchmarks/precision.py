"""How near half precision and 8-bit matrices come to float32, at the published width and depth.

    python benchmarks/precision.py                          # on the GPU if there is one; minutes
    python benchmarks/precision.py --device cpu --quick     # a small network, seconds

Weights are random and rounded to float16 as the checkpoint's are (bfloat16 rounds them once more). Unlike trained ones
they have no outliers, so the published model may come less near. Layers are drawn one after the other as the network
asks for them: memory holds one. The last line is one JSON object, with the cosine of every text's vector to its float32
one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from engine import (
    FULL,
    NUM_MASKED,
    QUICK,
    Size,
    empty_network,
    sequences,
)
from machine import machine
from nv_embed.compute.attention import choose_attention
from nv_embed.compute.devices import existing_device
from nv_embed.compute.engine import Engine, PackedModel
from nv_embed.compute.precision import Float8Matrix, Int8Matrix, Precision, round_matrices
from nv_embed.compute.weights import fill_network
from nv_embed.models.config_file import Section
from nv_embed.models.mistral import Layer
from nv_embed.models.nv_embed import NVEmbedCheckpoint
from started_server import progress
from synthetic import drawn, published_config, random_weights
from torch import Tensor, nn

AIMS = {
    "float16": 0.9999,
    "bfloat16": 0.999,
    "int8": Int8Matrix.least_cosine,
    "float8": Float8Matrix.least_cosine,
}


class DrawnLayers(nn.Module):
    """The layers of a network in order, each drawn when its turn comes."""

    def __init__(self, config: NVEmbedCheckpoint, device: torch.device, precision: Precision, seed: int) -> None:
        super().__init__()
        self.config, self.device, self.precision, self.seed = config, device, precision, seed

    def __len__(self) -> int:
        return self.config.num_layers

    def __iter__(self) -> Iterator[Layer]:
        for number in range(self.config.num_layers):
            with torch.device(self.device):
                layer = Layer(self.config).to(self.precision.dtype)
            generator = torch.Generator(self.device).manual_seed(self.seed + 1 + number)  # the rest has the seed itself
            for parameter in layer.parameters():
                parameter.copy_(drawn("weight", parameter.shape, generator, torch.float32).half())
            if self.precision.matrix:
                round_matrices(layer, self.precision.matrix)
            yield layer
            del layer  # or two would be in memory


def embed(size: Size, device: torch.device, name: str, lengths: list[int], seed: int) -> tuple[Tensor, str]:
    """[texts, C] float32, from the network in one precision, and the attention kernel that served it."""
    config = NVEmbedCheckpoint.read(Section(published_config(size.text_config, size.latent_config)))
    precision = Precision.choose(name, device, config)
    bare = replace(config, num_layers=0)
    attend = choose_attention("sdpa" if name == "float32" else "auto", config.heads, device, precision.dtype)
    network = empty_network(bare, precision, attend)
    fill_network(network, random_weights(bare, device, torch.float16, seed), device)
    network.layers = DrawnLayers(config, device, precision, seed)  # type: ignore[assignment]
    texts = sequences(lengths, config.vocab_size, seed, NUM_MASKED)
    engine = Engine(PackedModel(network, device), existing_device(str(device)))
    return torch.from_numpy(engine.embed(texts)), attend.__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument(
        "--lengths", default="20,44,64", help=f"of the texts, in tokens, more than {NUM_MASKED} (%(default)s)"
    )
    parser.add_argument("--dtypes", default=",".join(AIMS), help="beside float32 (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and texts (%(default)s)")
    arguments = parser.parse_args()
    dtypes = arguments.dtypes.split(",")
    if unknown := set(dtypes) - set(AIMS):
        parser.error(f"--dtypes: expected some of {', '.join(AIMS)}; got {', '.join(sorted(unknown))}")
    device, size = torch.device(arguments.device), QUICK if arguments.quick else FULL
    lengths = [int(length) for length in arguments.lengths.split(",")]
    result: dict[str, object] = {"size": size.name, "lengths": lengths}
    with torch.inference_mode():
        expected, _ = embed(size, device, "float32", lengths, arguments.seed)
        for name in dtypes:
            progress(name)
            vectors, attention = embed(size, device, name, lengths, arguments.seed)
            cosines = (vectors * expected).sum(1)
            result |= {name: [round(cosine, 7) for cosine in cosines.tolist()], "attention": attention}
            print(f"{name}: cosine to float32 at least {cosines.min():.6f} (aim {AIMS[name]})")
    print(json.dumps(result | machine(arguments.device)))


if __name__ == "__main__":
    main()
