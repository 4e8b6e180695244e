"""Warm-up finds how many tokens take the time that a batch may take."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from nv_embed.compute.devices import Cpu
from nv_embed.compute.engine import Engine
from nv_embed.compute.warm_up import warm_up
from nv_embed.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from nv_embed.sequence import TokenSequence

SEQUENCE = TokenSequence(np.ones(128, dtype=np.int32), 0)


class Slow:
    """As slow as is said; computes nothing of more than so many sequences."""

    def __init__(self, seconds=0.0, most=10**9, error=OutOfDeviceMemory):
        self.seconds, self.most, self.error, self.largest = seconds, most, error, 0

    def embed(self, sequences, work):
        if len(sequences) > self.most:
            raise self.error("too much")
        self.largest = max(self.largest, len(sequences))
        time.sleep(self.seconds * len(sequences))
        return torch.zeros(len(sequences), 4)


def found(model, target_seconds, most_tokens=None):
    return warm_up(Engine(model, Cpu()), SEQUENCE, target_seconds, 512, most_tokens)


def test_at_least_as_much_is_computed_as_is_said_and_at_most_what_helps():
    assert found(Slow(seconds=0.001), 1e-6) == 512
    assert found(Slow(), 1e6) == 65536


def test_no_more_is_tried_than_will_be_asked_for():
    model = Slow()
    assert found(model, 1e6, most_tokens=2000) == 2000
    assert 128 * model.largest <= 2000


def test_what_does_not_fit_into_memory_is_not_used():
    assert found(Slow(seconds=0.005, most=8), 1e6) == 1024
    assert found(Slow(seconds=0.005, most=8), 0.06) == 1024  # in time there would be half as many more


def test_a_device_that_cannot_compute_the_least_prevents_startup():
    with pytest.raises(DeviceError, match="expected cpu to compute 512 tokens; got: too much; free memory on it, or"):
        found(Slow(most=2), 1e6)
    with pytest.raises(DeviceError, match="too much"):
        found(Slow(most=8, error=DeviceLost), 1e6)


def test_a_sequence_of_any_length_serves_as_sample():
    long = TokenSequence(np.ones(700, dtype=np.int32), 0)
    assert warm_up(Engine(Slow(), Cpu()), long, 1e6, 512, 512) == 512
