"""From texts and a server to a static twin in a folder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from nv_embed_client.client import NVEmbedClient
from nv_embed_client.distill import fit, folder
from nv_embed_client.distill.vocabulary import UNKNOWN_ID, learned_tokenizer, texts_of_tokens
from nv_embed_client.errors import InvalidInput

_TEXTS_AT_ONCE = 32_768  # whose vectors are held in full: half a gigabyte of NV-Embed-v2's
_MAX_KEPT_OUT = 1000
_PHRASES_PER_WORD = 3


@dataclass(frozen=True, slots=True)
class Twin:
    """What was made."""

    num_tokens: int
    dimensions: int
    num_taught: int
    """Texts, words and phrases that it was fitted to."""
    num_kept_out: int
    cosine: float
    """Mean over those kept out, to the teacher's vectors in as many dimensions; NaN if there are none."""

    def __str__(self) -> str:
        size = self.num_tokens * self.dimensions * 4 / 1e6
        return (
            f"{self.num_tokens} tokens, {self.dimensions} dimensions, {size:.1f} MB, taught with {self.num_taught} "
            f"texts; mean cosine to the teacher on {self.num_kept_out} others: {self.cosine:.3f}"
        )


def distill(
    client: NVEmbedClient,
    out: str | Path,
    texts: Iterable[str] = (),
    *,
    vocabulary: Iterable[str] = (),
    dimensions: int = 256,
    progress: bool = False,
) -> Twin:
    """Make a static model that gives texts nearly the directions that the served model gives them.

    Args:
        client: of the teacher.
        out: the folder to make; it must not exist, or be empty.
        texts: like those that the twin will see; any number, held in memory. Each is embedded as a document.
        vocabulary: words that the twin must know whole. If there are no texts, phrases of these words in random order
            teach it which of them weigh much.
        dimensions: of the twin's vectors, at most the teacher's.
        progress: show bars on the standard error.

    Raises:
        InvalidInput: the folder has files, there are too few texts, or the teacher has fewer dimensions.
        NVEmbedError: what the server or the way to it lacks.
    """
    if dimensions < 1:
        raise InvalidInput.of(expected="dimensions of at least 1", got=str(dimensions), remedy="correct it")
    own, words = _distinct(texts), _distinct(vocabulary)
    shuffled = random.Random(0)
    if not own:
        own = [
            " ".join(shuffled.sample(words, min(len(words), shuffled.randint(2, 8))))
            for _ in range(_PHRASES_PER_WORD * len(words))
        ]
    shuffled.shuffle(own)  # the basis comes from the first ones
    tokenizer = learned_tokenizer(own, words)
    tokens = texts_of_tokens(tokenizer)
    asked = [*own, *words, *tokens]
    given = len(asked) - 1  # the unknown token says nothing
    if given < dimensions:
        raise InvalidInput.of(
            expected=f"at least {dimensions} different texts and words, as many as dimensions",
            got=f"{given}, single tokens included",
            remedy="give more, or ask for fewer dimensions",
        )
    with folder.prepared(Path(out)) as path:
        teacher_dimensions = client.dimension()
        if dimensions > teacher_dimensions:
            raise InvalidInput.of(
                expected=f"at most the teacher's {teacher_dimensions} dimensions",
                got=str(dimensions),
                remedy="ask for fewer",
            )
        targets = _reduced(client, asked, dimensions, progress)
        alone = targets[-len(tokens) :]
        alone[UNKNOWN_ID] = (
            0  # then it makes no difference that model2vec leaves it out and sentence-transformers does not
        )

        kept_out = min(_MAX_KEPT_OUT, len(own) // 20)
        bags = fit.bags(_ids(tokenizer, asked[: -len(tokens)]), len(tokens))
        rows = fit.fitted_rows(bags[kept_out:], targets[kept_out : -len(tokens)], alone)
        guessed = fit.unit(bags[:kept_out] @ rows)
        cosine = float((guessed * targets[:kept_out]).sum(axis=1).mean()) if kept_out else float("nan")
        twin = Twin(len(tokens), dimensions, bags.shape[0] - kept_out, kept_out, cosine)
        folder.write(
            path,
            tokenizer,
            rows,
            teacher=client.model_name,
            teacher_dimensions=teacher_dimensions,
            date=datetime.now(timezone.utc).date(),
            taught=twin.num_taught,
            kept_out=kept_out,
            cosine=f"{cosine:.3f}",
        )
        return twin


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [
        [token for token in encoding.ids if token != UNKNOWN_ID]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def _reduced(client: NVEmbedClient, texts: Sequence[str], dimensions: int, progress: bool) -> fit.Rows:
    """The teacher's vectors in the directions that matter most to the first texts: unit rows [n, dimensions]."""
    rows = np.empty((len(texts), dimensions), np.float32)
    directions: fit.Rows | None = None
    with tqdm(total=len(texts), unit="text", desc="embedding", disable=not progress) as bar:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            vectors = client.embed_documents(_counted(part, bar))
            if directions is None:
                directions = fit.basis(vectors, dimensions)
            rows[start : start + len(part)] = vectors @ directions
    return fit.unit(rows)


def _counted(texts: Sequence[str], bar: Any) -> Iterable[str]:
    for text in texts:
        yield text
        bar.update()
