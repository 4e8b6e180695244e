"""A real tritonserver started through `serve.sh`, and ways to ask it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

ROOT = Path(__file__).parents[1]
MODEL_NAME = "nv-embed-v2"
SETTINGS = (  # of serve.sh and the model, but for VENV and GATEWAY_VENV, which every test shares
    "NV_EMBED_", "MODEL_", "DEVICE", "RUNTIME", "ADDRESS", "METRICS_", "IMAGE", "SHM_", "TLS_", "ADMIN_KEY", "RESTART",
    "MAX_DELAY_SECONDS", "GATEWAY_PORT", "GATEWAY_HOST", "GATEWAY_A",
)  # fmt: skip
START_SECONDS = 180
STOP_SECONDS = 60


def free_ports(count: int) -> list[int]:
    """Different ones that nothing listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


class Server:
    """One `serve.sh`, from start to stop."""

    def __init__(
        self,
        log: Path,
        model_path: Path | None,
        environ: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        command: Sequence[str | Path] = (ROOT / "serve.sh",),
    ) -> None:
        """Start, without waiting. Settings of the caller's own shell that would change the server are left out."""
        self.log = log
        self.http, self.grpc, self.metrics = free_ports(3)
        settings = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
        settings |= {"HTTP_PORT": str(self.http), "GRPC_PORT": str(self.grpc), "METRICS_PORT": str(self.metrics)}
        settings |= {"RUNTIME": "pip"}
        if model_path is not None:
            settings |= {"MODEL_PATH": str(model_path), "DEVICE": "cpu"}
        settings |= environ or {}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=settings, cwd=log.parent,
            )  # fmt: skip
        self.url = f"localhost:{self.grpc}"
        self.client = triton.InferenceServerClient(self.url)

    def wait_until_ready(self) -> Server:
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.answers():
                return self
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"the server did not become ready:\n{self.log_text()}")

    def answers(self) -> bool:
        """Whether it says that it is ready."""
        try:
            with urllib.request.urlopen(f"http://localhost:{self.http}/v2/health/ready", timeout=5):
                return True
        except OSError:
            return False

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; returns the exit code."""
        self.client.close()
        self.process.send_signal(with_signal)
        return self.process.wait(STOP_SECONDS)

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def infer(self, query=None, documents=None, parameters=None, outputs=("embeddings", "token_counts"), timeout=120):
        """One gRPC call; returns each output's array by name. Texts are str or bytes."""
        inputs = []
        for name, texts in (("query", query), ("documents", documents)):
            if texts is not None:
                inputs.append(bytes_input(name, texts))
        requested = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        result = self.client.infer(MODEL_NAME, inputs, outputs=requested, parameters=parameters, client_timeout=timeout)
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def embed_query(self, text, **parameters):
        return self.infer(query=[text], parameters=parameters)["embeddings"]

    def embed_documents(self, texts, **parameters):
        return self.infer(documents=texts, parameters=parameters)["embeddings"]

    def metrics_by_name(self) -> dict[str, float]:
        """Each series on the metrics port, labels included in its name, once the last batch is published."""
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://localhost:{self.metrics}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def post(self, body: Mapping) -> tuple[int, dict]:
        """One HTTP inference request; returns status and parsed answer."""
        request = urllib.request.Request(
            f"http://localhost:{self.http}/v2/models/{MODEL_NAME}/infer", json.dumps(body).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def bytes_input(name: str, texts) -> triton.InferInput:
    array = np.array([text.encode() if isinstance(text, str) else text for text in texts], dtype=np.object_)
    if name == "documents":
        array = array.reshape(1, -1)
    tensor = triton.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor
