"""What the operator says, as one frozen dataclass; knows neither torch nor Triton."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nv_embed.errors import ConfigError

ENVIRONMENT_PREFIX = "NV_EMBED_"
# Kubernetes adds such variables to every pod beside a Service whose name begins with nv-embed.
_KUBERNETES_VARIABLE = re.compile(r"NV_EMBED_(.*_)?(SERVICE_HOST|SERVICE_PORT|PORT)(_.*)?")
# Triton's Python backend reads these from the same place; by its convention they are in capitals.
_TRITON_PARAMETERS = {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"}


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
