"""What the operator sets: where it is declared, what starts, and what prevents startup with which message."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from nv_embed.errors import ConfigError
from nv_embed.settings import DECLARED, Settings, variables_of

ROOT = Path(__file__).parents[1]
CONFIG_PBTXT = Path("model_repository", "nv-embed-v2", "config.pbtxt")
PARAMETERS = dict(
    re.findall(
        r'parameters { key: "(\w+)" value { string_value: "([^"]*)" } }', (ROOT / CONFIG_PBTXT).read_text("utf-8")
    )
)


def test_the_files_that_repeat_the_declarations_are_what_the_tool_writes(tmp_path):
    pages = (CONFIG_PBTXT, Path("docs", "settings.md"), Path("deploy", "helm", "nv-embed", "values.schema.json"))
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        stale = (ROOT / page).read_text("utf-8").replace("4000000", "5000000").replace("Documents in one request.", "")
        (tmp_path / page).write_text(stale, "utf-8")
    subprocess.run([sys.executable, ROOT / "tools" / "write_settings.py", tmp_path], check=True)
    for page in pages:
        assert (tmp_path / page).read_text("utf-8") == (ROOT / page).read_text("utf-8"), page


def test_config_pbtxt_has_every_parameter_with_its_declared_default():
    assert {name: setting.default for name, setting in DECLARED.items()} == PARAMETERS
    assert Settings.from_parameters(PARAMETERS, {}) == Settings()


def test_the_defaults_are_what_they_were():
    assert Settings() == Settings(
        model_path="/models/NV-Embed-v2", device=("cuda:0",), dtype="auto", attention="auto", compile="auto",
        query_prompt=None, document_prompt=None, max_sequence_tokens=None, max_batch_tokens=None,
        target_batch_milliseconds=200,
        max_request_documents=16384, max_request_bytes=64 * 2**20, max_queue_bytes=256 * 2**20,
        max_queue_tokens=4_000_000, max_queue_texts=131_072, max_queue_milliseconds=60_000, query_weight=8,
        cache_mebibytes=256,
    )  # fmt: skip


def test_variables_concern_nv_embed_v2_or_the_model_that_one_of_them_names():
    environ = {"NV_EMBED_DEVICE": "cpu", "HOME": "/"}
    models = ["nv-embed-v2", "other"]
    assert variables_of("nv-embed-v2", environ, models) == environ
    assert variables_of("other", environ, models) == {}
    named = environ | {"NV_EMBED_MODEL_NAME": "other"}
    assert variables_of("other", named, models) == environ
    assert variables_of("nv-embed-v2", named, models) == {}
    for model in models:
        with pytest.raises(
            ConfigError, match=r"NV_EMBED_MODEL_NAME: expected .* \(nv-embed-v2, other\); got 'othr'; correct"
        ):
            variables_of(model, named | {"NV_EMBED_MODEL_NAME": "othr"}, models)


def test_every_meaning_is_a_sentence_and_every_number_has_its_unit():
    for name, setting in DECLARED.items():
        assert setting.meaning.endswith("."), name
        assert bool(setting.unit) == (setting.default.isdigit() or name.endswith("_tokens")), name


@pytest.mark.parametrize("name", DECLARED)
def test_each_parameter_can_be_set_by_the_variable_of_its_name(name):
    values = {"model_path": "/elsewhere", "device": "cpu", "dtype": "int8", "attention": "sdpa", "compile": "off"}
    value = values.get(name, "40000")
    settings = Settings.from_parameters({}, {f"NV_EMBED_{name.upper()}": value, "NV_EMBED_MAX_REQUEST_BYTES": "40000"})
    assert getattr(settings, name) == DECLARED[name].parse(value) != getattr(Settings(), name)


def test_the_environment_wins_over_config_pbtxt():
    config = Settings.from_parameters(
        PARAMETERS, {"NV_EMBED_DEVICE": "cpu, cuda:1", "NV_EMBED_MAX_BATCH_TOKENS": "77", "PATH": "/bin"}
    )
    assert config.device == ("cpu", "cuda:1")
    assert config.max_batch_tokens == 77


@pytest.mark.parametrize("name", ["V2_SERVICE_HOST", "SERVICE_PORT_GRPC", "V2_PORT_8001_TCP_ADDR", "PORT"])
def test_what_kubernetes_adds_beside_a_service_of_this_name_is_left_alone(name):
    Settings.from_parameters(PARAMETERS, {f"NV_EMBED_{name}": "10.0.0.1"})


def test_triton_s_own_parameters_are_left_alone():
    Settings.from_parameters(PARAMETERS | {"EXECUTION_ENV_PATH": "/env.tar.gz"}, {})


@pytest.mark.parametrize(
    ("parameters", "environ", "words"),
    [
        (
            {"max_batch_size": "1"},
            {},
            ["expected the name of a parameter", "got 'max_batch_size'", "correct it", "known: model_path, "],
        ),
        ({}, {"NV_EMBED_DEVCE": "cpu"}, ["expected the name of a setting", "NV_EMBED_DEVICE", "got NV_EMBED_DEVCE"]),
        ({"device": "gpu"}, {}, ["'device'", "'gpu'", "cuda:N"]),
        ({}, {"NV_EMBED_DEVICE": "cuda"}, ["NV_EMBED_DEVICE", "'cuda'", "cuda:N"]),
        ({"device": "cuda:0,cuda:1,cuda:0"}, {}, ["'device'", "each 'cuda:N' once"]),
        ({"dtype": "fp16"}, {}, ["'dtype'", "'fp16'", "float16"]),
        ({"max_sequence_tokens": "0"}, {}, ["'max_sequence_tokens'", "'0'", "at least 1"]),
        ({"max_batch_tokens": "many"}, {}, ["'max_batch_tokens'", "'many'", "'auto' or a whole number"]),
        ({"model_path": " "}, {}, ["'model_path'", "not empty"]),
        ({"max_queue_bytes": "10"}, {}, ["max_request_bytes 67108864", "max_queue_bytes 10", "raise"]),
        ({"max_queue_texts": "10"}, {}, ["max_request_documents 16384", "max_queue_texts 10", "raise"]),
        (
            {"max_sequence_tokens": "99", "max_queue_tokens": "10"},
            {},
            ["max_sequence_tokens 99", "max_queue_tokens 10", "raise"],
        ),
    ],
)
def test_a_bad_parameter_stops_the_start_and_is_named(parameters, environ, words):
    with pytest.raises(ConfigError) as caught:
        Settings.from_parameters(PARAMETERS | parameters, environ)
    for word in words:
        assert word in str(caught.value)


def test_the_longest_text_is_the_model_s_own_unless_a_lower_one_is_set():
    assert Settings().for_longest_text(512).max_sequence_tokens == 512
    assert Settings(max_sequence_tokens=100).for_longest_text(512).max_sequence_tokens == 100
    assert Settings(max_sequence_tokens=100).for_longest_text(None).max_sequence_tokens == 100
    assert Settings(max_queue_tokens=999).for_longest_text(None).max_sequence_tokens == 999
    with pytest.raises(ConfigError, match=r"expected at most 512, as long as .*; got 513; lower it"):
        Settings(max_sequence_tokens=513).for_longest_text(512)
    with pytest.raises(ConfigError, match="max_sequence_tokens 512 and max_queue_tokens 10"):
        Settings(max_queue_tokens=10).for_longest_text(512)


def test_a_prompt_is_taken_as_it_is():
    assert Settings.from_parameters({"query_prompt": "query: ", "document_prompt": ""}, {}) == Settings(
        query_prompt="query: ", document_prompt=""
    )


def test_a_parameter_that_is_set_nowhere_has_its_default():
    assert Settings.from_parameters({"dtype": "int8"}, {}) == Settings(dtype="int8")


def test_a_prompt_may_be_in_any_language_although_triton_s_python_reads_its_environment_as_ascii():
    as_ascii = "为: ".encode().decode("ascii", "surrogateescape")
    for value in ("为: ", as_ascii):
        assert Settings.from_parameters({}, {"NV_EMBED_QUERY_PROMPT": value}).query_prompt == "为: "
    latin = "né: ".encode("latin-1").decode("ascii", "surrogateescape")
    with pytest.raises(ConfigError, match="NV_EMBED_DOCUMENT_PROMPT: expected 'auto' or text in UTF-8; got "):
        Settings.from_parameters({}, {"NV_EMBED_DOCUMENT_PROMPT": latin})
