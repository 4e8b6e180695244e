"""Texts and an instruction to token sequences; knows neither torch nor batches, nor any one model's template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from nv_embed.errors import CheckpointError, InvalidRequest
from nv_embed.sequence import TokenSequence

# How a text is tokenized near a cut can depend on what was cut off, but not from this many characters away.
CUT_MARGIN_CHARACTERS = 4096
_MAX_CACHED_INSTRUCTION_CHARACTERS = 4096  # clients choose instructions; what they choose must not fill memory


def too_long(index: int, limit: int, got: str) -> InvalidRequest:
    """Of a text that would have to be cut, and may not be."""
    return InvalidRequest.of(
        expected=f"texts of at most {limit} tokens, as 'truncate' is 'NONE'",
        got=f"text {index} with {got}, its instruction included",
        remedy="shorten it, or set 'truncate' to 'END'",
    )


def nothing_left(index: int, limit: int, num_instruction_tokens: int) -> InvalidRequest:
    """Of a text that is cut where its instruction ends, so that every text would have the same vector."""
    return InvalidRequest.of(
        expected="an instruction that leaves some of each text",
        got=f"text {index} cut to {limit} tokens, with an instruction of {num_instruction_tokens}",
        remedy="shorten the instruction",
    )


@dataclass(frozen=True, slots=True)
class Template:
    """What a kind of checkpoint puts around a text."""

    first: str  # the token before it, which tokenizer.json itself must add
    last: str  # written behind it; may be empty
    is_instruction_pooled: bool
    is_first_optional: bool = False  # tokenizer.json may also add nothing


class Tokenizer:
    """A checkpoint's `tokenizer.json`, with its template and truncation.

    The `tokenizers` library is used directly: `transformers`' loaders give other ids for this file than the
    original did. It releases the GIL and uses every core for a batch of texts.
    """

    def __init__(self, path: Path, template: Template, *, vocab_size: int, max_sequence_tokens: int) -> None:
        """
        Args:
            path: the checkpoint's `tokenizer.json`.
            template: what stands around a text.
            vocab_size: rows of the embedding table; no id may reach it.
            max_sequence_tokens: a text is cut to, or refused beyond, this many tokens.

        Raises:
            CheckpointError: the file is missing, damaged, or does not belong to the checkpoint.
            OSError: it may not be read.
        """
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; model_path must hold the whole published checkpoint")
        content = path.read_bytes()  # an OSError says what keeps this user from it
        try:
            self._tokenizer = RustTokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(
                f"{path}: expected a tokenizer in the format of the tokenizers library; got a file that it refuses "
                f"({error}); download the file again"
            ) from None
        self._tokenizer.no_truncation()  # a file may hold what was set when it was saved
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if (largest := max(vocabulary.values())) >= vocab_size:
            raise CheckpointError(
                f"{path}: expected token ids below the checkpoint's vocab_size {vocab_size}; got {largest}; "
                "take all files from the same checkpoint"
            )
        tokens = self._tokenizer.encode("", add_special_tokens=True).tokens
        is_expected = tokens == [template.first] or (template.is_first_optional and not tokens)
        if not is_expected or template.last not in ("", *vocabulary):
            knows = f" and knows {template.last!r}" if template.last else ""
            raise CheckpointError(
                f"{path}: expected a tokenizer that puts {template.first!r} before a text, nothing else{knows}; got "
                f"one that puts {''.join(tokens)!r} around it; take all files from the same checkpoint"
            )
        self._template, self._num_first = template, len(tokens)
        self.max_sequence_tokens = max_sequence_tokens
        # Cutting a huge text before tokenizing it bounds time and memory; what is cut could not be reached.
        self._max_characters = max_sequence_tokens * max(map(len, vocabulary)) + CUT_MARGIN_CHARACTERS
        self._cached_num_instruction_tokens = lru_cache(maxsize=1024)(self._num_instruction_tokens)

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool = True, first_index: int = 0
    ) -> list[TokenSequence]:
        """Tokenize first token + instruction + text + last token, cut on the right to `max_sequence_tokens`.

        As in the originals a text that is cut has no last token, and a special token written in a text is that token.

        Args:
            texts: any number of texts.
            instruction: stands before every text; may be empty. The template says whether it is pooled.
            truncate: False refuses a text that would be cut.
            first_index: of the first text within its request, for messages.

        Raises:
            InvalidRequest: a text is too long and may not be cut, or nothing of it would be left.
        """
        limit = self.max_sequence_tokens
        is_usual = len(instruction) <= _MAX_CACHED_INSTRUCTION_CHARACTERS
        count = self._cached_num_instruction_tokens if is_usual else self._num_instruction_tokens
        num_instruction = count(instruction) if instruction else 0
        num_masked = 0 if self._template.is_instruction_pooled else num_instruction
        inputs = [self._cut(instruction + text) + self._template.last for text in texts]
        sequences = []
        for index, encoding in enumerate(self._tokenizer.encode_batch_fast(inputs), start=first_index):
            input_ids = encoding.ids
            is_truncated = len(input_ids) > limit
            if is_truncated:
                if not truncate:
                    cut = len(instruction) + len(texts[index - first_index]) > self._max_characters
                    raise too_long(index, limit, f"{'more than ' if cut else ''}{len(input_ids)} tokens")
                if limit <= self._num_first + num_instruction:
                    raise nothing_left(index, limit, num_instruction)
                input_ids = input_ids[:limit]
            if len(input_ids) <= num_masked:
                raise InvalidRequest.of(
                    expected="texts of at least one token",
                    got=f"text {index}, which has none of its own",
                    remedy="leave it out",
                )
            sequences.append(TokenSequence(np.array(input_ids, dtype=np.int32), num_masked, is_truncated))
        return sequences

    def _cut(self, text: str) -> str:
        return text[: self._max_characters]

    def _num_instruction_tokens(self, instruction: str) -> int:
        # Tokenized alone, although its last token may merge with the text's first when they stand together. The
        # original does the same, and its vectors depend on it.
        (encoding,) = self._tokenizer.encode_batch_fast([self._cut(instruction)], add_special_tokens=False)
        return len(encoding.ids)
