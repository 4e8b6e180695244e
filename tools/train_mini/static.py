"""The baseline to beat: a text is the mean of its tokens' vectors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from teacher import Teacher
from torch import Tensor, nn
from tqdm import tqdm
from vocabulary import Vocabulary

Embed = Callable[[list[str]], Tensor]  # texts -> unit vectors [N, 384]


class Bag(nn.Module):
    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        size = initial.shape[1]
        self.embeddings = nn.Parameter(initial * size**0.5)  # unit rms per vector
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, rows: list[list[int]]) -> Tensor:
        device = self.embeddings.device
        flat = torch.tensor([i for row in rows for i in row], device=device)
        starts = torch.tensor([0] + [len(row) for row in rows[:-1]], device=device).cumsum(0)
        return F.normalize(F.embedding_bag(flat, self.embeddings, starts, mode="mean") + self.bias, dim=-1)


def loss_to(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine to the teacher, and the difference of the two similarity matrices of the batch."""
    cosine = (student * teacher).sum(1).mean()
    difference = student @ student.T - teacher @ teacher.T
    return 1 - cosine + 4 * difference.square().mean()


def train_bag(vocabulary: Vocabulary, teacher: Teacher, texts: list[str], targets: Tensor, epochs: float) -> Embed:
    """The trained baseline; its token vectors start as what the teacher says of each token alone."""
    words = [word for word, _ in vocabulary.words()]
    initial = teacher.embed([word or "." for word in words])
    initial[[i for i, word in enumerate(words) if not word]] *= 0.02
    initial += 0.001 * torch.randn(initial.shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    bag = Bag(initial).to(teacher.device)
    batch = min(2048, len(texts) // 4)
    steps = int(epochs * len(texts) / batch)
    optimizer = torch.optim.Adam(bag.parameters(), lr=0.03, betas=(0.9, 0.99))
    order = torch.randperm(len(texts)).repeat(int(epochs) + 1)
    for step in tqdm(range(steps), desc=f"static, {vocabulary.size} tokens"):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * min(1.0, 1.02 - step / steps)
        picked = order[step * batch : (step + 1) * batch]
        rows = vocabulary.encode([texts[i] for i in picked.tolist()], 256)
        loss = loss_to(bag(rows), targets[picked].to(teacher.device).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda some: bag(vocabulary.encode(some, 8192)).detach().cpu()
