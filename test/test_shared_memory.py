"""Whether an answer fits into the memory shared with the server."""

from __future__ import annotations

import pytest
from nv_embed.errors import InvalidRequest, Unavailable
from nv_embed.shared_memory import SharedMemory

MIB = 2**20


@pytest.mark.parametrize(
    ("memory", "num_mebibytes", "refusal"),
    [
        (SharedMemory(32 * MIB, 30 * MIB, 0), 28, None),
        (SharedMemory(32 * MIB, 3 * MIB, 500 * MIB), 256, None),  # the region grows
        (SharedMemory(300 * MIB, 3 * MIB, 100 * MIB), 256, Unavailable),  # others fill the region for now
        (SharedMemory(32 * MIB, 30 * MIB, 100 * MIB), 256, InvalidRequest),
        (SharedMemory(32 * MIB, 30 * MIB, 100 * MIB), 99, None),
        (SharedMemory(32 * MIB, 30 * MIB, 100 * MIB), 100, InvalidRequest),  # nothing is left for Triton's own
    ],
)
def test_an_answer_is_sent_retried_or_refused_by_what_is_free_and_what_could_be(memory, num_mebibytes, refusal):
    error = memory.refusal(num_mebibytes * MIB)
    assert type(error) is (refusal or type(None))
    if error:
        assert f"{num_mebibytes * MIB} bytes" in str(error)
        assert "/dev/shm more room" in str(error)
