"""How a CPU and a GPU take batches, compute and fail. The GPU's events are stood in for; nothing else is."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count

import numpy as np
import pytest
import torch
from nv_embed.compute.devices import Cpu, Gpu
from nv_embed.compute.engine import Engine
from nv_embed.compute.loading import load_engine
from nv_embed.compute.pieces import Whole
from nv_embed.errors import DeviceLost, OutOfDeviceMemory
from nv_embed.models import read_checkpoint
from nv_embed.sequence import TokenSequence

WAIT_SECONDS = 60
SEQUENCES = [TokenSequence(np.arange(1, 31, dtype=np.int32), 0)]
HUGE = 10**12  # multiply-adds of a row: each few rows are a piece of their own


def batches(*waiting):
    """What `next_batch` returns, one after the other."""
    return iter(waiting).__next__


class Model:
    """Calls what it is told to where it computes."""

    def __init__(self, act=lambda work: None):
        self.act = act

    def embed(self, sequences, work):
        self.act(work)
        return torch.ones(len(sequences), 1)


def in_pieces(work):
    for _ in work.pieces(1000, HUGE):
        pass


def drawn(seed, *lengths):
    generator = np.random.default_rng(seed)
    return [TokenSequence(generator.integers(3, 1000, n).astype(np.int32), n // 5) for n in lengths]


# --- a CPU ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(mini):
    return load_engine(mini, read_checkpoint(mini), device="cpu", dtype="float32")


def test_the_next_batch_is_asked_for_once_and_here_and_nothing_is_the_end():
    asked = []

    def next_batch():
        asked.append(threading.current_thread())
        return SEQUENCES

    engine = Engine(Model(), Cpu())
    assert engine.compute(next_batch).vectors.tolist() == [[1.0]]
    assert asked == [threading.current_thread()]
    assert engine.compute(lambda: None) is None
    assert engine.compute(list) is None


def test_threads_compute_beside_each_other():
    both = threading.Barrier(2, timeout=WAIT_SECONDS)
    engine = Engine(Model(lambda work: both.wait()), Cpu())
    with ThreadPoolExecutor(2) as threads:
        assert len(list(threads.map(engine.embed, [SEQUENCES] * 2))) == 2


def test_a_pass_in_pieces_gives_the_vectors_of_a_whole_one(engine):
    """Pieces of a few rows, which begin and end anywhere in sequences."""

    class Few:
        def __init__(self, num_rows):
            self.num_rows, self.num_pieces = num_rows, 0

        def pieces(self, num_rows, multiply_adds, fewest_rows=1):
            for start in range(0, num_rows, self.num_rows):
                self.num_pieces += 1
                yield slice(start, min(start + self.num_rows, num_rows))

        def little_left(self):
            pass

    sequences = drawn(0, 1, 70, 5, 33, 200)
    with torch.inference_mode():
        expected = engine.model.embed(sequences, Whole())
        for num_rows in (1, 7, 64, 100, 500):
            few = Few(num_rows)
            np.testing.assert_allclose(engine.model.embed(sequences, few), expected, atol=1e-6)
            assert few.num_pieces > 12 * 309 / num_rows


@pytest.mark.slow
def test_a_long_text_is_computed_in_pieces_between_which_other_batches_come(engine):
    long, short = drawn(1, 6000), drawn(2, 20, 9)
    with torch.inference_mode():
        expected = engine.model.embed(long, Whole())
    alone, nested = engine.embed(short), []

    def pause():
        nested.append(engine.compute(lambda: short, lambda: pytest.fail("so short a batch has no pause")).vectors)

    np.testing.assert_allclose(engine.compute(lambda: long, pause).vectors, expected, atol=1e-5)
    assert len(nested) >= 5
    for vectors in nested:
        np.testing.assert_allclose(vectors, alone, atol=1e-6)


def test_a_batch_as_long_as_queries_wait_for_is_paused_for_a_few_times_at_most(engine):
    pauses = count()
    engine.compute(lambda: drawn(3, *[128] * 16), lambda: next(pauses))
    assert next(pauses) <= 2


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), torch.OutOfMemoryError("x"), KeyboardInterrupt()])
def test_what_a_pause_raises_gives_the_pass_up_and_comes_out_unchanged(error):
    def pause():
        raise error

    with pytest.raises(type(error)) as caught:
        Engine(Model(in_pieces), Cpu()).compute(lambda: SEQUENCES, pause)
    assert caught.value is error


def test_pauses_do_not_count_as_time_on_the_device():
    pauses, started = [], time.monotonic()

    def pause():
        begun = time.monotonic()
        time.sleep(0.3)
        pauses.append(time.monotonic() - begun)

    computed = Engine(Model(in_pieces), Cpu()).compute(lambda: SEQUENCES, pause)
    assert pauses
    assert 0 <= computed.seconds <= time.monotonic() - started - sum(pauses)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfDeviceMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfDeviceMemory),
        (RuntimeError("a mistake of ours"), RuntimeError),
        (ValueError("out of memory"), ValueError),
    ],
)
def test_a_cpu_out_of_memory_is_told_apart(raised, expected):
    def fail(work):
        raise raised

    with pytest.raises(expected) as caught:
        Engine(Model(fail), Cpu()).embed(SEQUENCES)
    assert type(caught.value) is expected
    assert (caught.value is raised) == (expected is not OutOfDeviceMemory)
    if expected is OutOfDeviceMemory:
        assert str(caught.value) == "30 tokens, which the memory of cpu does not hold"


# --- a GPU ----------------------------------------------------------------------------------------------


class FakeEvent:
    """An event of the device: passed at once unless the test holds it back."""

    def __init__(self, enable_timing=False, blocking=False):
        self.is_mark = not enable_timing  # of where little is left
        self.error, self.gate, self.is_waited_for = None, threading.Event(), threading.Event()
        self.gate.set()

    def record(self):
        pass

    def synchronize(self):
        if self.error:
            raise self.error
        self.is_waited_for.set()
        assert self.gate.wait(WAIT_SECONDS)

    def elapsed_time(self, other):
        return 1500.0


@pytest.fixture
def events(monkeypatch):
    """Every event, in the order in which they were made; the first is the mark."""
    made = []

    def event(**options):
        made.append(FakeEvent(**options))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def gpu(model=None):
    return Engine(model or Model(), Gpu(torch.device("cuda:0")))


def test_a_gpu_says_how_long_it_took(events):
    computed = gpu().compute(lambda: SEQUENCES, lambda: pytest.fail("a GPU does not pause"))
    assert computed.vectors.tolist() == [[1.0]]
    assert computed.seconds == 1.5
    assert gpu().compute(lambda: None) is None


def test_the_next_batch_is_asked_for_when_little_is_left_of_the_one_before_whose_result_is_waited_for_outside(events):
    marks = count()
    launched = threading.Event()

    def launch(work):
        work.little_left()
        next(marks)
        (mark, *_, ended) = events
        if not launched.is_set():
            mark.gate.clear()  # the first batch has a long way to go
            ended.gate.clear()
            launched.set()

    engine, asked = gpu(Model(launch)), threading.Event()

    def next_batch():
        asked.set()
        return SEQUENCES

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(engine.embed, SEQUENCES)
        assert launched.wait(WAIT_SECONDS)
        (mark, *_, ended) = events
        assert ended.is_waited_for.wait(WAIT_SECONDS)
        mark.is_waited_for.clear()
        second = threads.submit(engine.compute, next_batch)
        assert mark.is_waited_for.wait(WAIT_SECONDS)
        assert not asked.is_set()  # much is left
        mark.gate.set()
        assert asked.wait(WAIT_SECONDS)
        assert second.result(WAIT_SECONDS).vectors.shape == (1, 1)
        assert not first.done()  # though it began before
        ended.gate.set()
        assert first.result(WAIT_SECONDS).shape == (1, 1)


def test_who_waits_for_work_holds_the_turn_and_an_error_there_gives_it_back(events):
    engine = gpu()
    with pytest.raises(LookupError):
        engine.compute(lambda: {}["nothing"])
    assert engine.embed(SEQUENCES).shape == (1, 1)


def test_a_broken_gpu_is_lost_for_each_who_asks_and_blocks_nobody(events):
    engine = gpu()
    events[0].error = torch.AcceleratorError("device-side assert")
    for _ in range(2):
        with pytest.raises(DeviceLost, match="cuda:0 failed; the server must restart"):
            engine.compute(lambda: pytest.fail("nothing is to be computed"))


@pytest.mark.parametrize(
    ("raised", "answers", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True, OutOfDeviceMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), True, OutOfDeviceMemory),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True, OutOfDeviceMemory),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, OutOfDeviceMemory),
        (torch.AcceleratorError("CUDA error: invalid argument"), True, torch.AcceleratorError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, DeviceLost),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, DeviceLost),
        (RuntimeError("a mistake of ours"), True, RuntimeError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["launched", "waited for"])
def test_a_gpu_is_lost_only_if_it_answers_no_more(events, monkeypatch, raised, answers, expected, when):
    def synchronize(device):
        if not answers:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    def act(work):
        if when == "launched":
            raise raised
        events[-1].error = raised

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    engine = gpu(Model(act))
    with pytest.raises(expected):
        engine.embed(SEQUENCES)
    engine.model.act = lambda work: None
    assert engine.embed(SEQUENCES).shape == (1, 1)  # the turn was given back
