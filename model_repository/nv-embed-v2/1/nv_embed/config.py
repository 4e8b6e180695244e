"""What the checkpoint says of its network, as one frozen dataclass; knows neither torch nor Triton."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nv_embed.errors import CheckpointError

# The published model was trained with these; another value means another model, so it is refused, not guessed at.
_REQUIRED = {
    ("model_type",): "nvembed",
    ("is_mask_instruction",): True,
    ("add_eos",): True,
    ("padding_side",): "right",
    ("mask_type",): "b",
    ("text_config", "hidden_act"): "silu",
}
_LATENT_DEFAULTS = {  # the published config.json leaves these out; they are the original's own defaults
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "output_normalize": True,
}


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What `config.json` says of the network. `text_config.sliding_window` is ignored, as by the original."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    num_latents: int
    num_cross_heads: int
    cross_head_dim: int
    dtype: str  # of the weights on disk, a torch dtype's name

    @classmethod
    def load(cls, folder: Path) -> CheckpointConfig:
        """Read `<folder>/config.json`.

        Raises:
            CheckpointError: the folder or the file is missing, malformed, or describes another model.
        """
        if not folder.is_dir():
            raise CheckpointError(
                f"model_path: expected the folder of an NV-Embed-v2 checkpoint; got {str(folder)!r}, which is "
                f"{'no folder' if folder.exists() else 'missing'}; download the checkpoint there or correct model_path"
            )
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; model_path must hold the whole published checkpoint")
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except ValueError as error:
            raise CheckpointError(
                f"{path}: expected JSON; got a file that ends early or is damaged ({error})"
            ) from None

    @classmethod
    def from_json(cls, raw: Any) -> CheckpointConfig:
        """Read the parsed `config.json`; raises CheckpointError naming the key, the value and what is supported."""
        for keys, required in _REQUIRED.items():
            if (found := _get(raw, keys)) != required:
                raise CheckpointError(f"{'.'.join(keys)}: only {required!r} is supported; got {found!r}")
        latent = _LATENT_DEFAULTS | (raw.get("latent_attention_config") or {})
        hidden_size = _number(raw, "hidden_size")
        num_heads = _number(raw, "num_attention_heads")
        for name, required in (
            ("hidden_dim", hidden_size),
            ("latent_dim", hidden_size),
            ("output_normalize", True),
        ):
            if latent[name] != required:
                raise CheckpointError(
                    f"latent_attention_config.{name}: only {required!r} is supported here; got {latent[name]!r}"
                )
        if (scaling := raw["text_config"].get("rope_scaling")) is not None:
            raise CheckpointError(f"text_config.rope_scaling: only null is supported; got {scaling!r}")
        if raw.get("torch_dtype") not in ("float16", "bfloat16", "float32"):
            raise CheckpointError(
                f"torch_dtype: only 'float16', 'bfloat16' or 'float32' is supported; got {raw.get('torch_dtype')!r}"
            )
        config = cls(
            vocab_size=_number(raw, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_number(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_number(raw, "num_key_value_heads"),
            head_dim=raw["text_config"].get("head_dim") or hidden_size // num_heads,
            intermediate_size=_number(raw, "intermediate_size"),
            rms_norm_eps=_number(raw, "rms_norm_eps", float),
            rope_theta=_number(raw, "rope_theta", float),
            num_latents=latent["num_latents_value"],
            num_cross_heads=latent["num_cross_heads"],
            cross_head_dim=latent["cross_dim_head"],
            dtype=raw["torch_dtype"],
        )
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise CheckpointError(
                "text_config: num_attention_heads must be a multiple of num_key_value_heads and the head dimension "
                f"even; got {config.num_heads}, {config.num_kv_heads} and {config.head_dim}"
            )
        return config


def _get(raw: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def _number(raw: Any, name: str, kind: type[int] | type[float] = int) -> Any:
    value = _get(raw, ("text_config", name))
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise CheckpointError(f"text_config.{name}: expected a positive number; got {value!r}")
    return kind(value)
