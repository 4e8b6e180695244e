"""One async client for each event loop, for adapters that frameworks call from several."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from nv_embed_client.async_client import AsyncNVEmbedClient


class ClientPerLoop:
    """Makes a client in each loop that asks for one."""

    def __init__(self, make_client: Callable[[], AsyncNVEmbedClient]) -> None:
        self._make_client = make_client
        self._clients: dict[asyncio.AbstractEventLoop, AsyncNVEmbedClient] = {}
        self._lock = threading.Lock()  # loops run in threads of their own

    def get(self) -> AsyncNVEmbedClient:
        """The client of the running loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._clients:
                # A client holds its loop, so weak references would keep both: drop those whose loop has ended.
                self._clients = {known: client for known, client in self._clients.items() if not known.is_closed()}
                self._clients[loop] = self._make_client()
            return self._clients[loop]
