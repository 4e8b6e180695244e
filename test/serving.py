"""A real tritonserver started through `serve.sh`, and ways to ask it; both test suites use it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from started_server import ROOT, START_SECONDS, Ports, Started, StartedServer, answers, free_ports

__all__ = ["ROOT", "START_SECONDS", "Ports", "Started", "free_ports"]  # from here, too

MODEL_NAME = "nv-embed-v2"
SETTINGS = (  # of serve.sh and the model, but for VENV and GATEWAY_VENV, which every test shares
    "NV_EMBED_", "MODEL_", "DEVICE", "RUNTIME", "ADDRESS", "METRICS_", "IMAGE", "SHM_", "TLS_", "ADMIN_KEY", "RESTART",
    "MAX_DELAY_SECONDS", "MAX_CONNECTION_SECONDS", "TRACE_", "GATEWAY_PORT", "GATEWAY_HOST", "GATEWAY_A",
)  # fmt: skip
DEADLINE_SECONDS = 180  # for what takes a moment: the machine may be busy with anything


class Server(StartedServer):
    """One `serve.sh`, from start to stop."""

    def __init__(
        self,
        log: Path,
        model_path: Path | None,
        environ: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        ports: Ports | None = None,
        command: Sequence[str | Path] = (ROOT / "serve.sh",),
    ) -> None:
        """Start, without waiting. Settings of the caller's own shell that would change the server are left out."""
        model = {} if model_path is None else {"MODEL_PATH": str(model_path), "DEVICE": "cpu"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
        exact = {"NV_EMBED_DTYPE": "float32"}  # 'auto' depends on the processor, and tests compare to 1e-5
        super().__init__(
            log, exact | model | dict(environ or {}), environ=kept, arguments=arguments, ports=ports, command=command,
            cwd=log.parent,
        )  # fmt: skip
        # serve.sh names other kinds of checkpoints as their folders; those have this file.
        is_other = model_path is not None and (model_path / "modules.json").is_file()
        self.model = model_path.name if model_path and is_other else MODEL_NAME
        self.http, self.grpc, self.metrics = self.ports.http, self.ports.grpc, self.ports.metrics
        self.url = self.ports.url
        self.client = triton.InferenceServerClient(self.url)

    def wait_until_ready(self) -> Server:
        """Return when it is ready and its metrics can be read: Triton opens their port last."""
        super().wait_until_ready()
        eventually(lambda: answers(f"http://127.0.0.1:{self.metrics}/metrics"))
        return self

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; returns the exit code."""
        self.client.close()
        return super().stop(with_signal)

    def infer(
        self, query=None, documents=None, parameters=None, outputs=("embeddings", "token_counts"), timeout=600,
        model=None,
    ):  # fmt: skip
        """One gRPC call; returns each output's array by name. Texts are str or bytes."""
        inputs = []
        for name, texts in (("query", query), ("documents", documents)):
            if texts is not None:
                inputs.append(bytes_input(name, texts))
        requested = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        result = self.client.infer(
            model or self.model, inputs, outputs=requested, parameters=parameters, client_timeout=timeout
        )
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def embed_query(self, text, **parameters):
        return self.infer(query=[text], parameters=parameters)["embeddings"]

    def embed_documents(self, texts, **parameters):
        return self.infer(documents=texts, parameters=parameters)["embeddings"]

    def metrics_once(self, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """`metrics_now` as soon as `holds` is true of it; AssertionError after DEADLINE_SECONDS."""
        return eventually(lambda: metrics if holds(metrics := self.metrics_now()) else None)

    def metrics_now(self, model: str | None = None) -> dict[str, float]:
        """A model's series, see `metrics_of`; what was just counted comes a moment later."""
        return metrics_of(self.metrics, model or self.model)

    def post(self, body: Mapping) -> tuple[int, dict]:
        """One HTTP inference request; returns status and parsed answer."""
        request = urllib.request.Request(
            f"http://localhost:{self.http}/v2/models/{self.model}/infer", json.dumps(body).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def metrics_of(metrics_port: int, model: str = MODEL_NAME) -> dict[str, float]:
    """A model's series on a server's metrics port, by name and labels; the label that names the model is left out."""
    with urllib.request.urlopen(f"http://localhost:{metrics_port}/metrics", timeout=DEADLINE_SECONDS) as response:
        lines = [line for line in response.read().decode().splitlines() if f'model="{model}"' in line]
    unnamed = (re.sub(f'model="{re.escape(model)}",|,?model="{re.escape(model)}"', "", line) for line in lines)
    return {name.removesuffix("{}"): float(value) for name, _, value in (line.rpartition(" ") for line in unnamed)}


def eventually(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """What `condition` returns, once that is true; AssertionError if it takes longer."""
    deadline, pause_seconds = time.monotonic() + seconds, 0.001
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s"
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 0.05)
    return found


def checkout(folder: Path, *more: str) -> Path:
    """A copy of this repository as far as serve.sh needs it, and of more of its parts; returns `folder`."""
    for part in ("tools", "model_repository/nv-embed-v2", *more):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "serve.sh", folder)
    return folder


def mark_those_with_servers(items: Iterable[pytest.Function], *starters: str) -> None:
    """Give the marker `server` to each test with a fixture that starts one by its name, or a starter in its body."""
    for item in items:
        if any("server" in name or name == "start" for name in item.fixturenames) or {*starters} & {
            *item.function.__code__.co_names
        }:
            item.add_marker("server")


def bytes_input(name: str, texts) -> triton.InferInput:
    array = np.array([text.encode() if isinstance(text, str) else text for text in texts], dtype=np.object_)
    if name == "documents":
        array = array.reshape(1, -1)
    tensor = triton.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor
