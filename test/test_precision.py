"""Layers' matrices in 8 bits: smaller, near enough, compared at every start, and refused where they are not."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from nv_embed.compute.loading import load_engine
from nv_embed.compute.precision import SAMPLES, Float8Matrix, Int8Matrix, Precision
from nv_embed.errors import DeviceError
from nv_embed.models import read_checkpoint
from nv_embed.models.nv_embed import QUERY_INSTRUCTION
from safetensors.torch import load_file, save_file
from serving import Server

STORED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def load(folder, dtype):
    return load_engine(folder, read_checkpoint(folder), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def sequences(mini):
    tokenizer = read_checkpoint(mini).tokenizer(mini, 4096)
    texts = ["", "cats", "What makes a rainbow?", "A rainbow is light bent by drops of rain. " * 40]
    return tokenizer.encode(texts, "") + tokenizer.encode(texts[:3], QUERY_INSTRUCTION)


@pytest.mark.parametrize(("dtype", "floor"), [("int8", 0.999), ("float8", 0.995)])
def test_vectors_of_8_bit_matrices_are_near_those_of_float32(mini, sequences, dtype, floor, caplog):
    expected = load(mini, "float32").embed(sequences)
    with caplog.at_level(logging.INFO):
        engine = load(mini, dtype)
    rows = engine.embed(sequences)
    cosines = (rows * expected).sum(axis=1)
    assert cosines.min() >= floor
    assert cosines.max() < 1 - 1e-6  # yet it is another precision
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    for layer in engine.model.network.layers:
        assert {matrix.weight.dtype for matrix in layer.children()} == {STORED[dtype]}
    assert f"{dtype}: cosine of sample texts' vectors to those in " in caplog.text


@pytest.mark.parametrize("dtype", STORED)
def test_a_network_that_8_bits_do_not_hold_is_refused(toy, tmp_path, dtype):
    """Outliers: one weight of each row so large that the others fall below the smallest step of 8 bits."""
    folder = shutil.copytree(toy, tmp_path / "outliers")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensor[:, 0] = 1e6 * tensor.abs().max()
            if name.endswith("layernorm.weight"):
                tensor[0] = 0.0  # what is read there does not count
        save_file(tensors, shard)
    with pytest.raises(
        DeviceError, match=f"expected {dtype} to keep the vectors of {len(SAMPLES)} sample texts within"
    ):
        load(folder, dtype)


def test_it_is_served_when_the_environment_says_so(mini, mini_server, tmp_path):
    server = Server(tmp_path / "log.txt", mini, {"NV_EMBED_DTYPE": "int8"}).wait_until_ready()
    try:
        row, expected = (s.embed_query("What makes a rainbow?")[0] for s in (server, mini_server))
    finally:
        assert server.stop() == 0, server.log_text()
    assert 0.999 < row @ expected < 1 - 1e-6
    assert "int8: cosine of sample texts' vectors to those in float32 at least 0.99" in server.log_text()


def test_a_gpu_without_float8_is_named(mini, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    config = read_checkpoint(mini)
    with pytest.raises(DeviceError, match=r"8\.9 or later; got cuda:1 of 8\.0; set dtype to 'int8'"):
        Precision.choose("float8", torch.device("cuda:1"), config)
    assert Precision.choose("int8", torch.device("cuda:1"), config).dtype == torch.float16


def test_a_torch_without_float8_is_said(mini, monkeypatch):
    monkeypatch.delattr(torch, "_scaled_mm")
    with pytest.raises(DeviceError, match=r"expected float8 to run on cpu; got: .*scaled_mm.*; set dtype to 'auto'"):
        load(mini, "float8")


def test_the_published_network_in_int8_fits_a_card_of_16_gb(published):
    sizes = {}
    for name in ("auto", "int8"):
        precision = Precision.choose(name, torch.device("cuda:0"), published)
        with torch.device("meta"):
            sizes[name] = precision.num_bytes(published.network().to(precision.dtype)) / 1e9
    assert 14.6 < sizes["auto"] < 14.8
    assert 7.8 < sizes["int8"] < 8.1  # one layer in half precision included


@pytest.mark.parametrize("kind", [Int8Matrix, Float8Matrix])
def test_a_large_row_does_not_make_another_coarse(kind):
    """As it would with one scale for all rows, of the input or of the matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    weight[1] *= 1e6
    x = torch.randn(2, 64, generator=generator).bfloat16()
    x[1] *= 1e6
    product = kind(weight.bfloat16())(x).float()
    for rows, outputs in ((0, slice(2, None)), (1, slice(2, None)), (0, 1), (1, 1)):
        expected = (x.float() @ weight.T)[rows, outputs]
        assert (product[rows, outputs] - expected).norm() < 0.1 * x.float()[rows].norm() * weight[outputs].norm() / 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("lost")])
def test_a_device_that_fails_while_loading_is_not_taken_for_one_that_lacks_the_precision(mini, monkeypatch, error):
    def fail(self, x):
        raise error

    monkeypatch.setattr(Int8Matrix, "forward", fail)
    with pytest.raises(DeviceError, match="cpu: loading the weights in int8 failed: "):
        load(mini, "int8")
