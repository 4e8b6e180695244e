"""config.json: every form that is published is read, and everything else is refused by name."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nv_embed.errors import CheckpointError
from nv_embed.models import read_checkpoint
from nv_embed.models.config_file import Section
from nv_embed.models.nv_embed import QUERY_INSTRUCTION, NVEmbedCheckpoint
from serving import ROOT

RAW = json.loads((ROOT / "test" / "data" / "toy" / "config.json").read_text("utf-8"))
EXPECTED = NVEmbedCheckpoint.read(Section(RAW))
KEYS = [
    *((key,) for key in ("model_type", "is_mask_instruction", "add_eos", "padding_side", "mask_type", "dtype",
                         "torch_dtype", "text_config", "latent_attention_config")),
    *(("text_config", key) for key in (
        "hidden_act", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
    )),
    *(("text_config", "rope_parameters", key) for key in ("rope_type", "type", "rope_theta", "factor")),
    *(("latent_attention_config", key) for key in (
        "num_latents_value", "num_cross_heads", "cross_dim_head", "hidden_dim", "latent_dim", "output_normalize",
    )),
]  # fmt: skip


def changed(*changes):
    """The toy's config.json with a value for each path of keys; `...` takes the key away."""
    raw = copy.deepcopy(RAW)
    for keys, value in changes:
        place = raw
        for key in keys[:-1]:
            place = place.setdefault(key, {"rope_type": "default", "rope_theta": 10000.0})
        if value is ...:
            place.pop(keys[-1], None)
        else:
            place[keys[-1]] = value
    return raw


def read(*changes):
    return NVEmbedCheckpoint.read(Section(changed(*changes)))


def test_the_standard_instructions_are_the_published_models():
    assert EXPECTED.query_instruction == QUERY_INSTRUCTION
    assert QUERY_INSTRUCTION == "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    assert EXPECTED.document_instruction == ""


def test_the_published_defaults_stand_in_for_absent_latent_attention_keys():
    config = read(
        (["latent_attention_config"], {"model_type": "latent_attention"}), (["text_config", "hidden_size"], 4096)
    )
    assert (config.num_latents, config.num_cross_heads, config.cross_head_dim) == (512, 8, 4096)


TEXT = ["text_config"]
NEW = {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "changes",
    [
        [(["torch_dtype"], ...), (["dtype"], "float32")],
        [(["dtype"], "float32")],
        [([*TEXT, "head_dim"], None)],
        [([*TEXT, "head_dim"], 16)],
        [([*TEXT, "rope_theta"], ...), ([*TEXT, "rope_parameters"], NEW)],
        [([*TEXT, "rope_parameters"], NEW)],
        [([*TEXT, "rope_parameters"], None), ([*TEXT, "rope_scaling"], None)],
        [([*TEXT, "rope_theta"], 10000), ([*TEXT, "sliding_window"], None)],
    ],
)
def test_what_other_versions_of_transformers_write_says_the_same(changes):
    assert RAW["text_config"]["rope_theta"] == 10000.0
    assert read(*changes) == EXPECTED


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["model_type"], "bert", "expected \"nvembed\"; got 'bert'"),
        (["is_mask_instruction"], False, "expected true; got False"),
        (["is_mask_instruction"], 1, "expected true; got 1"),
        (["add_eos"], False, "expected true"),
        (["quantization_config"], {"quant_method": "bitsandbytes"}, "quantization_config: expected null, because only"),
        ([*TEXT, "quantization_config"], {}, "text_config.quantization_config: expected null, because only plain"),
        (["padding_side"], "left", "expected \"right\"; got 'left'"),
        (["mask_type"], "a", "expected \"b\"; got 'a'"),
        (["torch_dtype"], "int8", "expected 'float16', 'bfloat16' or 'float32'; got 'int8'"),
        (["dtype"], "float16", "expected the same as torch_dtype, 'float32'; got 'float16'"),
        ([*TEXT], [], "expected a JSON object; got []"),
        ([*TEXT, "hidden_act"], "gelu", "expected \"silu\"; got 'gelu'"),
        ([*TEXT, "num_hidden_layers"], None, "expected a whole number from 1 to 2147483647; got null"),
        ([*TEXT, "num_hidden_layers"], "3", "got '3'"),
        ([*TEXT, "num_hidden_layers"], True, "got True"),
        ([*TEXT, "num_hidden_layers"], 3.0, "got 3.0"),
        ([*TEXT, "vocab_size"], 10**400, "got 1000"),
        ([*TEXT, "head_dim"], "64", "got '64'"),
        ([*TEXT, "head_dim"], 15, "expected an even number"),
        ([*TEXT, "num_key_value_heads"], 3, "expected a divisor of num_attention_heads, 4; got 3"),
        ([*TEXT, "rms_norm_eps"], 0, "expected a positive number; got 0"),
        ([*TEXT, "rms_norm_eps"], float("nan"), "got nan"),
        ([*TEXT, "rope_theta"], 10**400, "expected a positive number; got 1000"),
        ([*TEXT, "rope_theta"], ..., "expected a positive number, here or in rope_parameters; got null"),
        ([*TEXT, "rope_scaling"], {"type": "linear"}, "expected \"default\"; got 'linear'"),
        ([*TEXT, "rope_parameters"], {"rope_type": "yarn"}, "expected \"default\"; got 'yarn'"),
        ([*TEXT, "rope_parameters"], {"partial_rotary_factor": 0.5}, "expected nothing: positions are rotated"),
        (
            [*TEXT, "rope_parameters"],
            {"rope_theta": 1e6},
            "expected the same as text_config.rope_parameters.rope_theta",
        ),
        (["latent_attention_config"], "x", "expected a JSON object; got 'x'"),
        (["latent_attention_config", "output_normalize"], False, "expected true"),
        (["latent_attention_config", "latent_dim"], 32, "expected hidden_size, 64, which is 4096 unless"),
        (["latent_attention_config", "num_latents_value"], "16", "expected a whole number"),
    ],
)
def test_an_unsupported_value_is_refused_by_name(keys, value, words):
    with pytest.raises(CheckpointError) as caught:
        read((keys, value))
    message = str(caught.value)
    assert keys[-1] in message
    assert words in message
    assert message.endswith("; take config.json as it was published with the weights, or another checkpoint")


ODD = ["64", "float16", "default", "silu", 2**31, 10**400, -1, 0, 64, 64.0]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(ODD)
NAMES = st.sampled_from(["rope_theta", "type"]) | st.text(max_size=5)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)


@given(keys=st.sampled_from(KEYS), value=JSON | st.just(...))
def test_any_value_of_any_key_is_read_or_refused_in_three_parts(keys, value):
    try:
        config = read((list(keys), value))
    except CheckpointError as error:
        message = str(error)
        assert keys[0] in message
        assert ": expected " in message
        assert "; got " in message
        assert len(message) < 400
    else:
        numbers = [value for value in (getattr(config, name) for name in type(config).__dataclass_fields__)
                   if not isinstance(value, str)]  # fmt: skip
        assert all(type(number) in (int, float) and number > 0 for number in numbers)
        assert config.num_heads % config.num_kv_heads == config.head_dim % 2 == 0


def test_a_missing_folder_and_a_damaged_or_foreign_file_are_said(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="missing; download the checkpoint"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_checkpoint(tmp_path)
    for damaged in ('{"model_type": "nve', "[" * (sys.getrecursionlimit() * 100)):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(CheckpointError, match="ends early or is damaged"):
            read_checkpoint(tmp_path)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object; got \[1\]; take"):
        read_checkpoint(tmp_path)
    for kind in ('"bert"', "null", "[1]", "{}"):
        path.write_text(f'{{"model_type": {kind}}}', encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json: model_type: expected 'nvembed', or .*; got .*; take"):
            read_checkpoint(tmp_path)
