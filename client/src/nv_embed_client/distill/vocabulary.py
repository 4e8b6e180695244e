"""The tokens of a static twin: words and pieces of words, learned from texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

UNKNOWN = "[UNK]"
UNKNOWN_ID = 0
_CONTINUES = "##"  # begins a piece that is not the beginning of its word
_MAX_LEARNED = 30_000


def learned_tokenizer(texts: Iterable[str], words: Sequence[str]) -> Tokenizer:
    """A WordPiece tokenizer that knows each of the words whole, if it has neither spaces nor punctuation.

    Capitals are small letters to it, because a table of tokens has no context to tell names by.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=_MAX_LEARNED,
        min_frequency=2,  # one text alone would teach a token that text, not what it shares with others
        special_tokens=[UNKNOWN],
        continuing_subword_prefix=_CONTINUES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(texts, words), trainer)
    known = tokenizer.get_vocab()
    for word in words:
        parts = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(word))
        if len(parts) == 1:
            known.setdefault(parts[0][0], len(known))
    tokenizer.model = models.WordPiece(known, unk_token=UNKNOWN)
    return tokenizer


def texts_of_tokens(tokenizer: Tokenizer) -> list[str]:
    """What each token stands for, in the order of their ids; of the unknown one the empty text."""
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    return ["" if token == UNKNOWN else token.removeprefix(_CONTINUES) or token for token in tokens]
