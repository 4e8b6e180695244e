"""What the checkpoint says and what the operator says, each as one frozen dataclass; knows neither torch nor Triton."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nv_embed.errors import CheckpointError, ConfigError

ENVIRONMENT_PREFIX = "NV_EMBED_"
# Kubernetes adds such variables to every pod beside a Service whose name begins with nv-embed.
_KUBERNETES_VARIABLE = re.compile(r"NV_EMBED_(.*_)?(SERVICE_HOST|SERVICE_PORT|PORT)(_.*)?")
# Triton's Python backend reads these from the same place; by its convention they are in capitals.
_TRITON_PARAMETERS = {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"}


# --- the operator ---------------------------------------------------------------------------------------


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("a non-empty value")
    return value.strip()


def _devices(value: str) -> tuple[str, ...]:
    devices = tuple(part.strip() for part in value.split(","))
    if not all(re.fullmatch(r"cpu|cuda:\d+", device) for device in devices):
        raise ValueError("'cpu', 'cuda:N' or several of them, separated by commas")
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ValueError("each 'cuda:N' once")
    return devices


def _dtype(value: str) -> str:
    if value not in ("auto", "float16", "bfloat16", "float32", "float8", "int8"):
        raise ValueError("'auto', 'float16', 'bfloat16', 'float32', 'float8' or 'int8'")
    return value


def _attention(value: str) -> str:
    if value not in ("auto", "varlen", "flash-attn", "sdpa"):
        raise ValueError("'auto', 'varlen', 'flash-attn' or 'sdpa'")
    return value


def _compile(value: str) -> str:
    if value not in ("auto", "on", "off"):
        raise ValueError("'auto', 'on' or 'off'")
    return value


def _positive(value: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,17}", value):
        raise ValueError("a whole number of at least 1")
    return int(value)


def _not_negative(value: str) -> int:
    if not re.fullmatch(r"\d{1,18}", value):
        raise ValueError("a whole number of at least 0")
    return int(value)


def _positive_or_auto(value: str) -> int | None:
    try:
        return None if value == "auto" else _positive(value)
    except ValueError as error:
        raise ValueError(f"'auto' or {error}") from None


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """What the operator says. Defaults, units and one line on each field are in `config.pbtxt`, and only there."""

    model_path: str
    device: tuple[str, ...]
    dtype: str
    attention: str
    compile: str
    max_sequence_tokens: int
    max_batch_tokens: int | None  # None: measured at warm-up
    target_batch_milliseconds: int
    max_request_documents: int
    max_request_bytes: int
    max_queue_bytes: int
    max_queue_tokens: int
    max_queue_texts: int
    max_queue_milliseconds: int
    query_weight: int
    cache_mebibytes: int

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], environ: Mapping[str, str]) -> ServingConfig:
        """Read `config.pbtxt` parameters; `NV_EMBED_<PARAMETER>` in the environment wins over each.

        Raises:
            ConfigError: a parameter is unknown, missing, malformed or contradicts another.
        """
        names = [field.name for field in fields(cls)]
        variables = {name: ENVIRONMENT_PREFIX + name.upper() for name in names}
        values: dict[str, Any] = {}
        for name in parameters:
            if name not in names and name not in _TRITON_PARAMETERS:
                known = ", ".join(names)
                raise ConfigError(
                    f"unknown parameter {name!r} in config.pbtxt; remove it or correct it; known: {known}"
                )
        for variable in environ:
            ours = variable.startswith(ENVIRONMENT_PREFIX) and not _KUBERNETES_VARIABLE.fullmatch(variable)
            if ours and variable not in variables.values():
                known = ", ".join(variables.values())
                raise ConfigError(f"unknown environment variable {variable}; unset it or correct it; known: {known}")
        for name, variable in variables.items():
            source = variable if variable in environ else f"parameter {name!r} in config.pbtxt"
            value = environ.get(variable, parameters.get(name))
            if value is None:
                raise ConfigError(f"{source} is missing; add it, or set {variable}")
            try:
                values[name] = _PARSERS.get(name, _positive)(value)
            except ValueError as error:
                raise ConfigError(f"{source}: expected {error}; got {value!r}; correct it") from None
        config = cls(**values)
        config._check_consistent()
        return config

    def _check_consistent(self) -> None:
        # What is admitted at one door must be able to pass the next, or a client would retry it for ever.
        for smaller, larger in (
            ("max_request_bytes", "max_queue_bytes"),
            ("max_sequence_tokens", "max_queue_tokens"),
            ("max_request_documents", "max_queue_texts"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                raise ConfigError(
                    f"{smaller} ({getattr(self, smaller)}) is above {larger} ({getattr(self, larger)}), so what the "
                    f"first admits the second could never hold; lower {smaller} or raise {larger}"
                )


_PARSERS: Mapping[str, Callable[[str], Any]] = {  # of every other parameter: _positive
    "model_path": _text,
    "device": _devices,
    "dtype": _dtype,
    "attention": _attention,
    "compile": _compile,
    "max_batch_tokens": _positive_or_auto,
    "cache_mebibytes": _not_negative,
}


# --- the checkpoint -------------------------------------------------------------------------------------

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
