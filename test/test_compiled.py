"""Compiled layers and recorded batches compute what the network computes; where they do not, they are not used."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from random import Random

import numpy as np
import pytest
import torch
from nv_embed.compute import compiled, engine, recorded
from nv_embed.compute.compiled import compile_network
from nv_embed.compute.engine import Engine, load_engines
from nv_embed.compute.packing import pack
from nv_embed.compute.recorded import RecordedBatches, record_batches
from nv_embed.config import CheckpointConfig
from nv_embed.errors import DeviceError, DeviceLost
from nv_embed.tokenizer import TokenSequence
from serving import Server

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")  # a name is no device: nothing runs on the second here


def load(folder, **settings) -> Engine:
    return Engine.load(folder, CheckpointConfig.load(folder), device="cpu", dtype="float32", **settings)


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
    settings = {"devices": ["cpu", "cpu"], "dtype": "float32", "compile_layers": "on"}
    fast, same = load_engines(toy, CheckpointConfig.load(toy), **settings)
    assert fast is same
    assert fast.is_compiled
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
    config = CheckpointConfig.load(mini)
    fast, plain = (
        Engine.load(mini, config, device="cpu", dtype=dtype, compile_layers=choice) for choice in ("on", "off")
    )
    assert fast.is_compiled
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
    network = load(toy).network
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "pack", lambda sequences, device: pack(sequences, CPU))
    with torch.inference_mode():
        with pytest.raises(DeviceError, match=f"expected the layers to compile for cpu; got: .*{message}.*; install"):
            compile_network(network, "on", CPU)
        compile_network(network, "auto", GPU)
    assert "layers not compiled" in caplog.text
    assert message in caplog.text
    assert not any("before_attention" in vars(layer) for layer in network.layers)


def test_a_cpu_neither_compiles_nor_records_unless_told(toy):
    network = load(toy).network
    compile_network(network, "auto", CPU)
    assert "before_attention" not in vars(network.layers[0])
    assert record_batches(network, "auto", CPU) is None


# --- recorded batches -----------------------------------------------------------------------------------


def attend_on_device(q, k, v, batch):
    """Goes by what the device holds, as kernels do: what the host knows of a batch is not recorded with it."""
    place = torch.arange(len(q))
    owner = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), place, right=True)
    groups = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(owner[:, None] != owner, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def record(compute):
    """Like a graph: the same computation on whatever its inputs hold, into the same outputs."""
    outputs = compute()

    def replay():
        for old, new in zip(outputs, compute(), strict=True):
            old.copy_(new)

    return outputs, replay


@pytest.fixture
def recordable(toy):
    network = load(toy).network
    network.attend = attend_on_device
    return network


@torch.inference_mode()
def test_a_replayed_batch_gives_the_same_rows_whatever_was_replayed_before(toy, recordable):
    plain, replayed = load(toy), RecordedBatches(recordable, CPU, record)
    replayed.check()
    random = Random(4)
    for num_sequences in [1, 2, 5, 1, 12, 30, 3]:
        sequences = drawn(random, num_sequences, 512 // num_sequences)
        marks = count()
        rows = replayed(sequences, partial(next, marks))
        assert rows is not None
        assert next(marks) == 1
        np.testing.assert_allclose(rows.numpy(), plain.embed(sequences), atol=1e-5)


@torch.inference_mode()
def test_a_batch_without_room_in_any_recording_is_not_replayed(recordable):
    replayed = RecordedBatches(recordable, CPU, record, sizes=(64, 128))
    full = [TokenSequence(np.full(128, 5, dtype=np.int32), 0)]
    assert replayed(full) is not None  # nothing is left to fill up
    too_many = [TokenSequence(np.full(129, 5, dtype=np.int32), 0)]
    assert replayed(too_many, partial(pytest.fail, "nothing is about to end")) is None
    short = TokenSequence(np.full(2, 5, dtype=np.int32), 0)
    assert replayed([short] * 8) is not None
    assert replayed([short] * 9) is None  # sequences


@torch.inference_mode()
def test_recordings_that_give_other_rows_are_refused(recordable):
    def forgetful(compute):
        return compute(), lambda: None  # replays nothing

    with pytest.raises(ValueError, match="64 tokens replayed have a cosine of"):
        RecordedBatches(recordable, CPU, forgetful).check()


def test_a_gpu_that_cannot_record_computes_every_batch_and_says_so(recordable, monkeypatch, caplog):
    def no_capture(device):
        raise RuntimeError("capture is not supported")

    monkeypatch.setattr(recorded, "record_on_gpu", no_capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert record_batches(recordable, "off", GPU) is None
    assert not caplog.text
    assert record_batches(recordable, "auto", GPU) is None
    assert "small batches not recorded, which is slower, for: capture is not supported" in caplog.text
    with pytest.raises(DeviceError, match=r"expected small batches to be recorded on cuda:0; got: capture .*; set"):
        record_batches(recordable, "on", GPU)


def test_a_gpu_that_breaks_while_recording_stops_the_start(recordable, monkeypatch):
    def broken(device):
        raise torch.AcceleratorError("illegal memory access")

    monkeypatch.setattr(recorded, "record_on_gpu", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceError, match="recording small batches broke cuda:0: illegal memory access; set compile"):
        record_batches(recordable, "auto", GPU)


# --- turns ----------------------------------------------------------------------------------------------


class FakeEvent:
    def __init__(self):
        self.error = None

    def synchronize(self):
        if self.error:
            raise self.error


def test_a_turn_on_a_broken_gpu_is_refused_and_does_not_block_the_next(toy, monkeypatch):
    monkeypatch.setattr(engine, "_event", FakeEvent)
    broken = Engine(load(toy).network, GPU)
    with broken.turn:
        pass
    broken._little_left.error = torch.AcceleratorError("device-side assert")
    for _ in range(2):
        with pytest.raises(DeviceLost, match="cuda:0 failed"), broken.turn:
            pass


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_compiled_kernels_error_on_a_gpu_is_the_devices_only_if_nothing_computes_any_more(toy, monkeypatch, is_lost):
    def synchronize(device):
        if is_lost:
            raise torch.AcceleratorError("illegal memory access")

    monkeypatch.setattr(engine, "_event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    gpu = Engine(load(toy).network, GPU)
    with pytest.raises(DeviceLost if is_lost else RuntimeError), gpu._errors([]):
        raise RuntimeError("Triton Error [CUDA]: ...")


# --- on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", [0, 1])
def test_a_gpu_compiles_records_and_gives_the_rows_of_a_cpu(toy, number):
    if number >= torch.cuda.device_count():
        pytest.skip(f"there is no cuda:{number}")
    config, plain = CheckpointConfig.load(toy), load(toy)
    fast = Engine.load(toy, config, device=f"cuda:{number}", dtype="float16", compile_layers="on")
    assert fast.is_compiled
    assert fast.recorded is not None
    random = Random(5)
    batches = [drawn(random, num_sequences, 100) for num_sequences in [1, 2, 5, 40, 1, 30]]
    # One thread starts a batch while the other waits for one.
    with torch.compiler.set_stance("fail_on_recompile"), ThreadPoolExecutor(2) as threads:
        for rows, batch in zip(threads.map(fast.embed, batches), batches, strict=True):
            assert (rows * plain.embed(batch)).sum(axis=1).min() > 0.999
