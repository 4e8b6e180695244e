"""Brings a store up to date with files: embeds what is new, keeps what is there, removes what is gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from nv_embed_client.errors import InvalidInput, NVEmbedError
from nv_embed_client.index.files import TextFiles
from nv_embed_client.index.part import Key, Part
from nv_embed_client.index.passages import Passage, digest_of, passages_of
from nv_embed_client.index.store import Store
from nv_embed_client.outcome import Embedder, in_order

_PASSAGES_AT_ONCE = 512  # that are embedded and then stored; what an interrupted run has stored, the next one keeps

Progress: TypeAlias = Callable[[int], None]
"""Is told how many passages have been dealt with."""


@dataclass
class Summary:
    """What a run did."""

    files: int = 0
    embedded: int = 0
    """Passages with new text."""
    split: int = 0
    """Of these, the ones too long for the model, which are stored in parts."""
    copied: int = 0
    """Passages at a new place, whose text had been embedded before."""
    unchanged: int = 0
    removed: int = 0
    failures: list[tuple[str, NVEmbedError]] = field(default_factory=list)
    """The place of each passage that has no vector, and why."""


@dataclass(frozen=True, slots=True)
class _New:
    key: Key
    passage: Passage


def index(store: Store, files: TextFiles, embedder: Embedder, pool: ThreadPoolExecutor, progress: Progress) -> Summary:
    """Have the store hold the passages of these files, and none that they had before.

    Raises:
        NVEmbedError: the server is gone. The store has what was embedded until then.
    """
    return _Run(store, files, embedder).carried_out(pool, progress)


class _Run:
    def __init__(self, store: Store, files: TextFiles, embedder: Embedder) -> None:
        self._store = store
        self._files = files
        self._embedder = embedder
        self._stored = set(store.keys())
        self._digests = {key.digest for key in self._stored}  # whose vectors the store has, or will have
        self._wanted: set[Key] = set()
        self._copies: list[Key] = []
        self._summary = Summary()

    def carried_out(self, pool: ThreadPoolExecutor, progress: Progress) -> Summary:
        summary = self._summary
        for _, outcomes in in_order(pool, self._embedded, self._new(progress)):
            stored: list[Part] = []
            for new, parts in outcomes:
                progress(1)
                if isinstance(parts, NVEmbedError):
                    summary.failures.append((f"{self._store.path_of(new.key.file)}:{new.key.line}", parts))
                    continue
                summary.embedded += 1
                summary.split += len(parts) > 1
                stored += parts
            self._store.add(stored)
        missing = self._store.copy(self._copies)
        progress(len(self._copies))
        summary.copied = len(self._copies) - len(missing)
        for key in missing:
            problem = InvalidInput.of(
                expected="a vector of the same text elsewhere", got="none, because that failed", remedy="see there"
            )
            summary.failures.append((f"{self._store.path_of(key.file)}:{key.line}", problem))
        gone = [key for key in self._stored - self._wanted if self._is_covered(self._store.path_of(key.file))]
        self._store.remove(gone)
        summary.removed = len(gone)
        if summary.embedded or summary.copied or summary.removed:
            self._store.tidy()
        return summary

    def _new(self, progress: Progress) -> Iterator[list[_New]]:
        """The passages to embed, each text once; notes the others."""
        batch: list[_New] = []
        for path, text in self._files:
            self._summary.files += 1
            for passage in passages_of(text):
                key = Key(self._store.file_of(path), passage.line, digest_of(passage.text))
                self._wanted.add(key)
                if key in self._stored:
                    self._summary.unchanged += 1
                    progress(1)
                elif key.digest in self._digests:
                    self._copies.append(key)
                else:
                    self._digests.add(key.digest)
                    batch.append(_New(key, passage))
                    if len(batch) == _PASSAGES_AT_ONCE:
                        yield batch
                        batch = []
        if batch:
            yield batch

    def _embedded(self, batch: list[_New]) -> list[tuple[_New, list[Part] | NVEmbedError]]:
        """The parts of each passage, which the model reads to their ends."""
        done: list[list[Part]] = [[] for _ in batch]
        errors: dict[int, NVEmbedError] = {}
        todo = [(number, new.passage) for number, new in enumerate(batch)]
        while todo:
            outcome = self._embedder.outcome([passage.text for _, passage in todo])
            longer: list[tuple[int, Passage]] = []
            for i, (number, passage) in enumerate(todo):
                if i in outcome.errors:
                    errors[number] = outcome.errors[i]
                elif not outcome.is_truncated[i]:
                    done[number].append(Part(batch[number].key, passage.line, passage.text, outcome.embeddings[i]))
                elif len(passage.text) > 1:
                    longer += [(number, part) for part in passage.parts()]
                else:
                    errors[number] = InvalidInput.of(
                        expected="a model that reads at least a character", got=f"one that cuts {passage.text!r}",
                        remedy="check the server's max_sequence_tokens",
                    )  # fmt: skip
            todo = longer
        return [(new, errors.get(number, done[number])) for number, new in enumerate(batch)]

    def _is_covered(self, path: str) -> bool:
        """Whether the run would have seen a file, if it were still there."""
        return any(_is_in(path, scope) for scope in self._files.paths) and not any(
            _is_in(path, unread) for unread in self._files.unread
        )


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
