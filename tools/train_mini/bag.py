"""The baseline to beat: a text is the mean of its tokens' vectors."""

import torch
import torch.nn.functional as F
from teacher import Teacher
from torch import Tensor, nn
from vocabulary import Vocabulary

SCALE = 4.0  # length of the first vectors, for which the student's rate is neither too small nor too large


class Bag(nn.Module):
    def __init__(self, vocabulary: Vocabulary, teacher: Teacher) -> None:
        """Each token starts as what the teacher says of it alone, those without text with next to nothing."""
        super().__init__()
        words = [word for word, _ in vocabulary.words()]
        vectors = SCALE * teacher.embed([word or "." for word in words])
        vectors[[i for i, word in enumerate(words) if not word]] *= 0.02
        self.token_vectors = nn.EmbeddingBag.from_pretrained(vectors, freeze=False)
        self.bias = nn.Parameter(torch.zeros(vectors.shape[1]))

    def forward(self, rows: list[list[int]], num_masked: list[int]) -> Tensor:
        """As the student's: what is masked is no part of the mean."""
        kept = [torch.tensor(row[start:]) for row, start in zip(rows, num_masked, strict=True)]
        starts = torch.tensor([0] + [len(row) for row in kept[:-1]]).cumsum(0)
        device = self.bias.device
        return F.normalize(self.token_vectors(torch.cat(kept).to(device), starts.to(device)) + self.bias, dim=-1)
