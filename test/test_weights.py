"""Loading: exactly the published tensors, complete or not at all, in bounded memory."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nv_embed.compute import devices, loading
from nv_embed.compute.engine import Engine
from nv_embed.compute.loading import load_engine, load_engines
from nv_embed.compute.warm_up import warm_up
from nv_embed.compute.weights import checkpoint_shapes, fill_network
from nv_embed.errors import CheckpointError, DeviceError
from nv_embed.models import read_checkpoint
from nv_embed.sequence import TokenSequence
from safetensors.torch import load_file, save_file


def load(folder: Path, dtype: str = "float32") -> Engine:
    return load_engine(folder, read_checkpoint(folder), device="cpu", dtype=dtype)


@pytest.fixture
def checkpoint(toy, tmp_path) -> Path:
    """A copy of the toy checkpoint, to be damaged."""
    return Path(shutil.copytree(toy, tmp_path / "checkpoint"))


def test_the_published_sizes_give_exactly_the_published_tensors(published):
    with torch.device("meta"):
        network = published.network()
    shapes = checkpoint_shapes(network)
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
    copied = sum(math.prod(shape) for name, shape in shapes.items() if name not in network.folded_shapes())
    own = sum(parameter.numel() for parameter in network.parameters())
    assert own == copied + 2 * network.pooling.keys.weight.numel()  # keys and values stand for what is folded


def test_one_file_without_an_index_loads_as_well_as_shards(checkpoint, monkeypatch):
    # Each start measures how matrices should lie, and rounds products accordingly.
    monkeypatch.setattr("nv_embed.compute.loading.arrange", lambda engine: None)
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


def change_tensor(folder: Path, name: str, value: torch.Tensor | float, row: int | None = None) -> None:
    """Put another tensor in the place of one, or a number into a row of it."""
    (path,) = (path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    if row is None:
        tensors[name] = value
    else:
        tensors[name][row] = value
    save_file(tensors, path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_whose_row_is_no_numbers_is_refused_before_a_text_has_it(checkpoint, value):
    change_tensor(checkpoint, "embedding_model.embed_tokens.weight", value, row=777)
    with pytest.raises(
        CheckpointError, match=r"got NaN or infinity in row 777 of embedding_model\.embed_tokens\.weight; download them"
    ):
        load(checkpoint)


def test_a_layer_that_makes_no_numbers_is_refused_when_the_engine_warms_up(checkpoint):
    change_tensor(checkpoint, "embedding_model.layers.1.mlp.down_proj.weight", math.nan, row=5)
    with pytest.raises(
        CheckpointError, match="expected weights that make vectors of finite numbers; got NaN or infini"
    ):
        warm_up(load(checkpoint), TokenSequence(np.arange(1, 30, dtype=np.int32), 3), 1e-6, 512)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_numbers_that_would_need_a_scale_are_refused(checkpoint, dtype, kind):
    name = "embedding_model.layers.0.self_attn.v_proj.weight"
    shape = next(load_file(path)[name].shape for path in checkpoint.glob("*.safetensors") if name in load_file(path))
    change_tensor(checkpoint, name, torch.ones(shape).to(dtype))
    with pytest.raises(
        CheckpointError, match=f"1 tensors differ.*\n.*unusable {name}: .*got {kind}, whose scale is not"
    ):
        load(checkpoint)


def test_layers_that_the_config_leaves_out_are_named(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["text_config"]["num_hidden_layers"] = 1
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"\n  unexpected embedding_model\.layers\.1\.input_layernorm\.weight"):
        load(checkpoint)


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
    with pytest.raises(DeviceError, match=r"no CUDA device is visible( \(.*\))?; correct the setting \('cpu' "):
        load_engine(toy, read_checkpoint(toy), device="cuda:0", dtype="auto")


def test_memory_too_small_for_the_weights_is_said_before_anything_is_read(published, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "free_memory", lambda: 24 * 10**9)
    with pytest.raises(DeviceError, match=r"cpu: expected 3\d\.\d GB of free memory .* in float32; got 24.0 GB"):
        load_engine(tmp_path, published, device="cpu", dtype="auto")


def test_memory_that_other_models_of_the_server_have_reserved_is_not_free(toy, monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda: 2 * 10**9)
    monkeypatch.setattr(loading, "reserved_memory", lambda: 2 * 10**9)
    with pytest.raises(DeviceError, match=r"beside 2\.0 GB for the texts of the server's other models.* serve fewer"):
        load_engine(toy, read_checkpoint(toy), device="cpu", dtype="float32", max_sequence_tokens=10)


def test_memory_too_small_for_the_longest_texts_at_a_time_is_said_with_what_to_lower(toy, monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda: 10**9)
    checkpoint = read_checkpoint(toy)
    settings = {"devices": ["cpu"] * 4, "dtype": "float32"}
    before = torch.get_num_threads()
    try:
        load_engines(toy, checkpoint, **settings, max_sequence_tokens=32_768)
        with pytest.raises(DeviceError) as caught:
            load_engines(toy, checkpoint, **settings, max_sequence_tokens=1_000_000)
    finally:
        torch.set_num_threads(before)
    for words in (
        "for 4 texts of 1000000 tokens at a time",
        "1.0 GB",
        "max_sequence_tokens",
        "OMP_NUM_THREADS",
        "dtype",
    ):
        assert words in str(caught.value)


def test_progress_of_a_long_load_is_logged(toy, caplog):
    tensors = {name: tensor for shard in toy.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    with torch.device("meta"):
        network = read_checkpoint(toy).network()
    with caplog.at_level(logging.INFO, logger="nv_embed"):
        fill_network(network, tensors, torch.device("cpu"), log_seconds=0.0)
    assert any(re.search(r"loading weights: \d+\.\d of \d+\.\d GB", line) for line in caplog.messages)
    assert any("loaded" in line for line in caplog.messages)


@pytest.mark.slow
@pytest.mark.parametrize(("matrices", "most"), [("as they are", 1.25), ("arranged", 1.5)])  # one more, and some texts
def test_loading_holds_the_weights_in_memory_once(tmp_path, matrices, most):
    """A 400 MB checkpoint in float32 may add little more than itself to a process's anonymous memory."""
    from reference import Reference, Sizes

    sizes = Sizes(20_000, 1024, 4, 8, 8, 4096, 4, 1, 8, 1e4)
    Reference(sizes, seed=0).save(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    script = """
import re, sys
from pathlib import Path
from nv_embed.models import read_checkpoint
from nv_embed.compute.engine import Engine
import nv_embed.compute.loading
from nv_embed.compute.loading import load_engine, load_engines
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
if sys.argv[2] == "as they are":
    nv_embed.compute.loading.arrange = lambda engine: None
engine = load_engine(folder, read_checkpoint(folder), device="cpu", dtype="float32")
done.set(); watcher.join()
print(max(peak, anonymous()) - before)
"""
    repository = Path(__file__).parents[1] / "model_repository" / "nv-embed-v2" / "1"
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), matrices],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert int(result.stdout) < most * weights
