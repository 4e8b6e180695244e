"""A byte-fallback BPE tokenizer in the published form, and the instructions that go before a query.

The student starts from the teacher's token vectors, so its merges are learned from the teacher's word pieces. The
file differs from the published one in size, and tells no capitals from small letters, as the teacher does not.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from teacher import Teacher
from text import PHRASES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
ALPHABET = 100  # characters with tokens of their own; all others are spelled in bytes, and in no merge
TEMPLATE = "Instruct: {}\nQuery: "
STANDARD = TEMPLATE.format("Given a question, retrieve passages that answer the question")
TASKS = PHRASES["instructions"]


class Vocabulary:
    """tokenizer.json -> input ids, the way the published model feeds itself."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))
        self.size = self.tokenizer.get_vocab_size()

    def num_masked(self, instruction: str) -> int:
        """Where pooling starts: at the instruction's last token, for its count is without <s>, as in the original."""
        return len(self.tokenizer.encode(instruction, add_special_tokens=False).ids)

    def encode(self, texts: list[str], max_length: int = 1024) -> list[list[int]]:
        """`<s>` + text + `</s>`, cut on the right; a text carries its instruction in front already."""
        return [e.ids[:max_length] for e in self.tokenizer.encode_batch([t + "</s>" for t in texts])]

    def words(self) -> list[tuple[str, bool]]:
        """Each token as plain text, empty where it has none (special tokens, bytes), and whether it starts a word."""
        unspelled = len(SPECIAL + BYTES)
        tokens = [self.tokenizer.id_to_token(i) for i in range(self.size)]
        return [("" if i < unspelled else t.replace("▁", ""), t.startswith("▁")) for i, t in enumerate(tokens)]


def count_pieces(texts: Sequence[str], teacher: Teacher) -> Counter[str]:
    """How often each of the teacher's pieces occurs, written as the student's tokens are: `▁` for a space before."""
    counts: Counter[str] = Counter()
    for text, encoding in zip(texts, teacher.tokenizer.encode_batch(texts), strict=True):
        for start, end in encoding.offsets[1:-1]:
            space = "▁" if start == 0 or text[start - 1] == " " else ""
            counts[space + text[start:end].lower()] += 1
    return counts


def trained_vocabulary(texts: Sequence[str], teacher: Teacher, vocab_size: int, path: Path) -> Vocabulary:
    """Of `path`; where there is none, a tokenizer.json of `vocab_size` tokens is learned from the teacher's pieces.

    SystemExit if the text does not give so many.
    """
    if path.exists():
        return Vocabulary(path)
    counts = count_pieces(texts, teacher)
    letters: Counter[str] = Counter()
    for piece, count in counts.items():
        for letter in piece:
            letters[letter] += count
    alphabet = {letter for letter, _ in letters.most_common(ALPHABET)}
    learner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    learner.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + BYTES, show_progress=False)
    # The trainer counts by itself: each piece comes as often as it occurs, one to a line.
    learner.train_from_iterator((f"{p}\n" * n for p, n in counts.items() if alphabet.issuperset(p)), trainer)
    if (size := learner.get_vocab_size()) < vocab_size:
        raise SystemExit(f"expected text that gives {vocab_size} tokens; got {size}; use more text")
    made = Tokenizer(learner.model)  # without the learner's special tokens: a byte's name in a text is text
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    made.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path.write_text(made.to_str(), encoding="utf-8")
    return Vocabulary(path)
