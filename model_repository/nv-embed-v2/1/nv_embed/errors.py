"""Everything that can go wrong, as types; knows nothing of how an error reaches a client.

NVEmbedError
├── DeviceLost               the device is beyond use for this process, which must restart
├── StartupError             the server must not start
│   ├── ConfigError          a parameter is unknown, malformed or contradicts another
│   ├── CheckpointError      the checkpoint folder is missing, incomplete or of another model
│   └── DeviceError          the device is absent, too small, or cannot do what is asked of it
└── RequestError             one request gets no embeddings; the others do not notice
    ├── InvalidRequest       the caller can mend it; the same request will fail again
    ├── Unavailable          too much waits, or the server stops; the same request may succeed later
    ├── Cancelled            nobody waits for the answer any more
    ├── OutOfDeviceMemory    this batch does not fit on the device beside the weights
    └── ComputeFailed        something failed on the way, through no fault of the caller
"""

from __future__ import annotations

# Of a library's error.
_START_CHARACTERS, _END_CHARACTERS = 300, 200


class NVEmbedError(Exception):
    """Base of all errors raised on purpose. The message is fit for a client: no paths of code, no request text."""


class DeviceLost(NVEmbedError):
    """The device is beyond use for this process, which must restart."""


class StartupError(NVEmbedError):
    """The server must not start; the message says what to change."""


class ConfigError(StartupError):
    """A parameter is unknown, malformed or contradicts another."""


class CheckpointError(StartupError):
    """The checkpoint folder is missing, incomplete or holds another model."""


class DeviceError(StartupError):
    """The device is absent, too small, or cannot do what is asked of it."""


class RequestError(NVEmbedError):
    """One request gets no embeddings; the others do not notice."""


class InvalidRequest(RequestError):
    """The caller can mend it; the same request will fail again."""

    @classmethod
    def of(cls, *, expected: str, got: str, remedy: str) -> InvalidRequest:
        """The one form of message a caller meets: what was expected, what came, what to do."""
        return cls(f"expected {expected}; got {got}; {remedy}")


class Unavailable(RequestError):
    """Too much waits, or the server stops; the same request may succeed later."""


class Cancelled(RequestError):
    """Nobody waits for the answer any more."""


class OutOfDeviceMemory(RequestError):
    """This batch does not fit on the device beside the weights."""


class ComputeFailed(RequestError):
    """Reading, tokenizing or computing failed, through no fault of the caller."""


def in_short(error: BaseException) -> str:
    """What a library's error says, in a line: the start and the end of a long one, and its name where it says nothing.

    Some libraries say first what they did, and in later lines what was wrong with it.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _START_CHARACTERS + _END_CHARACTERS:
        return text
    start, end = text[:_START_CHARACTERS].rpartition(" ")[0], text[-_END_CHARACTERS:].partition(" ")[2]
    return f"{start or text[:_START_CHARACTERS]} ... {end or text[-_END_CHARACTERS:]}"
