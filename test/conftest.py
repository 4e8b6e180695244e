"""Paths and servers that several test files share."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from nv_embed.models.config_file import Section
from nv_embed.models.nv_embed import NVEmbedCheckpoint
from serving import ROOT, Server, mark_those_with_servers

PUBLISHED_TEXT_CONFIG = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": 4096,
}


def pytest_configure():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures stop what they started


def pytest_collection_modifyitems(items):
    mark_those_with_servers(items, "Server", "FaultyServer")
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def toy() -> Path:
    """A small random checkpoint in the published format, with the original implementation's outputs."""
    return ROOT / "test" / "data" / "toy"


@pytest.fixture
def published() -> NVEmbedCheckpoint:
    """The published sizes."""
    return NVEmbedCheckpoint.read(
        Section(
            {
                "model_type": "nvembed",
                "is_mask_instruction": True,
                "add_eos": True,
                "padding_side": "right",
                "mask_type": "b",
                "torch_dtype": "float16",
                "latent_attention_config": {"model_type": "latent_attention"},
                "text_config": PUBLISHED_TEXT_CONFIG,
            }
        )
    )


@pytest.fixture(scope="session")
def mini() -> Path:
    """The embedded default checkpoint."""
    return ROOT / "checkpoints" / "nv-embed-mini"


@pytest.fixture(scope="session")
def toy_server(toy, tmp_path_factory):
    """The toy checkpoint, served without a cache, so that each answer is computed."""
    yield from serve(toy, tmp_path_factory, NV_EMBED_CACHE_MEBIBYTES="0")


@pytest.fixture(scope="session")
def toy_server_of_64_tokens(toy, tmp_path_factory):
    """The same with the limit of the fixture's truncated cases, and small limits on requests."""
    yield from serve(
        toy,
        tmp_path_factory,
        NV_EMBED_MAX_SEQUENCE_TOKENS="64",
        NV_EMBED_MAX_REQUEST_DOCUMENTS="20",
        NV_EMBED_MAX_REQUEST_BYTES="8000",
    )


@pytest.fixture(scope="session")
def mini_server(tmp_path_factory):
    """What `./serve.sh` serves when nothing is given."""
    yield from serve(None, tmp_path_factory)


@pytest.fixture(scope="session")
def gateway_venv() -> Path:
    """The gateway's environment, so that no start has to wait until it is installed."""
    venv = Path(os.environ.get("GATEWAY_VENV") or ROOT / ".venv-gateway")
    script = 'source "$0" && prepare_venv "$@"'
    command = ["bash", "-c", script, ROOT / "tools/prepare_venv.sh", venv, ROOT / "tools/requirements-gateway.txt"]
    subprocess.run(command, check=True, timeout=900)
    return venv


@pytest.fixture
def start():
    """Starts servers; whatever is left of them at the end is stopped."""
    servers = []

    def start(*arguments, **options) -> Server:
        servers.append(Server(*arguments, **options))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def serve(model_path, tmp_path_factory, **environ):
    with Server(tmp_path_factory.mktemp("server") / "log.txt", model_path, environ) as server:
        yield server
        assert server.stop() == 0, server.log_text()
