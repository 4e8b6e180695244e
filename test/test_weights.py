"""Loading: exactly the published tensors, complete or not at all, in bounded memory."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nv_embed.compute import engine as engine_module
from nv_embed.compute.engine import Engine
from nv_embed.compute.weights import published_shapes
from nv_embed.config import CheckpointConfig
from nv_embed.errors import CheckpointError, DeviceError, DeviceLost, OutOfDeviceMemory
from nv_embed.tokenizer import TokenSequence
from safetensors.torch import load_file, save_file


def load(folder: Path, dtype: str = "float32") -> Engine:
    return Engine.load(folder, CheckpointConfig.load(folder), device="cpu", dtype=dtype)


@pytest.fixture
def checkpoint(toy, tmp_path) -> Path:
    """A copy of the toy checkpoint, to be damaged."""
    return Path(shutil.copytree(toy, tmp_path / "checkpoint"))


def test_the_published_sizes_give_exactly_the_published_tensors(published):
    shapes = published_shapes(published)
    layer = {
        "input_layernorm.weight": (4096,),
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.k_proj.weight": (1024, 4096),
        "self_attn.v_proj.weight": (1024, 4096),
        "self_attn.o_proj.weight": (4096, 4096),
        "post_attention_layernorm.weight": (4096,),
        "mlp.gate_proj.weight": (14336, 4096),
        "mlp.up_proj.weight": (14336, 4096),
        "mlp.down_proj.weight": (4096, 14336),
    }
    blocks = "latent_attention_model.cross_attend_blocks"
    expected = {
        "embedding_model.embed_tokens.weight": (32000, 4096),
        "embedding_model.norm.weight": (4096,),
        "latent_attention_model.latents": (512, 4096),
        f"{blocks}.0.norm.weight": (4096,),
        f"{blocks}.0.norm.bias": (4096,),
        f"{blocks}.0.norm_context.weight": (4096,),
        f"{blocks}.0.norm_context.bias": (4096,),
        f"{blocks}.0.fn.to_q.weight": (32768, 4096),
        f"{blocks}.0.fn.to_kv.weight": (65536, 4096),
        f"{blocks}.0.fn.to_out.weight": (4096, 32768),
        f"{blocks}.1.norm.weight": (4096,),
        f"{blocks}.1.norm.bias": (4096,),
        f"{blocks}.1.fn.net.0.weight": (32768, 4096),
        f"{blocks}.1.fn.net.0.bias": (32768,),
        f"{blocks}.1.fn.net.2.weight": (4096, 16384),
        f"{blocks}.1.fn.net.2.bias": (4096,),
    } | {f"embedding_model.layers.{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    assert shapes == expected
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    assert (num_parameters, 2 * num_parameters) == (7_851_016_192, 15_702_032_384)


def test_the_network_of_the_published_sizes_has_a_place_for_all_but_the_folded_tensors(published):
    from nv_embed.compute.weights import _layer_places, _outer_places
    from nv_embed.network import Network

    with torch.device("meta"):
        network = Network(published)
    places = {name: tuple(place.shape) for name, place in _outer_places(network)}
    for i, layer in enumerate(network.layers):
        places |= {f"embedding_model.layers.{i}.{name}": tuple(place.shape) for name, place in _layer_places(layer)}
    folded = {
        "latent_attention_model.latents",
        *(
            f"latent_attention_model.cross_attend_blocks.0.{name}.weight"
            for name in ("norm_context", "fn.to_q", "fn.to_kv", "fn.to_out")
        ),
        "latent_attention_model.cross_attend_blocks.0.norm_context.bias",
    }
    assert places == {name: shape for name, shape in published_shapes(published).items() if name not in folded}
    filled = sum(math.prod(shape) for shape in places.values()) + 2 * network.pooling.keys.numel()
    assert filled == sum(parameter.numel() for parameter in network.parameters())


def test_one_file_without_an_index_loads_as_well_as_shards(checkpoint):
    sequence = TokenSequence(np.arange(1, 30, dtype=np.int32), 3)
    before = load(checkpoint).embed([sequence])
    tensors = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    np.testing.assert_array_equal(load(checkpoint).embed([sequence]), before)


@pytest.mark.parametrize(("dtype", "floor"), [("float16", 0.9999), ("bfloat16", 0.999)])
def test_half_precision_is_close_to_float32(toy, dtype, floor):
    random = np.random.default_rng(0)
    sequences = [TokenSequence(random.integers(3, 1000, size=n, dtype=np.int32), 0) for n in (3, 40, 300)]
    cosines = (load(toy).embed(sequences) * load(toy, dtype).embed(sequences)).sum(axis=1)
    assert cosines.min() > floor


def test_one_report_names_all_missing_unexpected_and_misshapen_tensors(checkpoint):
    shard = checkpoint / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    names = sorted(tensors)
    del tensors[names[0]], tensors[names[1]]
    tensors["surplus.weight"] = torch.zeros(2, 3)
    tensors[names[2]] = torch.zeros(5, 7)
    save_file(tensors, shard)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    message = str(caught.value)
    assert "4 tensors differ" in message
    assert f"missing {names[0]}" in message
    assert f"missing {names[1]}" in message
    assert "unexpected surplus.weight [2, 3]" in message
    assert re.search(rf"misshapen {re.escape(names[2])}: expected \[.*\], got \[5, 7\]", message)


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards missing: model-00002-of-00002\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 5000, -1])
def test_a_truncated_shard_is_named(checkpoint, keep):
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*cut short or damaged.*download it again"):
        load(checkpoint)


def test_a_file_that_may_not_be_read_is_not_called_damaged(checkpoint, monkeypatch):
    readable = Path.open

    def refuse(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return readable(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"\.safetensors"):
        load(checkpoint)


def test_no_weights_and_a_damaged_index_are_said(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weights": 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="weight_map"):
        load(checkpoint)
    index.unlink()
    with pytest.raises(CheckpointError, match="got neither"):
        load(checkpoint)


def test_a_device_that_is_not_there_is_said(toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match=r"no CUDA device is visible( \(.*\))?; correct the parameter or NV_"):
        Engine.load(toy, CheckpointConfig.load(toy), device="cuda:0", dtype="auto")


def test_memory_too_small_for_the_weights_is_said_before_anything_is_read(published, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module, "_free_host_memory", lambda: 24 * 10**9)
    with pytest.raises(DeviceError, match=r"cpu: expected 3\d\.\d GB of free memory .* in float32; got 24.0 GB"):
        Engine.load(tmp_path, published, device="cpu", dtype="auto")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfDeviceMemory, "30 tokens, which the memory of cpu"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfDeviceMemory, "30 tokens"),
        (RuntimeError("a mistake of ours"), RuntimeError, "a mistake of ours"),
    ],
)
def test_errors_of_the_device_are_told_apart(toy, monkeypatch, raised, expected, message):
    engine = load(toy)

    def fail(batch):
        raise raised

    monkeypatch.setattr(engine, "network", fail)
    with pytest.raises(expected, match=re.escape(message)):
        engine.embed([TokenSequence(np.ones(30, dtype=np.int32), 0)])
    if expected is not RuntimeError:
        with pytest.raises(DeviceError, match="expected cpu to compute 512 tokens; got:"):
            engine.warm_up(0.01)


@pytest.mark.parametrize(
    ("raised", "answers", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True, OutOfDeviceMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), True, OutOfDeviceMemory),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
            True,
            OutOfDeviceMemory,
        ),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, OutOfDeviceMemory),
        (torch.AcceleratorError("CUDA error: invalid argument"), True, torch.AcceleratorError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, DeviceLost),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, DeviceLost),
        (RuntimeError("a mistake of ours"), True, RuntimeError),
    ],
)
def test_a_gpu_is_lost_only_if_it_answers_no_more(toy, monkeypatch, raised, answers, expected):
    engine = load(toy)
    monkeypatch.setattr(engine, "device", torch.device("cuda:0"))

    def synchronize(device):
        if not answers:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(expected), engine._errors([TokenSequence(np.ones(30, dtype=np.int32), 0)]):
        raise raised


@pytest.mark.slow
def test_warm_up_finds_how_many_tokens_take_the_time_that_a_batch_may_take(toy, monkeypatch):
    engine = load(toy)
    assert engine.warm_up(1e-6) == 512
    assert engine.warm_up(1e6) == 65536
    assert engine.warm_up(1e6, max_batch_tokens=2000) == 2000

    def only_small(sequences):
        if len(sequences) > 8:
            raise OutOfDeviceMemory("too much")
        time.sleep(0.005 * len(sequences))  # 40 ms for 1,024 tokens
        return np.zeros((len(sequences), 64), dtype=np.float32)

    monkeypatch.setattr(engine, "embed", only_small)
    assert engine.warm_up(1e6) == 1024
    assert engine.warm_up(0.06) == 1024  # in time there would be half as many more

    def break_later(sequences):
        if len(sequences) > 8:
            raise DeviceLost("cpu failed")
        return only_small(sequences)

    monkeypatch.setattr(engine, "embed", break_later)
    with pytest.raises(DeviceError, match="cpu failed"):
        engine.warm_up(1e6)


def test_progress_of_a_long_load_is_logged(toy, monkeypatch, caplog):
    monkeypatch.setattr("nv_embed.compute.weights._PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="nv_embed"):
        load(toy)
    assert any(re.search(r"loading weights: \d+\.\d of \d+\.\d GB", line) for line in caplog.messages)
    assert any("loaded" in line for line in caplog.messages)


@pytest.mark.slow
def test_loading_holds_the_weights_in_memory_once(tmp_path):
    """A 400 MB checkpoint in float32 may add little more than itself to a process's anonymous memory."""
    from reference import Reference, Sizes

    sizes = Sizes(20_000, 1024, 4, 8, 8, 4096, 4, 1, 8, 1e4)
    Reference(sizes, seed=0).save(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    script = """
import re, sys
from pathlib import Path
from nv_embed.config import CheckpointConfig
from nv_embed.compute.engine import Engine
def anonymous(peak=0):
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import threading
peak, before, done = anonymous(), anonymous(), threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
folder = Path(sys.argv[1])
engine = Engine.load(folder, CheckpointConfig.load(folder), device="cpu", dtype="float32")
done.set(); watcher.join()
print(max(peak, anonymous()) - before)
"""
    repository = Path(__file__).parents[1] / "model_repository" / "nv-embed-v2" / "1"
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert int(result.stdout) < 1.25 * weights
