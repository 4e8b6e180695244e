"""The arithmetic of a static twin: which row of numbers each token gets. Knows no server, no files."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

Rows: TypeAlias = npt.NDArray[np.float32]

_ROUNDS = 3  # further ones change little
_STEPS = 10  # of conjugate gradients, in each round
_PULL = 0.3  # of what a token means alone, beside one text in which it is all there is
_COMMON = 1e-3  # a token that is this share of all tokens starts with half the weight of a rare one


def basis(vectors: Rows, dimensions: int) -> Rows:
    """The directions [C, dimensions] that keep most of the products between the vectors [N, C]."""
    _, directions = np.linalg.eigh(vectors.T @ vectors)
    return np.ascontiguousarray(directions[:, ::-1][:, :dimensions])


def unit(vectors: Rows) -> Rows:
    """The vectors [N, C] with length 1; one of zeros stays as it is."""
    rows: Rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return rows


def bags(tokens_of_texts: list[list[int]], num_tokens: int) -> Any:
    """A sparse matrix [N, num_tokens]: its product with the rows of tokens has each text's mean of rows."""
    lengths = np.array([len(tokens) for tokens in tokens_of_texts])
    shares = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32)
    ids = np.fromiter((token for tokens in tokens_of_texts for token in tokens), np.int32, count=len(shares))
    starts = np.concatenate([[0], lengths.cumsum()])
    matrix = sparse.csr_matrix((shares, ids, starts), shape=(len(lengths), num_tokens))
    matrix.sum_duplicates()
    return matrix


def fitted_rows(texts: Any, targets: Rows, alone: Rows) -> Rows:
    """A row for each token, so that the mean of a text's rows points where the teacher's vector of the text does.

    Ridge regression towards rows that need no texts: the teacher's vectors of the tokens alone, frequent ones shorter.
    Only directions count, because a mean's length says nothing: each round weighs a text by what length its mean had.

    Args:
        texts: their `bags`, [N, V].
        targets: the teacher's unit vectors of the texts, [N, C].
        alone: the teacher's unit vectors of the tokens, [V, C].
    """
    in_texts = np.asarray((texts > 0).sum(axis=0), np.float32).ravel()
    share = in_texts / max(in_texts.sum(), 1)
    first = alone * (_COMMON / (_COMMON + share))[:, None]
    means = texts @ first
    first = first * ((means * targets).sum() / (means * means).sum())
    rows: Rows = first
    for _ in range(_ROUNDS):
        lengths = np.linalg.norm(texts @ rows, axis=1)
        weights = 1 / np.maximum(lengths, np.median(lengths) / 10)
        rows = _ridge((sparse.diags(weights) @ texts).tocsr().astype(np.float32), targets, first)
    return rows


def _ridge(texts: Any, targets: Rows, first: Rows) -> Rows:
    """Rows near the minimum of |texts @ rows - targets|^2 + pull * |rows - first|^2, by conjugate gradients.

    All columns at once, with the diagonal as preconditioner, from `first` on.
    """
    across = texts.T.tocsr()
    diagonal = np.asarray(texts.multiply(texts).sum(axis=0)).ravel()[:, None] + _PULL
    rows = first.copy()
    residual = across @ (targets - texts @ rows)
    direction = scaled = residual / diagonal
    product = (residual * scaled).sum(axis=0)
    for _ in range(_STEPS):
        image = across @ (texts @ direction) + _PULL * direction
        step = product / np.maximum((direction * image).sum(axis=0), np.finfo(np.float32).tiny)
        rows += step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum(axis=0)
        direction = scaled + product / np.maximum(before, np.finfo(np.float32).tiny) * direction
    return rows.astype(np.float32)
