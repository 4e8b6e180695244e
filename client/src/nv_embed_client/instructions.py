"""The instructions that NV-Embed-v2 was published with, and what an instruction may be.

An instruction is the whole text before a query, template included. It takes part in the attention and is left out
of the pooling. Documents have none.
"""

from __future__ import annotations

from types import MappingProxyType

from nv_embed_client.errors import InvalidInput


def instruction_of(task: str) -> str:
    """The published template around the description of a task; the trailing space is part of it."""
    return f"Instruct: {task}\nQuery: "


def checked_instruction(instruction: str | None) -> str | None:
    """The same instruction, if it can be sent.

    Raises:
        InvalidInput: it is no `str`, holds half a surrogate pair, or a NUL.
    """
    if instruction is None:
        return None
    if not isinstance(instruction, str):
        raise InvalidInput.of(
            expected="a str as instruction", got=type(instruction).__name__, remedy="convert it to str"
        )
    try:
        instruction.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput.of(
            expected="valid Unicode as instruction",
            got=f"an unpaired surrogate at position {error.start}",
            remedy="correct it",
        ) from None
    if "\0" in instruction:
        raise InvalidInput.of(
            expected="an instruction without NUL, because Triton would cut it there",
            got=f"a NUL at position {instruction.index(chr(0))}",
            remedy="take it out",
        )
    return instruction


QUERY_INSTRUCTION = instruction_of("Given a question, retrieve passages that answer the question")

_SUPPORT_OR_REFUTE = "Given a claim, retrieve documents that support or refute the claim"
_ANSWER = "Given a question, retrieve passages that answer the question"
_DUPLICATES = "Given a question, retrieve questions that are semantically equivalent to the given question"

# By MTEB's name of the task, or of the kind of task.
TASK_INSTRUCTIONS = MappingProxyType(
    {
        name: instruction_of(task)
        for name, task in {
            "ArguAna": _SUPPORT_OR_REFUTE,
            "ClimateFEVER": "Given a claim about climate change, retrieve documents that support or refute the claim",
            "DBPedia": "Given a query, retrieve relevant entity descriptions from DBPedia",
            "FEVER": _SUPPORT_OR_REFUTE,
            "FiQA2018": "Given a financial question, retrieve relevant passages that answer the query",
            "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question",
            "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query",
            "NFCorpus": "Given a question, retrieve relevant documents that answer the question",
            "NQ": _ANSWER,
            "QuoraRetrieval": _DUPLICATES,
            "SCIDOCS": "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
            "SciFact": "Given a scientific claim, retrieve documents that support or refute the claim",
            "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query",
            "Touche2020": _ANSWER,
            "STS": "Retrieve semantically similar text",
            "Summarization": "Given a news summary, retrieve other semantically similar summaries",
        }.items()
    }
)

# The one task whose documents have an instruction too: they are questions like its queries.
DOCUMENT_INSTRUCTIONS = MappingProxyType({"QuoraRetrieval": instruction_of(_DUPLICATES)})
