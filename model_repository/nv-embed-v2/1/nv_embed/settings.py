"""What the operator sets; knows neither torch nor Triton.

Each setting is declared once, as a field of `Settings`. `tools/write_settings.py` writes that declaration into
`config.pbtxt` and into the table of docs/settings.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nv_embed.errors import ConfigError

ENVIRONMENT_PREFIX = "NV_EMBED_"
# The model that the other variables concern; nv-embed-v2 if this one is not set.
MODEL_VARIABLE = ENVIRONMENT_PREFIX + "MODEL_NAME"
# Kubernetes adds such variables to every pod beside a Service whose name begins with nv-embed.
_KUBERNETES_VARIABLE = re.compile(r"NV_EMBED_(.*_)?(SERVICE_HOST|SERVICE_PORT|PORT)(_.*)?")
# Triton's Python backend reads these from the same place. It writes them in capitals.
_TRITON_PARAMETERS = {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"}

Parser = Callable[[str], Any]  # raises ValueError that says what was expected


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("a value that is not empty")
    return value.strip()


def _prompt(value: str) -> str:
    # Triton's Python reads its environment as ASCII, and keeps other bytes as surrogates.
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError("text in UTF-8") from None


def _devices(value: str) -> tuple[str, ...]:
    devices = tuple(part.strip() for part in value.split(","))
    if not all(re.fullmatch(r"cpu|cuda:\d+", device) for device in devices):
        raise ValueError("'cpu', 'cuda:N' or several of them, separated by commas")
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ValueError("each 'cuda:N' once")
    return devices


def _one_of(*choices: str) -> Parser:
    def parse(value: str) -> str:
        if value not in choices:
            *others, last = map(repr, choices)
            raise ValueError(f"{', '.join(others)} or {last}")
        return value

    return parse


def _whole_number(at_least: int) -> Parser:
    def parse(value: str) -> int:
        if not re.fullmatch(r"\d{1,18}", value) or int(value) < at_least:
            raise ValueError(f"a whole number of at least {at_least}")
        return int(value)

    return parse


def _auto_or(parse_other: Parser) -> Parser:
    def parse(value: str) -> Any:
        try:
            return None if value == "auto" else parse_other(value)
        except ValueError as error:
            raise ValueError(f"'auto' or {error}") from None

    return parse


def variables_of(model_name: str, environ: Mapping[str, str], models: Collection[str]) -> dict[str, str]:
    """The environment as far as it concerns a model: all of it one model, nothing of it the others beside that one.

    Args:
        model_name: of the one model.
        environ: of the server.
        models: names of all that the server has.

    Raises:
        ConfigError: the variable that names a model names none of them.
    """
    if (named := environ.get(MODEL_VARIABLE, model_name)) not in models:
        raise ConfigError(
            f"{MODEL_VARIABLE}: expected the name of a model in the repository ({', '.join(sorted(models))}); got "
            f"{named!r}; correct it or unset it"
        )
    if model_name != environ.get(MODEL_VARIABLE, "nv-embed-v2"):
        return {}
    return {name: value for name, value in environ.items() if name != MODEL_VARIABLE}


_positive = _whole_number(at_least=1)


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of one setting. Its name is that of its field."""

    default: str  # as an operator would write it
    parse: Parser
    meaning: str  # whole sentences in Markdown
    unit: str  # empty for what is not a number


def _setting(default: str, parse: Parser, meaning: str, *, unit: str = "") -> Any:
    declaration = Setting(default, parse, " ".join(meaning.split()), unit)
    return field(default=parse(default), metadata={"declaration": declaration})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator sets, parsed. Default, unit and meaning of each are in its declaration."""

    model_path: str = _setting(
        "/models/NV-Embed-v2",
        _text,
        "Folder of the checkpoint, with all its files as they were published.",
    )
    device: tuple[str, ...] = _setting(
        "cuda:0",
        _devices,
        """Where the model runs: `cpu`, `cuda:N`, or several separated by commas, which share the work. A CPU that is
        named alone computes one batch on each core, up to 8, if the network is narrow (`hidden_size` below 1024).
        Otherwise all cores share one batch. `cpu,cpu` computes two batches. If `max_batch_tokens` is `auto`, the
        slowest device sets it for all.""",
    )
    dtype: str = _setting(
        "auto",
        _one_of("auto", "float16", "bfloat16", "float32", "float8", "int8"),
        """Precision: `float16`, `bfloat16`, `float32`, `int8` or `float8`. `auto` is the checkpoint's own precision on
        a GPU. On a CPU it is bfloat16 if that proves fast and close enough at startup, else float32. `int8`
        stores the matrices of the layers in 8 bits, which needs half the memory of half precision. `float8` also
        multiplies in 8 bits. It needs a GPU of compute capability 8.9 or later; on a CPU it is only for trials. At
        startup, `int8` and `float8` compare their vectors with those before rounding.""",
    )
    attention: str = _setting(
        "auto",
        _one_of("auto", "varlen", "flash-attn", "sdpa"),
        """Attention kernel: `varlen` (torch's flash attention), `flash-attn` (the package of that name) or `sdpa` (one
        text after another). `auto` is `varlen` in half precision on a GPU that has it. On a CPU it is `sdpa`, but texts
        of up to 64 tokens are computed together. Elsewhere it is `sdpa`.""",
    )
    compile: str = _setting(
        "auto",
        _one_of("auto", "on", "off"),
        """Whether torch compiles the layers: `on`, `off` or `auto`. `auto` compiles them on a GPU, if that works
        there.""",
    )
    query_prompt: str | None = _setting(  # None: the checkpoint's own
        "auto",
        _auto_or(_prompt),
        """Stands before each query whose request names no `instruction`. `auto` is the model's own; for NV-Embed-v2 it
        is the instruction of its query template. Some models name theirs on their card only. A space at the end
        counts.""",
    )
    document_prompt: str | None = _setting(  # None: the checkpoint's own
        "auto",
        _auto_or(_prompt),
        "The same for each document. NV-Embed-v2 has none.",
    )
    max_sequence_tokens: int | None = _setting(  # None: the checkpoint's own
        "auto",
        _auto_or(_positive),
        """Longest text, with its instruction. A longer text is cut, or refused if the request says so. `auto` is as
        long as the model was made for, which is also the most: 32768 for NV-Embed-v2.""",
        unit="tokens",
    )
    max_batch_tokens: int | None = _setting(  # None: measured at startup
        "auto",
        _auto_or(_positive),
        """Tokens computed at once. `auto` is as many as the device computes in `target_batch_milliseconds`: at least
        512, at most 65536. It is measured at startup and lowered while batches take longer. A single longer text is
        computed alone.""",
        unit="tokens",
    )
    target_batch_milliseconds: int = _setting(
        "200",
        _positive,
        """How long a full batch should take if `max_batch_tokens` is `auto`. A higher value brings more throughput and
        longer waits.""",
        unit="ms",
    )
    max_request_documents: int = _setting("16384", _positive, "Documents in one request.", unit="documents")
    max_request_bytes: int = _setting(
        str(64 * 2**20),
        _positive,
        "Text in one request, as UTF-8 (64 MiB). The instruction counts once for each text.",
        unit="bytes",
    )
    max_queue_bytes: int = _setting(
        str(256 * 2**20),
        _positive,
        """Text of all requests that wait to be tokenized (256 MiB). A request beyond it gets UNAVAILABLE. Queries may
        exceed this limit and the next two by an eighth, so that bulk does not shut them out.""",
        unit="bytes",
    )
    max_queue_tokens: int = _setting(
        "4000000",
        _positive,
        """Tokens of all requests that wait to be computed. A request beyond it gets UNAVAILABLE. A single request that
        has more than this gets INVALID_ARGUMENT.""",
        unit="tokens",
    )
    max_queue_texts: int = _setting(
        "131072",
        _positive,
        """Texts of all requests that are not answered yet. A request beyond it gets UNAVAILABLE. This bounds the memory
        of their vectors: each takes 16 KiB with 4096 dimensions.""",
        unit="texts",
    )
    max_queue_milliseconds: int = _setting(
        "60000",
        _positive,
        "How long a request may wait for its first batch. After that it gets UNAVAILABLE.",
        unit="ms",
    )
    query_weight: int = _setting(
        "8",
        _positive,
        """Share of the device that all queries together get while documents wait. Each request of documents has a
        share of 1.""",
        unit="shares",
    )
    cache_mebibytes: int = _setting(
        "256",
        _whole_number(at_least=0),
        "Memory for vectors of texts that were computed before. 0 turns the cache off.",
        unit="MiB",
    )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
        """Read the parameters of `config.pbtxt`; `NV_EMBED_<PARAMETER>` in the environment wins over each.

        A setting that is in neither has its default.

        Raises:
            ConfigError: a parameter is unknown, malformed or contradicts another.
        """
        variables = {name: ENVIRONMENT_PREFIX + name.upper() for name in DECLARED}
        for name in parameters:
            if name not in variables and name not in _TRITON_PARAMETERS:
                raise ConfigError(
                    f"config.pbtxt: expected the name of a parameter; got {name!r}; correct it or remove it; known: "
                    f"{', '.join(variables)}"
                )
        for variable in environ:
            is_ours = variable.startswith(ENVIRONMENT_PREFIX) and not _KUBERNETES_VARIABLE.fullmatch(variable)
            if is_ours and variable not in variables.values():
                raise ConfigError(
                    f"environment: expected the name of a setting; got {variable}; correct it or unset it; known: "
                    f"{', '.join(variables.values())}"
                )
        values: dict[str, Any] = {}
        for name, variable in variables.items():
            source = variable if variable in environ else f"parameter {name!r} in config.pbtxt"
            value = environ.get(variable, parameters.get(name))
            if value is None:
                continue
            try:
                values[name] = DECLARED[name].parse(value)
            except ValueError as error:
                raise ConfigError(f"{source}: expected {error}; got {value!r}; correct it") from None
        settings = cls(**values)
        settings._check_consistent()
        return settings

    def for_longest_text(self, longest: int | None) -> Settings:
        """The same with `max_sequence_tokens` known. `longest`: tokens for which the model was made; None: any number.

        Raises:
            ConfigError: it was set to more than that, or contradicts another setting.
        """
        asked = self.max_sequence_tokens
        if longest is not None and asked is not None and asked > longest:
            raise ConfigError(
                f"max_sequence_tokens: expected at most {longest}, as long as the model was made for; got {asked}; "
                "lower it, or set it to 'auto'"
            )
        settings = replace(self, max_sequence_tokens=asked or longest or self.max_queue_tokens)
        settings._check_consistent()
        return settings

    def _check_consistent(self) -> None:
        # What one limit admits must also pass the next. Otherwise a client would try it again for ever.
        for smaller, larger in (
            ("max_request_bytes", "max_queue_bytes"),
            ("max_sequence_tokens", "max_queue_tokens"),
            ("max_request_documents", "max_queue_texts"),
        ):
            if (getattr(self, smaller) or 0) > getattr(self, larger):
                raise ConfigError(
                    f"expected {smaller} to be at most {larger}, because all of a request must be able to wait; got "
                    f"{smaller} {getattr(self, smaller)} and {larger} {getattr(self, larger)}; lower {smaller} or "
                    f"raise {larger}"
                )


DECLARED: Mapping[str, Setting] = {each.name: each.metadata["declaration"] for each in fields(Settings)}
