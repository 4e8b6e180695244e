"""Runs a server with the gateway beside it, until one of them ends or SIGTERM or Ctrl-C asks; then ends the other.

    python tools/with_gateway.py COUNT GATEWAY... SERVER...

The first COUNT words are the gateway's command. On request the gateway ends first, because what it still has to answer
needs the server. The exit code is the server's, or the gateway's if that ended unasked. Both commands may restart what
they run. Needs the standard library only.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence

# With the 30 s that Triton takes at most, less than the 40 s that those who stop a server should give it.
_GATEWAY_SECONDS = 5.0  # for requests at the gateway, before the server is told to stop
_LAST_SECONDS = 3.0  # for a gateway whose server is gone


async def run(gateway_command: Sequence[str], server_command: Sequence[str]) -> int:
    """Returns the exit code, as a shell gives it: 128 and the number of a signal that ended the process."""
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    # In sessions of their own: a terminal's Ctrl-C would reach both at once.
    server = await asyncio.create_subprocess_exec(*server_command, start_new_session=True)
    gateway = await asyncio.create_subprocess_exec(*gateway_command, start_new_session=True)
    server_ends, gateway_ends = (asyncio.create_task(process.wait()) for process in (server, gateway))
    is_asked = asyncio.create_task(asked.wait())
    await asyncio.wait([server_ends, gateway_ends, is_asked], return_when=asyncio.FIRST_COMPLETED)

    gateway_failed = gateway_ends.done() and not is_asked.done() and not server_ends.done()
    if gateway_failed:
        print(f"The gateway ended with exit code {_as_shell(gateway)}; stopping the server", file=sys.stderr)
    _terminate(gateway)
    await asyncio.wait(
        [server_ends, gateway_ends],
        timeout=0 if server_ends.done() or gateway_ends.done() else _GATEWAY_SECONDS,
        return_when=asyncio.FIRST_COMPLETED,
    )
    _terminate(server)
    await server_ends
    if not gateway_ends.done():
        await asyncio.wait([gateway_ends], timeout=_LAST_SECONDS)
    if not gateway_ends.done():
        gateway.kill()
    await gateway_ends
    is_asked.cancel()
    return _as_shell(gateway) or 1 if gateway_failed else _as_shell(server)


def _terminate(process: Process) -> None:
    if process.returncode is None:
        process.terminate()


def _as_shell(process: Process) -> int:
    code = process.returncode
    assert code is not None, "it has ended"
    return code if code >= 0 else 128 - code


def main() -> int:
    """Read the command line; returns the exit code."""
    count = int(sys.argv[1])
    return asyncio.run(run(sys.argv[2 : 2 + count], sys.argv[2 + count :]))


if __name__ == "__main__":
    sys.exit(main())
