"""The options that replace the text before each query."""

from __future__ import annotations

import argparse

from nv_embed_client.cli.texts import text_argument
from nv_embed_client.errors import InvalidInput
from nv_embed_client.instructions import TASK_INSTRUCTIONS, checked_instruction, instruction_of


def add_instruction(parser: argparse.ArgumentParser) -> None:
    """Add `--instruction` and `--task`, at most one of which may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--instruction",
        metavar="TEXT",
        type=text_argument,
        help="the whole text before each text, in place of the model's own",
    )
    group.add_argument(
        "--task",
        metavar="TASK",
        type=text_argument,
        help="what the queries ask for, such as 'Given a claim, retrieve documents that refute the claim', which is "
        f"put into NV-Embed's template; or the name of a published task: {', '.join(TASK_INSTRUCTIONS)}",
    )


def instruction_in(parsed: argparse.Namespace) -> str | None:
    """What was asked for; None for the model's own.

    Args:
        parsed: also with `query`, whether the texts are queries.

    Raises:
        InvalidInput: a task of documents, or a task's name that is unknown.
    """
    if parsed.task is None:
        return checked_instruction(parsed.instruction)
    if not parsed.query:
        raise InvalidInput.of(
            expected="--query beside --task, because a task is put before queries", got="--task alone",
            remedy="add --query, or give documents their text with --instruction",
        )  # fmt: skip
    if parsed.task in TASK_INSTRUCTIONS:
        return TASK_INSTRUCTIONS[parsed.task]
    if len(parsed.task.split()) < 2:
        raise InvalidInput.of(
            expected=f"a sentence, or one of {', '.join(TASK_INSTRUCTIONS)} as --task", got=repr(parsed.task),
            remedy="correct it",
        )  # fmt: skip
    return checked_instruction(instruction_of(parsed.task))
