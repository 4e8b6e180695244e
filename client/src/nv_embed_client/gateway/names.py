"""The names that `model` may have, and what each says about the texts that come with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nv_embed_client.connection import DEFAULT_MODEL_NAME
from nv_embed_client.errors import InvalidInput
from nv_embed_client.gateway.refusals import Refusal
from nv_embed_client.instructions import TASK_INSTRUCTIONS, checked_instruction
from nv_embed_client.wire import InputType

_PUBLISHED_NAME = "nvidia/NV-Embed-v2"
_INSTRUCTION_START = "Instruct:"


@dataclass(frozen=True, slots=True)
class Meaning:
    """How texts are to be embedded; None leaves a question open."""

    input_type: InputType | None = None
    instruction: str | None = None


# By the names that sentence-transformers gives to prompts, and by MTEB's names of the tasks.
PROMPTS = {
    "query": Meaning("query"),
    "document": Meaning("passage"),
    "passage": Meaning("passage"),
    **{task: Meaning("query", instruction) for task, instruction in TASK_INSTRUCTIONS.items()},
}


@dataclass(frozen=True, slots=True)
class Named:
    """What a name stands for."""

    model: str  # as Triton knows it
    meaning: Meaning = Meaning()


def names_of(model_names: Sequence[str], aliases: Sequence[str]) -> dict[str, Named]:
    """All names, in the order in which they are listed.

    Args:
        model_names: as Triton knows the models.
        aliases: `NAME`, `NAME=KNOWN`, `NAME=Instruct: ...` or `NAME=MODEL=Instruct: ...`, where a backslash and an n
            stand for a newline. The first and the third are for a single model.

    Raises:
        InvalidInput: there is no model, two names are the same, or an alias makes no sense.
    """
    if not model_names:
        raise InvalidInput.of(expected="at least one model name", got="none", remedy="give --model-name")
    names: dict[str, Named] = {}
    for model in model_names:
        own = {model: Meaning(), f"{model}-query": Meaning("query"), f"{model}-passage": Meaning("passage")}
        if model == DEFAULT_MODEL_NAME:
            own[_PUBLISHED_NAME] = Meaning()
        if taken := names.keys() & own.keys():
            raise InvalidInput.of(
                expected="models whose names, also with -query or -passage behind them, differ",
                got=f"{', '.join(map(ascii, sorted(taken)))} twice",
                remedy="give each --model-name once, or name the model's folder on the server otherwise",
            )
        names |= {name: Named(model, meaning) for name, meaning in own.items()}
    for alias in aliases:
        name, separator, value = alias.partition("=")
        if not name.strip("/") or not name.isprintable() or name != name.strip("/ "):
            raise InvalidInput.of(
                expected="--alias NAME or --alias NAME=VALUE with a name of printable characters",
                got=ascii(alias)[:80],
                remedy="give it a name, without a space or a slash at either end",
            )
        if name in names:
            raise InvalidInput.of(
                expected="an alias that no model has yet", got=ascii(name)[:80], remedy="choose another name"
            )
        names[name] = _named(value if separator else None, names, model_names)
    return names


def _named(value: str | None, names: dict[str, Named], model_names: Sequence[str]) -> Named:
    """What an alias stands for; `value`: all behind its name and the first "=", None without that."""
    if value in names:
        return names[value]
    model, separator, instruction = (value or "").partition("=")
    if not separator or model not in model_names:
        if len(model_names) > 1 and (value is None or value.startswith(_INSTRUCTION_START)):
            raise InvalidInput.of(
                expected="an alias that says which of several models it means",
                got="none" if value is None else ascii(value)[:80],
                remedy=f"write NAME=MODEL or 'NAME=MODEL={_INSTRUCTION_START} ...', MODEL being one of "
                f"{', '.join(model_names)}",
            )
        if value is None:
            return Named(model_names[0])
        model, instruction = model_names[0], value
    instruction = instruction.replace("\\n", "\n")
    try:
        checked_instruction(instruction)
        is_sendable = instruction.startswith(_INSTRUCTION_START)
    except InvalidInput:
        is_sendable = False
    if not is_sendable:
        raise InvalidInput.of(
            expected=f"a known model, or an instruction that begins with {_INSTRUCTION_START!r}, without NUL and in "
            "UTF-8, as an alias's value",
            got=ascii(value)[:80],
            remedy=f"take one of {', '.join(names)}, or write 'Instruct: ...\\nQuery: '",
        )
    return Named(model, Meaning("query", instruction))


def decided(
    model: tuple[str, Meaning], input_type: InputType | None, instruction: str | None, prompt_name: str | None
) -> Meaning:
    """What the parts of a request say together; without any of them a text is a passage.

    Args:
        model: the name that the request gives, and its meaning.
        prompt_name: a key of `PROMPTS`.

    Raises:
        Refusal: two parts contradict each other.
    """
    if instruction is not None and prompt_name is not None:
        raise Refusal(
            400,
            "expected an instruction or a prompt_name; got both; leave one of them out",
            param="prompt_name",
            code="contradiction",
        )
    merged, spoken = Meaning(), ""
    for param, value, meaning in (
        ("model", model[0], model[1]),
        ("input_type", input_type, Meaning(input_type)),
        ("prompt_name", prompt_name, PROMPTS[prompt_name] if prompt_name is not None else Meaning()),
        ("instruction", instruction, Meaning("query" if instruction is not None else None, instruction)),
    ):
        if meaning == Meaning():
            continue
        said = f"{param} {ascii(value)[:80]}"
        if merged.input_type != meaning.input_type and merged.input_type is not None:
            raise Refusal(
                400,
                "expected parts that agree whether the texts are queries or passages, which have no instruction; "
                f"got {spoken} and {said}; leave one of them out",
                param=param,
                code="contradiction",
            )
        if merged.instruction is not None and meaning.instruction not in (None, merged.instruction):
            raise Refusal(
                400,
                f"expected one instruction; got those of {spoken} and {said}; leave one of them out",
                param=param,
                code="contradiction",
            )
        merged = Meaning(meaning.input_type, merged.instruction if meaning.instruction is None else meaning.instruction)
        spoken = said
    return Meaning(merged.input_type or "passage", merged.instruction)
