"""Whether an answer fits into the memory that the model shares with its server; knows no Triton.

Sending an answer that does not fit fails without a word to its client, so such an answer is replaced by an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from nv_embed.errors import InvalidRequest, RequestError, Unavailable

_OVERHEAD_BYTES = 2**20  # Triton's own in each region, and the steps in which a region grows


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """What there is now, in bytes."""

    region_bytes: int  # of the region, which grows as long as there is room outside and never shrinks
    region_free_bytes: int  # of it, not taken by requests and answers on their way
    outside_free_bytes: int  # by which the region may grow

    def refusal(self, num_bytes: int) -> RequestError | None:
        """Why an answer of this size cannot be sent; None if it can."""
        if num_bytes <= max(self.region_free_bytes, self.outside_free_bytes) - _OVERHEAD_BYTES:
            return None
        largest = max(self.region_bytes, self.outside_free_bytes) - _OVERHEAD_BYTES
        if num_bytes > largest:
            return InvalidRequest.of(
                expected=f"an answer of at most {max(largest, 0)} bytes, for which the server has shared memory",
                got=f"one of {num_bytes} bytes",
                remedy="split the request, or give the server's /dev/shm more room (docker run --shm-size)",
            )
        return Unavailable(
            f"expected room for an answer of {num_bytes} bytes in shared memory; got {self.region_free_bytes} bytes "
            "free beside other requests and answers; retry later, or give the server's /dev/shm more room "
            "(docker run --shm-size)"
        )
