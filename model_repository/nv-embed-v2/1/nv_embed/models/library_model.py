"""sentence-transformers as this server uses it: texts to tokens, groups of padded rows to vectors. Knows no files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer
from torch import Tensor

from nv_embed.errors import CheckpointError, InvalidRequest, in_short
from nv_embed.models.protocol import Work
from nv_embed.sequence import TokenSequence
from nv_embed.tokenizer import CUT_MARGIN_CHARACTERS, nothing_left, too_long

MOST_PADDING = 0.25  # of a group's tokens
SAMPLES = (
    "Water: вода, 水.",
    "Das Wasser kocht; вода кипит; 水沸腾了. On a mountain the air presses LESS, so it boils at a lower temperature. ",
)
_MOST_SAMPLE_REPEATS = 2000  # more than 50,000 tokens: longer than what published models take
_MOST_SAMPLE_TOKENS = 1024
MOST_CHARACTERS = 2**21  # of a text: more than most books. Tokenizing them takes seconds, in which other texts wait
_FIRST_CHARACTERS_PER_TOKEN = 8  # of a longer text, at first: more than most texts have
_MOST_DISTANCE = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}  # of two vectors of length 1
_REQUIREMENTS = "model_repository/nv-embed-v2/requirements-sentence-transformers.txt"
# Older ones compute EmbeddingGemma, and decoders with `is_causal` false, as if no token saw a later one.
_OLDEST = {"sentence-transformers": (6, 0), "transformers": (5, 2)}


def import_library() -> None:
    """Import it, offline, with its warnings in this server's log.

    Raises:
        CheckpointError: it is missing, broken or too old.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    remedy = f"pip install -r {_REQUIREMENTS}"
    try:
        import sentence_transformers  # noqa: F401
        import transformers
    except Exception as error:  # a package within it may raise anything
        raise CheckpointError(
            f"expected the packages that compute folders with modules.json; got {type(error).__name__}: "
            f"{in_short(error)}; {remedy}, and have no pyarrow of version 26 or later beside numpy 1"
        ) from None
    for name, oldest in _OLDEST.items():
        found = version(name)
        if tuple(int(part) for part in found.split(".")[:2]) < oldest:
            raise CheckpointError(f"expected {name} {'.'.join(map(str, oldest))} or later; got {found}; {remedy}")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("transformers", "sentence_transformers"):
        theirs = logging.getLogger(name)
        theirs.handlers, theirs.propagate = logging.getLogger("nv_embed").handlers, False
        theirs.setLevel(logging.WARNING)


@torch.no_grad()
def spoil_missing(network: Any) -> list[str]:
    """Put NaN in the place of the random numbers that stand for missing tensors, and name these.

    A tensor that no vector depends on may be missing: many folders lack BERT's pooler.
    """
    missing = [
        (name, tensor)
        for name, tensor in network.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and not getattr(tensor, "_is_hf_initialized", False)
    ]
    for _, tensor in missing:
        tensor.fill_(torch.nan)
    return [name for name, _ in missing]


class _Tokens(NamedTuple):
    """Of a text."""

    ids: list[int]
    is_full: bool  # whether it has as many as it may have, and would have more
    is_truncated: bool

    @classmethod
    def of(cls, encoding: Encoding, *, is_cut: bool = False) -> _Tokens:
        is_full = bool(encoding.overflowing)
        return cls(encoding.ids, is_full, is_full or is_cut)


class LibraryTokenizer:
    """A library's tokenizer, whose truncation is set once, because threads share it. See `TextEncoder`."""

    def __init__(
        self,
        tokenizer: RustTokenizer,
        max_sequence_tokens: int,
        *,
        adds_special_tokens: bool = True,
        cut_side: str = "right",
        special_ids: frozenset[int] | None = None,
        empty_ids: frozenset[int] = frozenset(),
        num_rows: int = 2**31,
    ) -> None:
        """
        Args:
            tokenizer: nobody else may use it.
            max_sequence_tokens: a text is cut to, or refused beyond, this many tokens.
            adds_special_tokens: whether its special tokens are put around a text.
            cut_side: where a text is cut: 'left' or 'right'.
            special_ids: its special tokens, if the pooling leaves the instruction out; None: all is pooled.
            empty_ids: tokens that add nothing to a vector.
            num_rows: of the model's table of tokens. A tokenizer may have more tokens: Gemma's has one that stands for
                images. A client can write it, and on a GPU a missing row ends the server.
        """
        self._tokenizer, self._adds_special_tokens = tokenizer, adds_special_tokens
        self._special_ids, self._empty_ids = special_ids, empty_ids
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_sequence_tokens, direction=cut_side)
        self.max_sequence_tokens = max_sequence_tokens
        vocabulary = tokenizer.get_vocab()
        self._without_row = frozenset(each for each in vocabulary.values() if each >= num_rows)
        self._keeps_start = cut_side == "right"

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool = True, first_index: int = 0
    ) -> list[TokenSequence]:
        """Tokenize instruction + text, cut as the library cuts: its special tokens stay.

        A text is also cut to `MOST_CHARACTERS`, if these have fewer tokens than a text may have: it may be a run of
        spaces, or one word, of any length. The library has no such limit.

        Args:
            texts: any number of texts.
            instruction: stands before every text; may be empty.
            truncate: False refuses a text that would be cut.
            first_index: of the first text within its request, for messages.

        Raises:
            InvalidRequest: a text is too long and may not be cut, has no token or one that the model lacks, or nothing
                of it would be pooled.
        """
        num_masked = self._num_instruction_tokens(instruction)
        encodings = self._encode([instruction + text for text in texts])
        # A table takes the mean of all tokens: an instruction must not stand in for a text that it knows nothing of.
        own = self._encode(list(texts)) if instruction and not self._adds_special_tokens else encodings
        sequences = []
        for index, (encoding, of_text) in enumerate(zip(encodings, own, strict=True), start=first_index):
            limit = self.max_sequence_tokens
            if encoding.is_truncated:
                if not truncate:
                    got = "more than that" if encoding.is_full else f"more than {MOST_CHARACTERS} characters"
                    raise too_long(index, limit, got)
                if self._keeps_start and (room := self._encode([instruction])[0]) and len(room.ids) >= limit:
                    raise nothing_left(index, limit, len(room.ids))
            if self._empty_ids.issuperset(of_text.ids) or self._empty_ids.issuperset(encoding.ids):
                raise InvalidRequest.of(
                    expected="texts with at least one token that the model knows",
                    got=f"text {index} without any, which has no vector",
                    remedy="leave it out",
                )
            if lacking := self._without_row.intersection(encoding.ids):
                raise InvalidRequest.of(
                    expected="texts of tokens that the model has a row for",
                    got=f"text {index} with {self._tokenizer.id_to_token(min(lacking))!a}, its instruction included",
                    remedy="leave it out",
                )
            if len(encoding.ids) <= num_masked:
                raise nothing_left(index, limit, num_masked)
            input_ids = np.array(encoding.ids, dtype=np.int32)
            sequences.append(TokenSequence(input_ids, num_masked, encoding.is_truncated))
        return sequences

    def _encode(self, texts: list[str]) -> list[_Tokens]:
        """As if each were tokenized whole, up to `MOST_CHARACTERS`, but reading no more than can be reached."""
        size = min(self.max_sequence_tokens * _FIRST_CHARACTERS_PER_TOKEN + CUT_MARGIN_CHARACTERS, MOST_CHARACTERS)
        short = [text for text in texts if len(text) <= size]
        of_short = iter(self._encode_whole(short))
        return [self._encode_long(text, size) if len(text) > size else _Tokens.of(next(of_short)) for text in texts]

    def _encode_whole(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=self._adds_special_tokens)

    def _encode_long(self, text: str, size: int) -> _Tokens:
        """Tokenize twice as much again and again, until the last token is far from the cut.

        How many characters a token stands for has no bound: it may stand for a run of spaces, or for an unknown word.
        """
        while True:
            part = text[:size] if self._keeps_start else text[-size:]
            (encoding,) = self._encode_whole([part])
            is_whole = len(part) == len(text)
            if is_whole or size >= MOST_CHARACTERS or (encoding.overflowing and self._is_far_from_cut(part)):
                return _Tokens.of(encoding, is_cut=not is_whole)
            size = min(2 * size, MOST_CHARACTERS)

    def _is_far_from_cut(self, part: str) -> bool:
        encoding = self._tokenizer.encode(part, add_special_tokens=self._adds_special_tokens)  # slow: it has offsets
        places = [place for place, own in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not own]
        num_read = max((stop for _, stop in places), default=0)
        if not self._keeps_start:
            num_read = len(part) - min((start for start, _ in places), default=len(part))
        return num_read + CUT_MARGIN_CHARACTERS <= len(part)

    def _num_instruction_tokens(self, instruction: str) -> int:
        """Leading tokens that are not pooled. Tokenized alone, because the library does so, too."""
        if self._special_ids is None or not instruction:
            return 0
        (encoding,) = self._encode([instruction])
        return len(encoding.ids) - (encoding.ids[-1:] != [] and encoding.ids[-1] in self._special_ids)


def groups_of(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Which sequences are padded together: those of about the same length, the longest first.

    A group padded to its longest sequence has at most a quarter more tokens than without padding, so that a long text
    does not make short ones costly. All of a group have as many masked tokens, because the library masks as many.

    Returns:
        Indices into `sequences`, each once; the first of a group is its longest.
    """
    groups: list[list[int]] = []
    key, longest, padding, num_tokens = None, 0, 0, 0
    for i in sorted(
        range(len(sequences)), key=lambda i: (sequences[i].num_masked, sequences[i].num_tokens), reverse=True
    ):
        own = sequences[i]
        fits = padding + longest - own.num_tokens <= MOST_PADDING * (num_tokens + own.num_tokens)
        if own.num_masked != key or not fits:
            groups.append([])
            key, longest, padding, num_tokens = own.num_masked, own.num_tokens, 0, 0
        groups[-1].append(i)
        padding += longest - own.num_tokens
        num_tokens += own.num_tokens
    return groups


class LibraryModel:
    """A `SentenceTransformer` on a device, for any number of threads. See `Model`."""

    def __init__(self, library: Any, device: torch.device, dimension: int, *, pad_id: int | None) -> None:
        """
        Args:
            library: a `SentenceTransformer`, in evaluation mode.
            device: where it is.
            dimension: of a vector; what the library returns is cut to it.
            pad_id: the padding token; None for a table of token vectors, whose texts need no padding.
        """
        self.network, self._device, self._dimension, self._pad_id = library, device, dimension, pad_id
        self.samples: list[TokenSequence] = []  # once it is compared
        kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
        tables = {id(each.weight) for each in library.modules() if isinstance(each, kinds)}
        self._multiply_adds = max(sum(each.numel() for each in library.parameters() if id(each) not in tables), 1)

    @torch.inference_mode()
    def compare(self, tokenizer: LibraryTokenizer, prompts: dict[str, str], missing: list[str]) -> None:
        """Compare tokens and vectors of samples, computed together, with those that the library gives each alone.

        One sample is cut to the longest text. It is computed, too, where that takes a moment.

        Args:
            tokenizer: what the server tokenizes with, which cuts where the library does.
            prompts: of 'query' and 'document'.
            missing: what `spoil_missing` found.

        Raises:
            CheckpointError: they differ, or are no numbers.
        """
        samples = list(SAMPLES)
        if self._pad_id is not None:  # a table takes texts of any length
            samples.append(SAMPLES[-1] * min(tokenizer.max_sequence_tokens, _MOST_SAMPLE_REPEATS))
        for task, prompt in prompts.items():
            encode = self.network.encode_query if task == "query" else self.network.encode_document
            sequences = tokenizer.encode(samples, prompt)
            for sample, sequence in zip(samples, sequences, strict=True):
                features = self.network.preprocess([sample], prompt=prompt, task=task)
                if features["input_ids"].flatten().tolist() != sequence.input_ids.tolist():
                    raise CheckpointError(
                        "expected the tokens of a text to be those of its prompt and the text; got a model that "
                        "sentence-transformers feeds in another way; it cannot be served here"
                    )
            self.samples = sequences[: len(SAMPLES)]
            vectors = self.embed_group([each for each in sequences if each.num_tokens <= _MOST_SAMPLE_TOKENS])
            if not vectors.isfinite().all():
                got = f"none for {', '.join(missing)}" if missing else "vectors with NaN or infinite numbers"
                raise CheckpointError(
                    f"expected every tensor that a vector needs in the files, and finite vectors; got {got}; take all "
                    "files from the same checkpoint, and dtype 'float32' if that does not help"
                )
            alone = [encode([sample], normalize_embeddings=True, convert_to_tensor=True) for sample in SAMPLES]
            distance = (vectors[: len(alone)] - torch.cat(alone).float()).norm(dim=1).max().item()
            if not distance <= _MOST_DISTANCE[self.network.dtype]:
                raise CheckpointError(
                    "expected texts that are computed together to have the vectors that sentence-transformers gives "
                    f"each alone; got a distance of {distance:.1g}; it cannot be served here"
                )

    def embed(self, sequences: Sequence[TokenSequence], work: Work) -> Tensor:
        """[S, dimension] float32 rows of length 1, in the order of the sequences.

        A single text is never divided, however long. A vector of zeros has no direction; its row is NaN.
        """
        groups = [list(range(len(sequences)))] if self._pad_id is None else groups_of(sequences)
        parts: list[Tensor] = []
        for group in groups:
            if group is groups[-1]:
                work.little_left()
            multiply_adds = sequences[group[0]].num_tokens * self._multiply_adds
            for rows in work.pieces(len(group), multiply_adds, fewest_rows=1):
                parts.append(self.embed_group([sequences[i] for i in group[rows]]))
        order = torch.from_numpy(np.argsort(np.concatenate(groups)))
        return torch.cat(parts)[order.to(self._device)]

    def embed_group(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The same of sequences with as many masked tokens, in one pass."""
        features = self._flat(sequences) if self._pad_id is None else self._padded(sequences, self._pad_id)
        vectors = self.network(features)["sentence_embedding"][:, : self._dimension].float()
        rows: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
        return rows

    def _flat(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        offsets = np.cumsum([0] + [own.num_tokens for own in sequences[:-1]])
        input_ids = np.concatenate([own.input_ids for own in sequences])
        return {"input_ids": self._long(input_ids), "offsets": self._long(offsets)}

    def _padded(self, sequences: Sequence[TokenSequence], pad_id: int) -> dict[str, Any]:
        """Padded on the right, whatever the tokenizer says, so that positions are those of the text alone."""
        input_ids = np.full((len(sequences), max(own.num_tokens for own in sequences)), pad_id)
        attention_mask = np.zeros_like(input_ids)
        for row, own in enumerate(sequences):
            input_ids[row, : own.num_tokens] = own.input_ids
            attention_mask[row, : own.num_tokens] = 1
        return {
            "input_ids": self._long(input_ids),
            "attention_mask": self._long(attention_mask),
            "prompt_length": sequences[0].num_masked,
        }

    def _long(self, numbers: Any) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self._device)
