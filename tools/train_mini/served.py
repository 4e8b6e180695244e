"""The checkpoint as the server reads and computes it: what is measured is what is served."""

import sys
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "model_repository/nv-embed-v2/1"))

from nv_embed.config import CheckpointConfig  # noqa: E402
from nv_embed.engine import Engine  # noqa: E402
from nv_embed.tokenizer import Tokenizer  # noqa: E402

CONFIG = CheckpointConfig.load(HERE)  # of the config.json beside this file, which is copied into the checkpoint
BATCH_TEXTS = 64


class Served:
    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer(folder / "tokenizer.json", vocab_size=CONFIG.vocab_size, max_sequence_tokens=8192)
        self._engine = Engine.load(folder, CONFIG, device="cpu", dtype="float32")

    def embed(self, texts: list[str], instruction: str = "") -> Tensor:
        """Unit vectors [N, hidden_size], in fp32 arithmetic over fp16 weights."""
        sequences = self._tokenizer.encode(texts, instruction)
        starts = range(0, len(sequences), BATCH_TEXTS)
        return torch.cat([torch.from_numpy(self._engine.embed(sequences[s : s + BATCH_TEXTS])) for s in starts])

    def mean_length(self, texts: list[str]) -> float:
        """In tokens."""
        return fmean(sequence.num_tokens for sequence in self._tokenizer.encode(texts, ""))
