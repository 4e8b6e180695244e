"""The operator's configuration: what starts, and what prevents startup with which message."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from nv_embed.errors import ConfigError
from nv_embed.settings import ServingConfig

CONFIG_PBTXT = Path(__file__).parents[1] / "model_repository" / "nv-embed-v2" / "config.pbtxt"
PARAMETERS = dict(
    re.findall(r'parameters { key: "(\w+)" value { string_value: "([^"]*)" } }', CONFIG_PBTXT.read_text("utf-8"))
)


def test_config_pbtxt_holds_every_parameter_with_its_documented_default():
    assert ServingConfig.from_parameters(PARAMETERS, {}) == ServingConfig(
        model_path="/models/NV-Embed-v2", device=("cuda:0",), dtype="auto", attention="auto", compile="auto",
        max_sequence_tokens=32768, max_batch_tokens=None, target_batch_milliseconds=200,
        max_request_documents=16384, max_request_bytes=64 * 2**20, max_queue_bytes=256 * 2**20,
        max_queue_tokens=4_000_000, max_queue_texts=131_072, max_queue_milliseconds=60_000, query_weight=8,
        cache_mebibytes=256,
    )  # fmt: skip


def test_every_parameter_has_a_comment_on_the_line_above():
    lines = CONFIG_PBTXT.read_text("utf-8").splitlines()
    for above, line in pairwise(lines):
        assert not line.startswith("parameters") or above.startswith("# "), line


def test_the_environment_wins_over_config_pbtxt():
    config = ServingConfig.from_parameters(
        PARAMETERS, {"NV_EMBED_DEVICE": "cpu, cuda:1", "NV_EMBED_MAX_BATCH_TOKENS": "77", "PATH": "/bin"}
    )
    assert config.device == ("cpu", "cuda:1")
    assert config.max_batch_tokens == 77


@pytest.mark.parametrize("name", ["V2_SERVICE_HOST", "SERVICE_PORT_GRPC", "V2_PORT_8001_TCP_ADDR", "PORT"])
def test_what_kubernetes_adds_beside_a_service_of_this_name_is_left_alone(name):
    ServingConfig.from_parameters(PARAMETERS, {f"NV_EMBED_{name}": "10.0.0.1"})


def test_triton_s_own_parameters_are_left_alone():
    ServingConfig.from_parameters(PARAMETERS | {"EXECUTION_ENV_PATH": "/env.tar.gz"}, {})


@pytest.mark.parametrize(
    ("parameters", "environ", "words"),
    [
        ({"max_batch_size": "1"}, {}, ["unknown parameter 'max_batch_size'", "known: model_path"]),
        ({}, {"NV_EMBED_DEVCE": "cpu"}, ["unknown environment variable NV_EMBED_DEVCE", "NV_EMBED_DEVICE"]),
        ({"device": "gpu"}, {}, ["'device'", "'gpu'", "cuda:N"]),
        ({}, {"NV_EMBED_DEVICE": "cuda"}, ["NV_EMBED_DEVICE", "'cuda'", "cuda:N"]),
        ({"device": "cuda:0,cuda:1,cuda:0"}, {}, ["'device'", "each 'cuda:N' once"]),
        ({"dtype": "fp16"}, {}, ["'dtype'", "'fp16'", "float16"]),
        ({"max_sequence_tokens": "0"}, {}, ["'max_sequence_tokens'", "'0'", "at least 1"]),
        ({"max_batch_tokens": "many"}, {}, ["'max_batch_tokens'", "'many'", "'auto' or a whole number"]),
        ({"model_path": " "}, {}, ["'model_path'", "non-empty"]),
        ({"max_queue_bytes": "10"}, {}, ["max_request_bytes (67108864)", "max_queue_bytes (10)", "raise"]),
        ({"max_queue_texts": "10"}, {}, ["max_request_documents (16384)", "max_queue_texts (10)", "raise"]),
        ({"max_queue_tokens": "10"}, {}, ["max_sequence_tokens (32768)", "max_queue_tokens (10)", "raise"]),
    ],
)
def test_a_bad_parameter_stops_the_start_and_is_named(parameters, environ, words):
    with pytest.raises(ConfigError) as caught:
        ServingConfig.from_parameters(PARAMETERS | parameters, environ)
    for word in words:
        assert word in str(caught.value)


def test_a_parameter_missing_from_config_pbtxt_is_named():
    with pytest.raises(ConfigError, match=r"'dtype' in config\.pbtxt is missing"):
        ServingConfig.from_parameters({k: v for k, v in PARAMETERS.items() if k != "dtype"}, {})
