"""The checkpoint's configuration: what starts, and what stops the start with which message."""

from __future__ import annotations

import json

import pytest
from nv_embed.config import CheckpointConfig
from nv_embed.errors import CheckpointError


def test_the_published_defaults_stand_in_for_absent_latent_attention_keys(toy):
    raw = json.loads((toy / "config.json").read_text("utf-8"))
    raw["latent_attention_config"] = {"model_type": "latent_attention"}
    raw["text_config"]["hidden_size"] = 4096
    config = CheckpointConfig.from_json(raw)
    assert (config.num_latents, config.num_cross_heads, config.cross_head_dim) == (512, 8, 4096)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["model_type"], "bert"),
        (["is_mask_instruction"], False),
        (["add_eos"], False),
        (["padding_side"], "left"),
        (["mask_type"], "a"),
        (["torch_dtype"], "int8"),
        (["text_config", "hidden_act"], "gelu"),
        (["text_config", "num_hidden_layers"], None),
        (["text_config", "num_hidden_layers"], "3"),
        (["text_config", "num_key_value_heads"], 3),
        (["text_config", "rope_scaling"], {"type": "linear"}),
        (["latent_attention_config", "output_normalize"], False),
        (["latent_attention_config", "latent_dim"], 32),
    ],
)
def test_an_unsupported_checkpoint_value_is_refused_by_name(toy, keys, value):
    raw = json.loads((toy / "config.json").read_text("utf-8"))
    place = raw
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(CheckpointError) as caught:
        CheckpointConfig.from_json(raw)
    assert keys[-1] in str(caught.value)
    assert str(value).strip("'") in str(caught.value)


def test_a_missing_folder_or_config_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="missing; download the checkpoint"):
        CheckpointConfig.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        CheckpointConfig.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nve', encoding="utf-8")
    with pytest.raises(CheckpointError, match="ends early or is damaged"):
        CheckpointConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="model_type"):
        CheckpointConfig.load(tmp_path)
