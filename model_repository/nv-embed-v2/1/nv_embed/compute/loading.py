"""A checkpoint's folder to ready engines."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nv_embed.compute.attention import choose_attention
from nv_embed.compute.auto_dtype import faster
from nv_embed.compute.devices import Device, existing_device
from nv_embed.compute.engine import Engine, PackedModel
from nv_embed.compute.host import most_cores, multiplies_bfloat16, reserve_memory, reserved_memory
from nv_embed.compute.layout import arrange
from nv_embed.compute.precision import SAMPLE_TOKENS, SAMPLES, Precision, Rounding
from nv_embed.compute.weights import load_network
from nv_embed.errors import DeviceError, InvalidRequest, in_short
from nv_embed.models.config_file import DTYPES
from nv_embed.models.protocol import AnyCheckpoint, LibraryCheckpoint

logger = logging.getLogger(__name__)

_MEMORY_HEADROOM = 1.1  # workspaces and the allocator's slack, over weights and activations
_PIECE_BYTES = 2**27  # activations within one piece of a pass
# In a narrower network the threads that share an operation on a CPU wait for each other too much of the time.
_WIDE = 1024
_MOST_CPU_BATCHES = 8  # at a time: each has activations of its own


def load_engine(
    folder: Path,
    checkpoint: AnyCheckpoint,
    *,
    device: str,
    dtype: str,
    attention: str = "auto",
    compile_layers: str = "auto",
    max_sequence_tokens: int = 0,
    num_batches: int = 1,
) -> Engine:
    """Load a checkpoint.

    Args:
        folder: of `config.json` and the safetensors files.
        checkpoint: what the config says.
        device: 'cpu' or 'cuda:N'.
        dtype: see `Precision.choose`; 'auto' on a CPU: float32, or bfloat16 if it proves itself, see `faster`.
        attention: see `choose_attention`.
        compile_layers: see `compile_network`.
        max_sequence_tokens: length of the longest texts, for which a CPU must have memory; 0: that is not checked.
        num_batches: how many of them are computed at a time.

    Raises:
        DeviceError: the device is absent, its free memory too small, the attention kernel or a compiler missing, or the
            precision not supported or too coarse.
        CheckpointError: files or tensors are missing, damaged or of another model.
    """
    target = existing_device(device)

    def load(dtype: str, num_texts: int) -> Engine:
        precision = Precision.choose(dtype, target.torch_device, checkpoint)
        texts = (num_texts, max_sequence_tokens)
        loaded = _load(folder, checkpoint, target, precision, attention, compile_layers, *texts)
        if device == "cpu":
            arrange(loaded)
        return loaded

    engine = load(dtype, num_batches if device == "cpu" else 0)
    if dtype != "auto" or device != "cpu":
        return engine
    if not multiplies_bfloat16():
        logger.info("cpu: dtype float32, because the processor has no instructions for bfloat16")
        return engine
    longest = min(checkpoint.longest_text or SAMPLE_TOKENS, SAMPLE_TOKENS)
    try:
        samples = checkpoint.tokenizer(folder, longest).encode(SAMPLES, "")
        return faster(engine, load("bfloat16", 0), samples)
    except (DeviceError, InvalidRequest) as error:  # no memory for both; a model that knows no word of the samples
        logger.info("cpu: dtype float32, because bfloat16 could not be tried: %s", error)
        return engine


def _load(
    folder: Path,
    checkpoint: AnyCheckpoint,
    target: Device,
    precision: Precision,
    attention: str,
    compile_layers: str,
    num_texts: int,
    max_sequence_tokens: int,
) -> Engine:
    """See `load_engine`; num_texts: of the longest, for which there must be memory."""
    texts = (num_texts, max_sequence_tokens)
    if isinstance(checkpoint, LibraryCheckpoint):
        _check_library_computes(precision, attention, compile_layers)
        num_bytes = checkpoint.num_parameters() * precision.dtype.itemsize
        _check_memory(target, precision, num_bytes, checkpoint.numbers_per_token, *texts, smallest="bfloat16")
        with _loading(target, precision):
            return Engine(checkpoint.load(folder, target.torch_device, precision.dtype), target, precision.name)
    with torch.device("meta"):
        network = checkpoint.network().to(precision.dtype).eval()
    _check_memory(target, precision, precision.num_bytes(network), network.numbers_per_token, *texts, smallest="int8")
    if network.heads:
        network.attend = choose_attention(attention, network.heads, target.torch_device, precision.dtype)
    rounding = Rounding.of_checkpoint(folder, checkpoint, network, precision) if precision.matrix else None
    with _loading(target, precision):
        load_network(folder, network, target.torch_device, rounding)
    with target.current():
        return Engine(PackedModel(network, target.torch_device, compile_layers), target, precision.name)


def load_engines(
    folder: Path,
    checkpoint: AnyCheckpoint,
    *,
    devices: Sequence[str],
    dtype: str,
    max_sequence_tokens: int,
    attention: str = "auto",
    compile_layers: str = "auto",
) -> list[Engine]:
    """What threads compute with: an entry for each of them, see `load_engine`.

    Entries for the same device are the same engine. A GPU has two: one thread starts a batch while the other one waits
    for its own. If only the CPU is named, and once, it has one entry for all cores if the network is wide, and one for
    each core, up to 8, if it is narrow. Otherwise it has an entry each time that it is named.
    """
    if "cpu" in devices:  # first of all, because what is compiled is compiled for a number of threads
        num_cores = max(min(torch.get_num_threads(), math.ceil(min(most_cores(), 2**16))), 1)
        if list(devices) == ["cpu"] and checkpoint.hidden_size < _WIDE:
            devices = ["cpu"] * min(num_cores, _MOST_CPU_BATCHES)
        torch.set_num_threads(max(1, num_cores // devices.count("cpu")))
        logger.info("cpu: %d batches at a time, threads for each: %d", devices.count("cpu"), torch.get_num_threads())
    engines = {
        device: load_engine(
            folder, checkpoint, device=device, dtype=dtype, attention=attention, compile_layers=compile_layers,
            max_sequence_tokens=max_sequence_tokens, num_batches=devices.count(device),
        )
        for device in dict.fromkeys(devices)
    }  # fmt: skip
    return [engines[device] for device in devices for _ in range(1 if device == "cpu" else 2)]


def _check_library_computes(precision: Precision, attention: str, compile_layers: str) -> None:
    """Raise DeviceError for what only this project's own networks can do."""
    for setting, value, expected in (
        ("dtype", precision.name, ("auto", *DTYPES)),
        ("attention", attention, ("auto",)),
        ("compile", compile_layers, ("auto", "off")),
    ):
        if value not in expected:
            raise DeviceError(
                f"{setting}: expected {' or '.join(map(repr, expected))}, because another library computes this model; "
                f"got {value!r}; correct the setting"
            )


@contextmanager
def _loading(device: Device, precision: Precision) -> Iterator[None]:
    """Where weights are loaded; raises DeviceError if the device fails."""
    try:
        with device.current():
            yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        raise DeviceError(
            f"{device.torch_device}: loading the weights in {precision.name} failed: {in_short(error)}; see that "
            "nothing else runs on it"
        ) from None


def _check_memory(
    device: Device,
    precision: Precision,
    weights: int,
    numbers_per_token: int,
    num_texts: int,
    max_sequence_tokens: int,
    *,
    smallest: str,
) -> None:
    """Raise DeviceError if there is no room for the weights and the activations of `num_texts` longest texts.

    Other models of this server keep the room for theirs.

    Args:
        device: where they are to be.
        precision: of both.
        weights: in bytes.
        numbers_per_token: that a pass keeps.
        num_texts: that are computed at a time.
        max_sequence_tokens: of each; 0: activations are not checked.
        smallest: the dtype of the fewest bytes that this model has.
    """
    one_text = max_sequence_tokens * numbers_per_token * precision.dtype.itemsize + _PIECE_BYTES
    num_texts = num_texts if max_sequence_tokens else 0
    activations = int(num_texts * one_text * _MEMORY_HEADROOM)
    others = reserved_memory() if num_texts else 0
    needed, free = int(weights * _MEMORY_HEADROOM) + activations + others, device.free_memory()
    if needed <= free:
        if activations:
            reserve_memory(activations)
        return
    texts, remedies = "", "free memory on it or choose another device"
    if num_texts:
        texts = f" and for {num_texts} texts of {max_sequence_tokens} tokens at a time"
        remedies += ", lower max_sequence_tokens, or compute fewer texts at a time (OMP_NUM_THREADS, or device)"
    if others:
        texts += f", beside {others / 1e9:.1f} GB for the texts of the server's other models"
        remedies += ", serve fewer models"
    if not precision.matrix and precision.name != smallest:
        remedies += f", or choose a dtype of fewer bytes: {smallest} has the fewest"
    raise DeviceError(
        f"{device.torch_device}: expected {needed / 1e9:.1f} GB of free memory for the weights in {precision.name}"
        f"{texts}; got {free / 1e9:.1f} GB; {remedies}"
    )
