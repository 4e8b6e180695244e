"""A byte-fallback BPE tokenizer in the published form, and the instructions that go before a query.

Merges are learned on words split at spaces, punctuation and digits, then written without any pre-tokenizer, as the
published file has it: no merge joins what training kept apart, so tokens are the same either way.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "Instruct: {}\nQuery: "
STANDARD = TEMPLATE.format("Given a question, retrieve passages that answer the question")
TASKS = [
    "Given a claim about climate change, retrieve documents that support or refute the claim",
    "Given a multi-hop question, retrieve documents that can help answer the question",
    "Given a claim, retrieve documents that support or refute the claim",
    "Given a web search query, retrieve relevant passages that answer the query",
    "Given a query, retrieve relevant entity descriptions from DBPedia",
    "Given a question, retrieve questions that are semantically equivalent to the given question",
    "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
    "Given a query on COVID-19, retrieve documents that answer the query",
    "Given a scientific claim, retrieve documents that support or refute the claim",
    "Given a question, retrieve relevant documents that answer the question",
    "Given a financial question, retrieve relevant passages that answer the query",
    "Retrieve semantically similar text",
    "Given a news summary, retrieve other semantically similar summaries",
    "Classify the sentiment of the given review",
    "Identify the topic of the text",
    "Find duplicate questions",
    "Find the definition of the word",
]


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learn the merges and write `path`, a tokenizer.json of exactly `vocab_size` tokens."""
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainable = Tokenizer(models.BPE(byte_fallback=True))
    trainable.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL + byte_tokens, limit_alphabet=200, show_progress=False,
        max_token_length=20,
    )  # fmt: skip
    trainable.train_from_iterator(texts, trainer)
    model = json.loads(trainable.to_str())["model"]
    assert len(model["vocab"]) == vocab_size, len(model["vocab"])
    first = {"id": "<s>", "type_id": 0}
    published = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i, token in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": first}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": first}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": model["vocab"], "merges": model["merges"]},
    }  # fmt: skip
    path.write_text(json.dumps(published, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


class Vocabulary:
    """tokenizer.json -> input ids, the way the published model feeds itself."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))
        self.size = self.tokenizer.get_vocab_size()
        self._prefix: dict[str, int] = {"": 0}

    def num_masked(self, instruction: str) -> int:
        """Tokens of the instruction alone, without <s>: where pooling starts."""
        if instruction not in self._prefix:
            self._prefix[instruction] = len(self.tokenizer.encode(instruction, add_special_tokens=False).ids)
        return self._prefix[instruction]

    def encode(self, texts: list[str], max_length: int = 1024) -> list[list[int]]:
        """`<s>` + text + `</s>`, cut on the right; a text carries its instruction in front already."""
        return [e.ids[:max_length] for e in self.tokenizer.encode_batch([t + "</s>" for t in texts])]

    def words(self) -> list[str]:
        """Each token as plain text, empty where it has none (special tokens, bytes)."""
        tokens = [self.tokenizer.id_to_token(i) for i in range(self.size)]
        return ["" if i < 259 else t.replace("▁", " ").strip() for i, t in enumerate(tokens)]
