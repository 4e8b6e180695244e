"""The instructions that NV-Embed-v2 was published with; data, no behaviour.

An instruction is the whole text before a query, template included. It takes part in the attention and is left out
of the pooling. Documents have none.
"""

from __future__ import annotations

from types import MappingProxyType


def instruction_of(task: str) -> str:
    """The published template around the description of a task; the trailing space is part of it."""
    return f"Instruct: {task}\nQuery: "


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
