"""Compiled layers compute what the network computes; where they do not, they are not used."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
import torch
from nv_embed.compute import compiled
from nv_embed.compute.compiled import compile_network
from nv_embed.compute.engine import Engine
from nv_embed.compute.loading import load_engine, load_engines
from nv_embed.compute.packing import pack
from nv_embed.errors import DeviceError
from nv_embed.models import read_checkpoint
from nv_embed.sequence import TokenSequence
from serving import Server

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")  # a name is no device: nothing runs on the second here


def load(folder, **settings) -> Engine:
    return load_engine(folder, read_checkpoint(folder), device="cpu", dtype="float32", **settings)


def drawn(random: Random, num_sequences: int, most_tokens: int) -> list[TokenSequence]:
    sequences = []
    for _ in range(num_sequences):
        ids = [random.randrange(3, 100) for _ in range(random.randint(2, most_tokens))]
        sequences.append(TokenSequence(np.array(ids, dtype=np.int32), random.randrange(len(ids) - 1)))
    return sequences


@pytest.fixture
def num_threads():
    """Put back to what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own older parts, which its compiler imports
def test_compiled_layers_give_the_same_rows_for_any_number_of_tokens_without_compiling_again(toy, num_threads):
    plain = load(toy)
    settings = {"devices": ["cpu", "cpu"], "dtype": "float32", "compile_layers": "on", "max_sequence_tokens": 512}
    fast, same = load_engines(toy, read_checkpoint(toy), **settings)
    assert fast is same
    assert fast.model.is_compiled
    random = Random(3)
    with torch.compiler.set_stance("fail_on_recompile"), ThreadPoolExecutor(1) as thread:  # as the server computes
        for num_sequences in range(1, 25):
            sequences = drawn(random, num_sequences, 200)
            rows = thread.submit(fast.embed, sequences).result()
            np.testing.assert_allclose(rows, plain.embed(sequences), atol=1e-5)
    one_token = [TokenSequence(np.array([5], dtype=np.int32), 0)]  # another program to torch, so computed as it stands
    np.testing.assert_allclose(fast.embed(one_token), plain.embed(one_token), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("dtype", "least_cosine"), [("int8", 0.999), ("float8", 0.98)])
def test_layers_of_8_bits_compile_too(mini, dtype, least_cosine):
    config = read_checkpoint(mini)
    fast, plain = (
        load_engine(mini, config, device="cpu", dtype=dtype, compile_layers=choice) for choice in ("on", "off")
    )
    assert fast.model.is_compiled
    random = Random(6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_sequences in (1, 4, 20):
            sequences = drawn(random, num_sequences, 100)
            assert (fast.embed(sequences) * plain.embed(sequences)).sum(axis=1).min() > least_cosine


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU with g++")
def test_a_server_compiles_inside_triton_whose_python_is_not_quite_like_any_other(toy, tmp_path):
    server = Server(tmp_path / "log.txt", toy, {"NV_EMBED_COMPILE": "on", "LC_ALL": "C"}).wait_until_ready()
    case = next(c for c in json.loads((toy / "cases.json").read_text("utf-8")) if c["name"] == "documents")
    rows = server.embed_documents(case["texts"])
    np.testing.assert_allclose(rows, np.load(toy / "expected.npz")["documents"], atol=1e-5)
    assert server.stop() == 0
    assert "cpu: layers compiled" in server.log_text()


def missing(function):
    def fail(*inputs):
        raise RuntimeError("no compiler\nand a long story")

    return fail


def wrong(function):
    def zeros(*inputs):
        outputs = function(*inputs)
        return torch.zeros_like(outputs) if isinstance(outputs, torch.Tensor) else outputs

    return zeros


@pytest.mark.parametrize(
    ("broken", "message"),
    [(missing, "RuntimeError: no compiler"), (wrong, "its vectors have a cosine of")],
    ids=["no compiler", "wrong results"],
)
def test_layers_that_do_not_compile_stop_the_start_or_are_computed_as_they_stand(
    toy, monkeypatch, caplog, broken, message
):
    network = load(toy).model.network
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "pack", lambda sequences, device: pack(sequences, CPU))
    with torch.inference_mode():
        with pytest.raises(DeviceError, match=f"expected the layers to compile for cpu; got: .*{message}.*; install"):
            compile_network(network, "on", CPU)
        compile_network(network, "auto", GPU)
    assert "layers not compiled" in caplog.text
    assert message in caplog.text
    assert not any("before_attention" in vars(layer) for layer in network.layers)


def test_a_cpu_does_not_compile_unless_told(toy):
    network = load(toy).model.network
    compile_network(network, "auto", CPU)
    assert "before_attention" not in vars(network.layers[0])


# --- on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", [0, 1])
def test_a_gpu_compiles_and_gives_the_rows_of_a_cpu(toy, number):
    if number >= torch.cuda.device_count():
        pytest.skip(f"there is no cuda:{number}")
    config, plain = read_checkpoint(toy), load(toy)
    fast = load_engine(toy, config, device=f"cuda:{number}", dtype="float16", compile_layers="on")
    assert fast.model.is_compiled
    random = Random(5)
    batches = [drawn(random, num_sequences, 100) for num_sequences in [1, 2, 5, 40, 1, 30]]
    # One thread starts a batch while the other waits for one.
    with torch.compiler.set_stance("fail_on_recompile"), ThreadPoolExecutor(2) as threads:
        for rows, batch in zip(threads.map(fast.embed, batches), batches, strict=True):
            assert (rows * plain.embed(batch)).sum(axis=1).min() > 0.999
